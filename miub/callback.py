"""The monitor in a ``transformers.Trainer``.

Held by tests/miub/test_monitor_callback.py.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from miub.monitor import MIUBMonitor
from miub.report.report import MIUBReport
from miub.report.rows import LayerRow
from miub.report.table import FOLDED_BASE
from scalora.arguments import described, did_you_mean
from scalora.warning import warn


class MIUBCallback(TrainerCallback):
    """Measures each LoRA layer during training and logs it where the Trainer logs.

    ::

        trainer = Trainer(model, args, callbacks=[miub.MIUBCallback(every=50)])

    The Trainer's next log after a measurement goes on in ``trainer.state.log_history`` with
    ``miub/mean``, ``miub/mean_per_coordinate`` and ``miub/<layer>`` (``miub/<layer>/<adapter>``
    where several adapters are active), in nats.  Evaluation is not measured.

    Two more numbers say what these may be compared with.  ``miub/coordinates`` is the most that a
    layer's learned path has.  ``miub/layers_with_folded_base`` counts the layers whose frozen path
    has taken in part of what was learned (a warning says it once); it is 0 with ``reference=``.

    TensorBoard and the like draw all that has one name as one curve, over all runs, and values at
    different numbers of coordinates are no one curve.  So what they get has the number in its name:
    ``miub/mean/8_coordinates``, the mean over the layers with 8, and
    ``miub/<layer>/8_coordinates``.

    Args:
        every: measure in the first forward pass of every ``every``-th optimizer step.
        per_layer: whether to log each layer; otherwise the means alone.
        options: as for `miub.MIUBMonitor`: ``tokens``, ``estimator``, ``noise``, and so on.

    Attributes:
        monitor: the monitor, once training has begun; ``callback.report()`` is its report.

    Raises:
        TypeError: an unknown option.
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
        self._warned = False

    def report(self) -> MIUBReport:
        """Return the report on all measurements so far.

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
        """Make the monitor, and move before the callbacks that write the logs."""
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
        """Measure in the next forward pass, if it is this step's turn."""
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
        """Add the measurements since the last log of training."""
        logs = kwargs.get("logs")
        if self.monitor is None or logs is None or "loss" not in logs:
            return
        if self._measured == self._logged:
            return
        self._logged = self._measured
        report = self.monitor.report_if_any()  # too few tokens in every pass: there was a warning
        if report is None:
            return
        folded = sum(row.rebased for row in report)
        if folded and not self._warned:
            self._warned = True
            warn(f"MIUB of {folded} layers with a folded base: {FOLDED_BASE}")
        shared = {
            "miub/coordinates": report.coordinates[1],
            "miub/layers_with_folded_base": folded,
        }
        logs.update(self._curves(report) | shared)
        if state.log_history:  # where the Trainer has put a copy
            state.log_history[-1].update(self._values(report) | shared)

    def _values(self, report: MIUBReport) -> dict[str, float]:
        """Return what the history of one run gets, by name."""
        values = {
            "miub/mean": report.mean,
            "miub/mean_per_coordinate": report.mean_per_coordinate,
        }
        return values | {name: row.value for name, row in self._layers(report).items()}

    def _curves(self, report: MIUBReport) -> dict[str, float]:
        """Return what loggers get, who may draw many runs: the coordinates are in every name."""
        values = {}
        for number, total in report.by_coordinates().items():
            values[f"miub/mean/{number}_coordinates"] = total.mean
            values[f"miub/mean_per_coordinate/{number}_coordinates"] = total.mean_per_coordinate
        return values | {
            f"{name}/{row.coordinates}_coordinates": row.value
            for name, row in self._layers(report).items()
        }

    def _layers(self, report: MIUBReport) -> dict[str, LayerRow]:
        """Return the rows of the layers that are logged, by name."""
        if not self.per_layer:
            return {}
        several = len(report.adapters) > 1
        return {
            f"miub/{row.layer}/{row.adapter}" if several else f"miub/{row.layer}": row
            for row in report
        }

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the hooks off the model."""
        if self.monitor is not None:
            self.monitor.detach()


def _come_first(callback: TrainerCallback, handler: object) -> None:
    """Move the callback before the Trainer's own, so that they log its values.

    The Trainer offers no other way: it calls its loggers before the user's callbacks, with the same
    dictionary, and tells no callback of itself.  This runs in the handler's loop over its
    callbacks, whose later entries keep their places.
    """
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
