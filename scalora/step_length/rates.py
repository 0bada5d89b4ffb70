"""Learning rates, read without waiting for a device, and steps counted by how far they go.

Held by tests/step_length/test_learning_rates.py and tests/rebasing/test_forgetting.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalora.scaling.quadratic import solver_dtype

Number = float | Tensor  # a tensor, 0-d, where learning rates are kept on a device


def host_rate(lr: Number) -> Number:
    """Return a learning rate as a number, or as a tensor if it is on a device: nobody waits."""
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def highest_rate(
    groups: Sequence[dict[str, Any]], parameters: Sequence[nn.Parameter]
) -> float | None:
    """Return the highest learning rate of some parameters; None where one is kept on a device.

    Args:
        groups: an optimizer's, others among them: a new head's rate says nothing of an adapter's.
        parameters: whose rates are asked for.
    """
    wanted = {id(p) for p in parameters}
    of_these = [group for group in groups if any(id(p) in wanted for p in group["params"])]
    rates = [host_rate(group["lr"]) for group in of_these]
    known = [rate for rate in rates if not isinstance(rate, Tensor)]
    return max(known) if known and len(known) == len(rates) else None


def is_zero(lr: Number) -> bool:
    """Return whether a learning rate is 0, as far as that is known without waiting."""
    rate = host_rate(lr)
    return not isinstance(rate, Tensor) and rate == 0


class LearnedSteps:
    """Counts what each layer has learned since it was last re-based, in steps at the highest rate.

    One at half that rate is half a step.  A schedule then has its meaning: while the rate falls,
    less is learned per step, and less is forgotten.  During a warm-up every rate is the highest so
    far, so every step counts in full.
    """

    def __init__(self) -> None:
        self._peaks: list[Number] = []  # of each parameter group, the highest learning rate so far
        self._counts: list[Number] = []  # likewise, its steps so far
        self._marks: dict[str, Number] = {}  # layer name -> its count when it was last re-based

    @torch.no_grad()
    def count(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Count the step that every parameter group has just taken."""
        new = len(groups) - len(self._counts)  # add_param_group
        self._peaks += [0.0] * new
        self._counts += [0.0] * new
        for i, group in enumerate(groups):
            rate = host_rate(group["lr"])
            self._peaks[i] = peak = _larger(self._peaks[i], rate)
            self._counts[i] = self._counts[i] + _share(rate, peak)

    def since(self, layer: str, group: int) -> Number:
        """Return the steps of a layer, whose P is in that group, since it was last re-based."""
        count = self._counts[group] if group < len(self._counts) else 0.0
        return count - self._marks.get(layer, 0.0)

    def peak(self, group: int, rate: Number) -> Number:
        """Return the highest learning rate of a group, the coming step's among them."""
        return _larger(self._peaks[group] if group < len(self._peaks) else 0.0, rate)

    def mark(self, layers: Iterable[str], group: int) -> None:
        """Note that these layers have just been re-based."""
        count = self._counts[group] if group < len(self._counts) else 0.0
        self._marks.update(dict.fromkeys(layers, count))

    def saved(self) -> dict[str, Any]:
        """Return the numbers that `load` needs.  Waits for the device if a rate is kept there."""
        marks = {layer: float(mark) for layer, mark in self._marks.items()}
        return {"peaks": _floats(self._peaks), "counts": _floats(self._counts), "marks": marks}

    def load(self, saved: Mapping[str, Any] | None) -> None:
        """Take up what `saved` returned; ``None``: begin anew."""
        saved = saved or {"peaks": [], "counts": [], "marks": {}}
        self._peaks, self._counts = list(saved["peaks"]), list(saved["counts"])
        self._marks = dict(saved["marks"])


def _floats(counts: Iterable[Number]) -> list[float]:
    return [float(count) for count in counts]


def _larger(peak: Number, rate: Number) -> Number:
    # A number beside a tensor goes into its kernel: copied to the device it would be waited for.
    if isinstance(rate, Tensor):
        # float32 ends counting whole steps at 16 million, and halves before.
        rate = rate.to(solver_dtype(rate.device))
        return torch.maximum(rate, peak) if isinstance(peak, Tensor) else rate.clamp_min(peak)
    return peak.clamp_min(rate) if isinstance(peak, Tensor) else max(peak, rate)


def _share(rate: Number, peak: Number) -> Number:
    if isinstance(peak, Tensor):
        return torch.nan_to_num(rate / peak)
    return rate / peak if peak > 0 else 0.0
