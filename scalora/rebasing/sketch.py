"""The change of every layer, seen through two small random projections.

What was folded into a dense base is in the weight and nowhere else, and a singular value
decomposition of big weights is not for a training loop.  So the sum D of what was frozen, (m, n),
is followed as ``Psi D Omega^T``, k = 64: with fixed ``Psi`` (k, m) and ``Omega`` (k, n) of random
signs over ``sqrt(k)``, or the identity where a side has at most 64.  On average such a sketch has
the squared norm of D, and it has its singular values as long as those are few (Halko, Martinsson
and Tropp, arXiv 0909.4061).

Held by tests/rebasing/test_sketch.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalora import sharding
from scalora.peft_layers import LoRAPair
from scalora.rebasing.batches import thin_factors

SKETCH_SIZE = 64  # k
_ROUND_OFF = 1e-6  # of the largest singular value


@dataclass(frozen=True)
class SketchedChange:
    """Sketch of one layer's change, on the host.

    Attributes:
        frozen: (k, k), of all that re-basings froze.
        trainable: (k, k), of the adapter's product as it is.
    """

    frozen: Tensor
    trainable: Tensor

    @property
    def effective_rank(self) -> float:
        """Effective rank of the whole change, as `scalora.effective_rank` defines it, or less.

        It is right where a side of the weight has at most 64 rows or columns, a tenth too small for
        16 equal singular values, and never reaches 64 (tests/rebasing/test_sketch.py).  NaN where
        the layer is not finite.
        """
        change = self.frozen + self.trainable
        if not change.isfinite().all():  # which LAPACK refuses
            return nan
        values = torch.linalg.svdvals(change)
        values = values.where(values > _ROUND_OFF * values.max(), 0.0)
        if not values.any():
            return 0.0
        return float(torch.special.entr(values / values.sum()).sum().exp())


class Projected(NamedTuple):
    """The increments of some layers, projected on both sides.

    Attributes:
        names: of the layers.
        left, right: (layers, 64, k) and (layers, k, 64); a smaller side is as it is.
        scaling: factor of their product, which is the increments' sketch.
    """

    names: list[str]
    left: Tensor
    right: Tensor
    scaling: float


class FrozenSketches:
    """Follows what re-basings freeze, in k^2 numbers per layer.

    Only of layers whose increments go into the base weight: a carry is there to be looked at.  And
    not of sharded ones, whose factors every re-basing would have to send once more.

    Args:
        places: layer -> "dense" or "carry", where its increments go.

    Attributes:
        columns: layer name -> columns frozen so far; a re-basing freezes the r of its layer.
        knows_columns: whether those are all: a state was loaded with them, or none had to be.
    """

    def __init__(self, places: Mapping[LoRAPair, str]) -> None:
        self.places = places
        self.columns: dict[str, int] = {}
        self.knows_columns = True
        self._frozen: dict[str, Tensor] = {}  # none before the first re-basing
        self._stacks: dict[tuple[str, ...], Tensor] = {}  # of layers that are added together
        self._is_known = True
        self._kept_signs: dict[Hashable, Tensor] = {}  # int8: most of what is kept
        self._widened: dict[Hashable, Tensor] = {}  # in float32, while a re-basing uses them

    def __getstate__(self) -> dict[str, Any]:
        # Pickled, a stack and its views would be apart, and what is added to one not in the other;
        # and each view would take the whole stack along.
        frozen = {name: sketch.clone() for name, sketch in self._frozen.items()}
        return {**self.__dict__, "_frozen": frozen, "_stacks": {}}

    @torch.no_grad()
    def project(self, pairs: Sequence[LoRAPair], left: Tensor, right: Tensor) -> Projected | None:
        """Return an increment's factors as the sketches see them; None where it is not followed.

        Args:
            pairs: layers of one shape and scaling, for which it counts as frozen.
            left, right: (layers, m, k) and (layers, n, k), of the increments.
        """
        first = pairs[0]
        rank = first.rank
        for pair in pairs:
            self.columns[pair.name] = self.columns.get(pair.name, 0) + rank
        if self.places[first] != "dense" or not self._is_known:
            return None
        if sharding.is_sharded(first.P_parameter):
            self._is_known = not self._frozen  # sharded since: the sketches are stale
            self._frozen, self._stacks = {}, {}
            return None
        psi = self._signs(left.shape[-2], 0, left.device)
        omega = self._signs(right.shape[-2], 1, left.device)
        scaling = first.scaling * _norm(left.shape[-2]) * _norm(right.shape[-2])
        names = [pair.name for pair in pairs]
        return Projected(names, psi @ left.float(), right.float().mT @ omega.mT, scaling)

    @torch.no_grad()
    def add(self, increments: Sequence[Projected | None]) -> None:
        """Add projected increments to the sketches, all of one shape at once."""
        alike: dict[Hashable, list[Projected]] = {}
        for increment in increments:
            if increment is not None:
                left, right = increment.left, increment.right
                key = left.shape[1:], right.shape[1:], left.device, increment.scaling
                alike.setdefault(key, []).append(increment)
        for group in alike.values():
            left, right = torch.cat([i.left for i in group]), torch.cat([i.right for i in group])
            names = [name for increment in group for name in increment.names]
            self._add(Projected(names, left, right, group[0].scaling))
        self._widened.clear()

    def _add(self, increments: Projected) -> None:
        """Add to the sketches.  Layers that are added together mostly were before: one stack."""
        names, left, right, scaling = increments
        stack = self._stacks.get(tuple(names))
        if stack is not None and stack.device == left.device:
            stack.baddbmm_(left, right, alpha=scaling)
            return
        new = (left @ right) * scaling
        before = [self._frozen.get(name) for name in names]
        if any(sketch is not None for sketch in before):
            none = torch.zeros_like(new[0])
            new = new + torch.stack([none if s is None else s.to(new.device) for s in before])
        apart = {other: s for other, s in self._stacks.items() if not {*other} & {*names}}
        self._stacks = {**apart, tuple(names): new}
        self._frozen.update(zip(names, new.unbind(), strict=True))

    @torch.no_grad()
    def changes(self) -> dict[str, SketchedChange]:
        """Return the sketches of all layers but the sharded ones.  Waits for the device once.

        Empty where a state was loaded that does not say what had been frozen.
        """
        pairs = _plain(self.places) if self._is_known else []
        trainable = self._trainable(pairs)
        found = []
        for pair in pairs:
            frozen = self._carried(pair) if self.places[pair] == "carry" else None
            if frozen is None:
                frozen = self._frozen.get(pair.name, torch.zeros_like(trainable[pair.name]))
            found.append(torch.stack([frozen.to(pair.P_parameter.device), trainable[pair.name]]))
        self._widened.clear()
        if not found:
            return {}
        first = found[0].device
        flat = torch.cat([both.to(first).flatten() for both in found]).cpu()
        pieces = flat.split([both.numel() for both in found])
        return {
            pair.name: SketchedChange(*piece.view_as(both))
            for pair, both, piece in zip(pairs, found, pieces, strict=True)
        }

    def kept_tensors(self) -> list[Tensor]:
        """Return the tensors that are kept between steps."""
        return [*self._frozen.values(), *self._kept_signs.values()]

    def state(self) -> dict[str, Any] | None:
        """Return what `load` needs to go on; None where not even the columns are known."""
        if not self.knows_columns:
            return None
        sketches = {name: sketch.clone() for name, sketch in self._frozen.items()}
        return {"columns": dict(self.columns), "sketches": sketches}

    def load(self, state: Mapping[str, Any] | None, rebase_count: int = 0) -> None:
        """Take up what `state` returned, after ``rebase_count`` re-basings; None: begin anew."""
        self.columns = dict(state["columns"]) if state is not None else {}
        sketches = state["sketches"] if state is not None else {}
        self._frozen = {name: sketch.detach().clone() for name, sketch in sketches.items()}
        self._stacks = {}
        self.knows_columns = state is not None or rebase_count == 0
        # Of sharded layers there are no sketches.
        dense = {pair.name for pair, place in self.places.items() if place == "dense"}
        self._is_known = self.knows_columns and dense & self.columns.keys() <= self._frozen.keys()

    @torch.no_grad()
    def _trainable(self, pairs: Sequence[LoRAPair]) -> dict[str, Tensor]:
        """Return the sketch of every adapter's product, (k, k), all layers of one shape at once."""
        alike: dict[Hashable, list[LoRAPair]] = {}
        for pair in pairs:
            P, Q = pair.P_parameter, pair.Q_parameter
            key = P.shape, Q.shape, P.dtype, Q.dtype, P.device, pair.scaling
            alike.setdefault(key, []).append(pair)
        found: dict[str, Tensor] = {}
        for group in alike.values():
            sketches = self._sketch(*thin_factors(group)) * group[0].scaling
            found |= zip((pair.name for pair in group), sketches.unbind(), strict=True)
        return found

    def _carried(self, pair: LoRAPair) -> Tensor | None:
        carry = pair.carry
        return None if carry is None else self._sketch(carry.up, carry.down) * pair.scaling

    def _sketch(self, P: Tensor, Q: Tensor) -> Tensor:
        """Return ``Psi P Q Omega^T``, (..., k, k), of P (..., m, r) and Q (..., r, n)."""
        left = self._signs(P.shape[-2], 0, P.device) @ P.float()
        right = Q.float() @ self._signs(Q.shape[-1], 1, Q.device).mT
        return left @ right * (_norm(P.shape[-2]) * _norm(Q.shape[-1]))

    def _signs(self, dimension: int, side: int, device: torch.device) -> Tensor:
        """Return sqrt(k) Psi (side 0) or sqrt(k) Omega (side 1), (k, dimension), float32.

        They are the same in every run.  Where a side has at most k: the identity.
        """
        key = dimension, side, device
        if key not in self._kept_signs:
            # The same whatever torch's default dtype and device are.
            like: dict[str, Any] = {"dtype": torch.int8, "device": "cpu"}
            if dimension <= SKETCH_SIZE:
                made = torch.eye(dimension, **like)
            else:
                generator = torch.Generator("cpu").manual_seed(2 * dimension + side)
                bits = torch.randint(2, (SKETCH_SIZE, dimension), generator=generator, **like)
                made = 2 * bits - 1
            self._kept_signs[key] = _to_device(made, device)
        if key not in self._widened:
            self._widened[key] = self._kept_signs[key].float()
        return self._widened[key]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device, without waiting for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return pinned.to(device, non_blocking=True)


def _norm(dimension: int) -> float:
    """Return what the signs of a side of this length are multiplied by."""
    return 1.0 if dimension <= SKETCH_SIZE else SKETCH_SIZE**-0.5


def _plain(pairs: Iterable[LoRAPair]) -> list[LoRAPair]:
    return [p for p in pairs if p.exists and not sharding.is_sharded(p.P_parameter)]
