"""Trainers whose reference model is the trained model itself with its adapter switched off.

TRL's trainers for preferences and for reinforcement learning compare a PEFT model with its own
base.  Increments must stay out of the base then.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from scalora.guards.base_watch import BaseWatch
from scalora.options import RebasingOptions

# TRL's arguments by the name of their class, so that TRL need not be installed: of trainers that
# always have a reference model, of those that may compute its answers before training, of those
# that have one unless ``beta`` is 0, and of those that take the model's past self for a teacher.
_ALWAYS = {"BCOConfig", "OnlineDPOConfig"}
_UNLESS_PRECOMPUTED = {"DPOConfig", "KTOConfig"}
_WITH_PENALTY = {"GRPOConfig", "RLOOConfig"}
_WITH_TEACHER = {"SDFTConfig", "SDPOConfig"}


def refers_to_base(arguments: Any) -> bool:
    """Whether a trainer of these arguments takes the base for its reference while it trains.

    A reference model that was passed to the trainer cannot be seen in them.

    Args:
        arguments: the trainer's.

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


def check_reference(watch: BaseWatch | None) -> None:
    """Raise a ValueError if training refers to the base that increments go into.

    Args:
        watch: of the adapter whose increments these are, or None.
    """
    if watch is not None and watch.refers_to_base():
        raise ValueError(
            f"before this step and the one before it the model computed in training mode without "
            f"its adapter {watch.pair.adapter!r}, as for the reference model of DPO. ScaLoRA folds "
            "increments into the base weights, so that reference would move. Use "
            "accumulator='carry', which is switched off with the adapter (in TRL's trainers "
            "ScaLoRACallback takes it by itself). To look at the base for another purpose, call "
            "model.eval() before. Nothing was changed in this step."
        )


def options_beside_base(options: RebasingOptions) -> RebasingOptions:
    """The same options with every increment beside the base.

    Raises:
        ValueError: increments are asked to go into the base.
    """
    if options.resolved_rule == "none":
        return options
    if options.accumulator == "dense" or options.when_full == "fold":
        asked = "accumulator='dense'" if options.accumulator == "dense" else "when_full='fold'"
        raise ValueError(
            f"{asked} changes the base weights, which are this trainer's reference model: it "
            "switches the adapter off and expects the pretrained model. Use accumulator='carry' "
            "(with when_full='compress' or 'hold'), or precompute_ref_log_probs=True where the "
            "trainer has it."
        )
    # Nothing is rounded beside the base.
    return dataclasses.replace(options, accumulator="carry", rounding=RebasingOptions.rounding)
