"""TRL's trainers whose reference model is the trained model with its adapter switched off.

Held by tests/integrations/test_stack_trl.py and test_stack_trl_references.py.

They learn from preferences or rewards, and compare a PEFT model with its own base.  Increments must
stay out of that base.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from scalora.options import RebasingOptions

# TRL's arguments by the name of their class, so that TRL need not be installed: of trainers that
# always have a reference model, of those that may compute its answers before training, of those
# that have one unless ``beta`` is 0, and of those that take the model's past self for a teacher.
_ALWAYS = {"BCOConfig", "OnlineDPOConfig"}
_UNLESS_PRECOMPUTED = {"DPOConfig", "KTOConfig"}
_WITH_PENALTY = {"GRPOConfig", "RLOOConfig"}
_WITH_TEACHER = {"SDFTConfig", "SDPOConfig"}


def refers_to_base(arguments: Any) -> bool:
    """Return whether a trainer of these arguments uses the base as its reference model.

    A reference model that was passed to the trainer itself cannot be seen in its arguments.

    Raises:
        ValueError: the reference is an average of the adapter's parameters over time.
    """
    names = {cls.__name__ for cls in type(arguments).__mro__}
    if names & _ALWAYS:
        return True
    if names & _WITH_TEACHER:
        teacher = getattr(arguments, "teacher_model_kind", "base")
        if teacher == "ema":
            raise ValueError(
                "teacher_model_kind='ema' averages the adapter's parameters over time, which stand "
                "for something else after every re-basing: use teacher_model_kind='base' or 'live'."
            )
        return bool(teacher == "base")
    if names & _UNLESS_PRECOMPUTED:
        return not getattr(arguments, "precompute_ref_log_probs", False)
    return bool(names & _WITH_PENALTY) and getattr(arguments, "beta", 0.0) != 0.0


def options_beside_base(options: RebasingOptions) -> RebasingOptions:
    """Return the options with every increment beside the base.

    Raises:
        ValueError: increments are asked to go into the base.
    """
    if options.resolved_rule == "none":
        return options
    if options.accumulator == "dense":
        raise ValueError(
            "accumulator='dense' changes the base weights, which are this trainer's reference "
            "model: it switches the adapter off and expects the pretrained model. Use "
            "accumulator='carry', or precompute_ref_log_probs=True where the trainer has it."
        )
    # Nothing is rounded beside the base.
    return dataclasses.replace(options, accumulator="carry", rounding=RebasingOptions.rounding)
