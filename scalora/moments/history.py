"""Gradients and state of one factor of many layers, carried across a re-basing exactly.

The gradient of ``P diag(alpha)`` is ``g_P diag(beta)``: each factor's history carries the *other*
factor's scaling (docs/mathematics.md, moments).

Held by tests/moments/test_moments.py and tests/moments/test_bitsandbytes_states.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scalora import sharding

Write = tuple[Sequence[Tensor], Tensor, Tensor]
"""Tensors to write to, and their stacks (layers, ...) before and after the write."""


class Moved(NamedTuple):
    """Tensors of several kinds and many layers, before and after a change of coordinates.

    Attributes:
        targets: for every kind, the tensor of each layer.
        old, new: (kinds, layers, ...).
    """

    targets: Sequence[Sequence[Tensor]]
    old: Tensor
    new: Tensor

    def unless(self, layers: Tensor) -> Moved:
        """Return the change without that of some layers, (layers,) bool, which keep their own."""
        kept = layers.reshape(1, -1, *(1,) * (self.new.ndim - 2))
        return self._replace(new=torch.where(kept, self.old, self.new))

    def writes(self) -> list[Write]:
        """Return what is to be written, one kind after the other."""
        return list(zip(self.targets, self.old, self.new, strict=True))


def sums(stacked: Tensor) -> Tensor:
    """Return (layers,) sums over a (kinds, layers, ...): not finite where an element is not."""
    dtype = torch.promote_types(stacked.dtype, torch.float32)
    return stacked.flatten(2).sum((0, 2), dtype=dtype)


class Powers:
    """The powers of a scaling's factors, each computed once for all layers.

    Args:
        factor: (layers, r), or (layers, 1) for one factor for all columns.
    """

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor
        self._first: dict[torch.dtype, Tensor] = {}
        self._stacked: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}

    def first(self, dtype: torch.dtype) -> Tensor:
        """Return the factor itself, (layers, r), in ``dtype`` or float32, whichever is wider."""
        wide = torch.promote_types(dtype, torch.float32)
        if wide not in self._first:
            self._first[wide] = self.factor.to(wide)
        return self._first[wide]

    def of(self, degrees: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return (len(degrees), layers, r), in ``dtype`` or float32, whichever is wider."""
        wide = torch.promote_types(dtype, torch.float32)
        key = tuple(degrees), wide
        if key not in self._stacked:
            powers = {
                d: self.first(wide) if d == 1 else self.factor.pow(d).to(wide) for d in key[0]
            }
            self._stacked[key] = torch.stack([powers[d] for d in degrees])
        return self._stacked[key]


class Kept(Protocol):
    """A part of the history, of any format."""

    def sums(self) -> Tensor:
        """Return (layers,) sums, not finite where the part is not."""

    def moved(self, powers: Powers, layers: slice) -> list[Moved]:
        """Return the part in the new coordinates.

        Args:
            powers: of beta for P's history, of alpha for Q's; of these layers and others.
            layers: which of those these are.
        """


@dataclass(frozen=True)
class Column:
    """A state, or the gradient, that runs over the r columns.

    Attributes:
        targets: one of each layer.
        degree: of homogeneity in the gradient history, 1 or more.
    """

    targets: Sequence[Tensor]
    degree: int


@dataclass(frozen=True)
class Columns:
    """Columns of one shape and dtype, stacked, so that one multiplication moves them.

    Attributes:
        columns: what is stacked.
        old: (len(columns), layers, *shape).
        axis: which axis of (layers, *shape) runs over the r columns.
    """

    columns: Sequence[Column]
    old: Tensor
    axis: int

    def sums(self) -> Tensor:
        """Return (layers,) sums over all columns."""
        return sums(self.old)

    def moved(self, powers: Powers, layers: slice) -> list[Moved]:
        """Return each column times its power of the scaling, rounded once."""
        degrees = [column.degree for column in self.columns]
        factors = powers.of(degrees, self.old.dtype)[:, layers]
        new = times(self.old, along(factors, self.old.ndim, 0, 1, self.axis + 1))
        return [Moved([column.targets for column in self.columns], self.old, new)]


@dataclass(frozen=True)
class Averaged:
    """A state that was averaged over the r columns (`transfer_reduced`)."""

    targets: Sequence[Tensor]
    partners: Sequence[Tensor]
    degree: int
    axis: int

    def sums(self) -> Tensor:
        """Return (layers,) sums of the state."""
        return sums(sharding.stack(self.targets).unsqueeze(0))

    def moved(self, powers: Powers, layers: slice) -> list[Moved]:
        """Return the state in the new coordinates."""
        old, partner = sharding.stack(self.targets), sharding.stack(self.partners)
        new = transfer_reduced(old, partner, powers.factor[layers], self.degree, self.axis)
        return [Moved([self.targets], old.unsqueeze(0), new.to(old.dtype).unsqueeze(0))]


