"""Messages of a `ScaLoRACallback`: lines when training begins and ends, and numbers in the logs."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from scalora.fold import is_rounded
from scalora.optimizer import ScaLoRA
from scalora.warning import warn

_QUIET = ("warning", "error", "critical")
_MANY_STEPS = 1000
_DRIFT = (
    " The weights are in half precision and drift as they are rounded; rounding='compensated' "
    "prevents that for a byte per weight."
)


class ProgressLogs(TrainerCallback):
    """Adds `ScaLoRA.progress` to the Trainer's logs of training, as ``scalora/<name>``.

    The numbers are computed when the Trainer logs, and at no other time: its loss makes it wait for
    the device then anyway.

    Args:
        optimizer: the run's.
    """

    def __init__(self, optimizer: ScaLoRA) -> None:
        self.optimizer = optimizer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the numbers to a log of training, not to one of an evaluation."""
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        values = {f"scalora/{name}": value for name, value in self.optimizer.progress().items()}
        logs.update(values)
        if state.log_history:  # where the Trainer has put a copy
            state.log_history[-1].update(values)

    def attach(self) -> None:
        """Come before the Trainer's own callbacks, whose loggers get the same dictionary."""
        handler = _handler()
        if handler is not None:
            # A new list: the handler is in a loop over the old one.
            handler.callbacks = [self, *handler.callbacks]

    def detach(self) -> None:
        """Leave the Trainer's callbacks as they were."""
        handler = _handler()
        if handler is not None:
            handler.callbacks = [other for other in handler.callbacks if other is not self]


def _handler() -> CallbackHandler | None:
    """Return the handler that is calling its callbacks further up the stack, if one is.

    A callback is told neither of it nor of the Trainer.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None


def say(line: str, args: TrainingArguments) -> None:
    """Print a line, on one process per node and unless ``log_level`` asks for warnings alone."""
    if args.should_log and args.log_level not in _QUIET:
        tqdm.write(line)  # beside a progress bar


def opening(optimizer: ScaLoRA, step: int, last: int, is_sharded: bool) -> str:
    """Return the line with which a run begins; warn if it will never re-base.

    Args:
        optimizer: the run's.
        step: steps done before it.
        last: the step at which it ends.
        is_sharded: whether its model is.
    """
    options, places = optimizer.options, list(optimizer.places.values())
    if optimizer.next_rebasing is None:
        return "ScaLoRA: rule='none' re-bases no layer, this is plain LoRA."
    first = step + optimizer.next_rebasing
    times = max(0, (last - first) // options.interval_steps + 1)
    if times == 0 and optimizer.rebase_count == 0:
        warn(
            f"this run of {last} steps ends before the first re-basing, which is due in step "
            f"{first}: it is plain LoRA. Pass a smaller interval or memory, or train for longer."
        )
    where = " and ".join(f"{places.count(p)} {p}" for p in ("dense", "carry") if p in places)
    chosen = " ('auto')" if options.rule == "auto" else ""
    memory = f", memory {options.memory_steps:g} steps" if options.scales_P_alone else ""
    # A run that goes on, and one that is sharded, cannot take up another rounding.
    is_free = optimizer.rebase_count == 0 and not is_sharded
    drifts = is_free and last - step >= _MANY_STEPS and _rounds_stochastically(optimizer)
    return (
        f"ScaLoRA: {len(places)} LoRA layers are re-based ({where}), "
        f"rule {options.resolved_rule!r}{chosen}{memory}, once in {options.interval_steps} steps: "
        f"next in step {first}, {times} in all until step {last}."
        f"{_DRIFT if drifts else ''}"
    )


def _rounds_stochastically(optimizer: ScaLoRA) -> bool:
    """Return whether what is frozen is rounded at random into half-precision weights."""
    places = optimizer.places
    folded = [p.base_weight for p in optimizer.rebased_pairs if places[p.name] == "dense"]
    stochastic = optimizer.options.rounding == "stochastic"
    return stochastic and any(is_rounded(weight.dtype) for weight in folded)


def closing(optimizer: ScaLoRA, is_sharded: bool) -> str:
    """Return the line with which a run ends: how to save what it has learned."""
    if optimizer.rebase_count == 0:
        return "ScaLoRA: nothing was re-based, so the adapter is all there is to save."
    done = f"ScaLoRA: re-based {optimizer.rebase_count} times, so the adapter is not all there is."
    if is_sharded:
        return (
            f"{done} The model is sharded: checkpoints have all of it, trainer.save_model has not."
        )
    return (
        f"{done} Save with scalora.save_merged(model, folder) or scalora.save_adapter(model, "
        "folder, base=...); trainer.save_model(folder) writes all of it, too."
    )
