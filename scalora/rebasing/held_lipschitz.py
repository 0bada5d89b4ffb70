"""The smoothness constant times the learning rate, held from a layer's first re-basing on."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalora.rebasing.batches import LayerBatch
from scalora.scaling.quadratic import solver_dtype


class Held(NamedTuple):
    """L times the learning rate of some layers.

    Attributes:
        lipschitz_lr: (layers,), NaN where it is still to be matched.
        is_known: whether none is, as far as the host has heard.
    """

    lipschitz_lr: Tensor
    is_known: bool


class HeldLipschitz:
    """Keeps L times the learning rate of every layer, and the stack of those that step together.

    Matching it takes a model of the inner optimizer's step, so it matters to know that nothing is
    left to match; but a host must not wait for its device to find out.

    Args:
        values: layer name -> what is held of it, 0-d; NaN, or no entry, where it is to be matched.
    """

    def __init__(self, values: MutableMapping[str, Tensor]) -> None:
        self.values = values
        self._stacked: dict[tuple[str, ...], _Stacked] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stacked": {}}  # of pinned memory there is one

    def of(self, batches: Sequence[LayerBatch]) -> Held:
        """Return what is held of the batches' layers, in their order."""
        names = _names(batches)
        values = [self.values.get(name) for name in names]
        found = self._stacked.get(names)
        if found is not None and all(a is b for a, b in zip(found.values, values, strict=True)):
            return Held(found.lipschitz_lr, bool(found.known))
        device = batches[0].P[0].device
        unknown = torch.full((), torch.nan, dtype=solver_dtype(device), device=device)
        stacked = torch.stack([unknown if value is None else value for value in values])
        self._stacked[names] = _Stacked(values, stacked, ArrivingFlag(stacked))
        return Held(stacked, bool(self._stacked[names].known))

    def hold(self, batch: LayerBatch, lipschitz_lr: Tensor) -> None:
        """Keep (layers,) of one batch."""
        for pair, value in zip(batch.pairs, lipschitz_lr.unbind(), strict=True):
            self.values[pair.name] = value

    def settle(self, batches: Sequence[LayerBatch], lipschitz_lr: Tensor) -> None:
        """Remember (all layers,) as the stack of what is held of these batches."""
        names = _names(batches)
        values = [self.values.get(name) for name in names]
        flag = self._stacked[names].known
        flag.tell(lipschitz_lr)
        self._stacked[names] = _Stacked(values, lipschitz_lr, flag)


class ArrivingFlag:
    """Tells whether no number is NaN any more, as far as the host has heard: it never waits.

    Numbers that are known stay known, so what has arrived once is true for good.

    Args:
        numbers: the first to look at.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._arrived: Tensor | None = None
        self.tell(numbers)

    def tell(self, numbers: Tensor) -> None:
        """Look at the numbers as they are now."""
        known = numbers.isnan().any().logical_not()
        if known.device.type == "cpu":
            self._arrived = known
        elif known.device.type == "cuda":
            if self._arrived is None:
                self._arrived = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=True)
            self._arrived.copy_(known, non_blocking=True)

    def __bool__(self) -> bool:
        return self._arrived is not None and bool(self._arrived)


class _Stacked(NamedTuple):
    values: list[Tensor | None]
    lipschitz_lr: Tensor
    known: ArrivingFlag


def _names(batches: Sequence[LayerBatch]) -> tuple[str, ...]:
    return tuple([pair.name for batch in batches for pair in batch.pairs])