@dataclass(frozen=True)
class FactorHistory:
    """One factor of every layer of a batch, and all that depends on its gradients.

    Attributes:
        parameter, gradient: (layers, *parameter shape); of sharded ones the rows held here.
        kept: gradients and state, all but what is of degree 0.
        totals: each (layers,), not finite where anything of these is not.
    """

    parameter: Tensor
    gradient: Tensor
    kept: Sequence[Kept]
    totals: Sequence[Tensor]

    @staticmethod
    def of(
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        columns: Sequence[Column],
        others: Sequence[Kept],
        axis: int,
    ) -> FactorHistory:
        """Stack one factor of every layer, with the gradients and columns of its shape and dtype.

        Args:
            parameters, gradients: of each layer; of sharded ones the rows held here.
            columns: the state that runs over the r columns.
            others: the rest of the state.
            axis: which axis of (layers, *parameter shape) runs over the r columns.
        """
        alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[Column]] = {}
        for column in (Column(parameters, 0), Column(gradients, 1), *columns):
            first = column.targets[0]
            alike.setdefault((first.shape, first.dtype, first.device), []).append(column)
        flat = [
            [tensor for column in group for tensor in column.targets] for group in alike.values()
        ]
        stacks = [
            torch.stack(tensors).detach().unflatten(0, (-1, len(parameters))) for tensors in flat
        ]
        kept: list[Kept] = []
        for group, stacked in zip(alike.values(), stacks, strict=True):
            start = 1 if group[0].degree == 0 else 0  # the parameters are no history
            if group[start:]:
                kept.append(Columns(group[start:], stacked[start:], axis))
        first_stack = stacks[0]
        gradient = first_stack[1] if len(first_stack) > 1 else stacks[1][0]
        totals = [*map(sums, stacks), *(other.sums() for other in others)]
        return FactorHistory(first_stack[0], gradient, [*kept, *others], totals)

    def moved(self, powers: Powers, layers: slice) -> list[Moved]:
        """Return gradients and state in the new coordinates, as `Kept.moved`."""
        return [moved for part in self.kept for moved in part.moved(powers, layers)]


def transfer(state: Tensor, factor: Tensor, degree: int, rank_axis: int) -> Tensor:
    """Return a state of ``degree`` in the gradient history in the new coordinates, a new tensor.

    Args:
        state: (layers, *parameter shape), or with the axes other than the rank's reduced to 1.
        factor: (layers, r): beta for P's state, alpha for Q's.
        degree: 0, 1 or 2 (any non-negative integer).
        rank_axis: the axis of ``state`` that runs over the r columns.
    """
    if degree == 0:
        return state.clone()
    return state * along(factor.pow(degree).to(_compute(state)), state.ndim, 0, rank_axis)


def transfer_reduced(
    state: Tensor, partner: Tensor, factor: Tensor, degree: int, rank_axis: int
) -> Tensor:
    """Return a state that was averaged over the rank axis (Adafactor's other factor), moved.

    ``mean_j g_ij^2`` does not remember its columns.  Under the rank-one model in which Adafactor
    keeps second moments, ``v_ij = R_i C_j / mean(C)``, scaling column j by ``f_j^2`` multiplies
    ``R`` by ``mean_j(f_j^2 C_j) / mean_j(C_j)``: exact where the model is.

    Args:
        state: (layers, ...), size 1 along ``rank_axis``.
        partner: (layers, ...), the factor that runs along ``rank_axis``, before its transfer.
        factor, degree, rank_axis: as in `transfer`.
    """
    weights = along(factor.pow(degree).to(_compute(state)), partner.ndim, 0, rank_axis)
    total = partner.sum(rank_axis, keepdim=True)
    ratio = (partner * weights).sum(rank_axis, keepdim=True) / total
    return state * ratio.where(total > 0, weights.mean(rank_axis, keepdim=True))


def _compute(state: Tensor) -> torch.dtype:
    return torch.promote_types(state.dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def times(stacked: Tensor, factors: Tensor) -> Tensor:
    """Return the product in the dtype of ``stacked``, rounded once."""
    return torch.mul(stacked, factors, out=torch.empty_like(stacked))


def along(factors: Tensor, ndim: int, *axes: int) -> Tensor:
    """Return factors shaped to broadcast, with one axis of ``ndim`` for each of their own."""
    shape = [1] * ndim
    for axis, size in zip(axes, factors.shape, strict=True):
        shape[axis] = size
    return factors.reshape(shape)
