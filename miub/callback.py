"""The monitor inside a ``transformers.Trainer``."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from miub.monitor import MIUBMonitor
from miub.report.report import MIUBReport
from scalora.arguments import described, did_you_mean


class MIUBCallback(TrainerCallback):
    """Measures every LoRA layer during training and logs it where the Trainer logs.

    ::

        trainer = Trainer(model, args, callbacks=[miub.MIUBCallback(every=50)])

    The Trainer's next log after a measurement carries ``miub/mean``, ``miub/mean_per_rank`` and
    ``miub/<layer>`` (``miub/<layer>/<adapter>`` where several adapters are active), in nats: in
    TensorBoard and the like, in the progress bar, and in ``trainer.state.log_history``.  Evaluation
    is not measured.

    Args:
        every: measure in the first forward pass of every so many optimizer steps.
        per_layer: whether to log each layer; otherwise the means alone.
        options: as for `miub.MIUBMonitor`: ``tokens``, ``estimator``, ``noise``, and so on.

    Attributes:
        monitor: the monitor, once training has begun; ``callback.report()`` is its report.

    Raises:
        TypeError: an option of another name.
        TypeError, ValueError: as `miub.MIUBMonitor` does, when training begins.
    """

    def __init__(self, every: int = 50, *, per_layer: bool = True, **options: Any) -> None:
        known = [name for name in inspect.signature(MIUBMonitor).parameters if name != "model"]
        for name in options:
            if name not in known:
                raise TypeError(
                    f"MIUBCallback has no option {name!r}.{did_you_mean(name, known)} Its options: "
                    f"{', '.join(known)}."
                )
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every={described(every)} must be a number of steps.")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        self.every = every
        self.per_layer = per_layer
        self.options = options
        self.monitor: MIUBMonitor | None = None
        self._measured = self._logged = 0

    def report(self) -> MIUBReport:
        """All that was measured so far.

        Raises:
            ValueError: nothing was.
        """
        if self.monitor is None:
            raise ValueError("nothing was measured: training has not begun.")
        return self.monitor.report()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Make the monitor, and come before those who write the logs."""
        self.monitor = MIUBMonitor(kwargs["model"], every=self.every, **self.options)
        self._measured = self._logged = 0
        _come_first(self, sys._getframe(1).f_locals.get("self"))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure in the forward pass that comes, if it is this step's turn."""
        step = state.global_step + 1
        if self.monitor is not None and step % self.every == 0:
            self.monitor.measure_next(step)
            self._measured = step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add what was measured since the last log of training."""
        logs = kwargs.get("logs")
        if self.monitor is None or logs is None or "loss" not in logs:
            return
        if self._measured == self._logged:
            return
        self._logged = self._measured
        values = self._values(self.monitor.report())
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def _values(self, report: MIUBReport) -> dict[str, float]:
        values = {"miub/mean": report.mean, "miub/mean_per_rank": report.mean_per_rank}
        if self.per_layer:
            several = len(report.adapters) > 1
            for row in report:
                name = f"{row.layer}/{row.adapter}" if several else row.layer
                values[f"miub/{name}"] = row.value
        return values

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave the model as it was."""
        if self.monitor is not None:
            self.monitor.detach()


def _come_first(callback: TrainerCallback, handler: object) -> None:
    """Move the callback before the Trainer's own, so that they log what it adds.

    The Trainer has no other door: it calls its loggers before the user's callbacks, with the same
    dictionary, and no callback is told of the Trainer.  Called from the handler's loop over its
    callbacks, whose later entries keep their places.
    """
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
