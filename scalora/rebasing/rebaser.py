"""One re-basing of all LoRA layers: read, solve, fold, carry the moments; all or nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.carry import Carry
from scalora.moments import Moments, transfer
from scalora.moments.inner_states import moved_states
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair
from scalora.rebasing.accumulators import (
    Accumulator,
    CarryAccumulator,
    DenseAccumulator,
    LayerMemory,
    increment,
    increment_columns,
    increment_of_P,
)
from scalora.rebasing.batches import LayerBatch
from scalora.rebasing.scalings import OptimalColumns, RememberedColumns
from scalora.sharding.stacks import Write, gradients, stack

_P_RANK_AXIS, _Q_RANK_AXIS = 2, 1  # of a stack (layers, *parameter shape)


class Rebaser:
    """Re-bases LoRA layers under an optimizer.

    Args:
        pairs: the layers that can be re-based -> where their increments go, "dense" or "carry".
        options: the user's choices.
        moments: how the optimizer's state depends on the gradient.
    """

    def __init__(
        self, pairs: Mapping[LoRAPair, str], options: RebasingOptions, moments: Moments
    ) -> None:
        self.pairs = list(pairs)
        self.places = {pair.name: place for pair, place in pairs.items()}
        self.options = options
        self.moments = moments
        self.memory = {pair.name: LayerMemory(i) for i, pair in enumerate(self.pairs)}
        self._carry_accumulator = CarryAccumulator(options)
        self._accumulators: dict[str, Accumulator] = {
            "dense": DenseAccumulator(options, self.memory),
            "carry": self._carry_accumulator,
        }
        self.remembered = RememberedColumns(options, moments)
        optimal = OptimalColumns(options, moments, self.memory)
        self._rule = self.remembered if options.scales_P_alone else optimal
        self._last: list[tuple[list[str], Tensor, Tensor]] = []

    @property
    def last_scaling(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name -> (alpha, beta), each (r,), of the newest re-basing."""
        return {
            name: (alpha[i], beta[i])
            for names, alpha, beta in self._last
            for i, name in enumerate(names)
        }

    @property
    def newest_layers(self) -> list[str]:
        """Names of the layers that the newest re-basing re-based."""
        return [name for names, *_ in self._last for name in names]

    def kept_tensors(self) -> list[Tensor]:
        """Everything kept between steps: products, residuals, carries, and the newest scaling."""
        kept = [factor for _, *factors in self._last for factor in factors]
        for carry in self._carries().values():
            kept += [carry.up, carry.down, carry.cut]
        for memory in self.memory.values():
            kept += [t for t in (memory.product, memory.residual) if t is not None]
        return kept

    def forget(self) -> None:
        """As if nothing had been re-based."""
        for memory in self.memory.values():
            memory.product = memory.residual = None
        self.remembered.learned.load(None)
        self._last = []

    def layer_states(self) -> dict[str, dict[str, Any]]:
        """Layer name -> what `remember` needs of it."""
        carries = self._carries()
        return {
            name: {
                "product": memory.product,
                "residual": memory.residual,
                "carry": carries[name].state() if name in carries else None,
            }
            for name, memory in self.memory.items()
        }

    def remember(self, layers: Mapping[str, Mapping[str, Any]], rebased: Collection[str]) -> None:
        """Take up what ``layers`` holds for each layer, on the layer's device.

        Args:
            layers: what `layer_states` returned.
            rebased: names of the layers whose base weights have taken in increments.
        """
        for pair in self.pairs:
            memory, saved, device = (
                self.memory[pair.name],
                layers[pair.name],
                pair.P_parameter.device,
            )
            memory.product = _copy_to(saved["product"], device)
            memory.residual = _copy_to(saved["residual"], device)
            if pair.name in rebased:
                pair.mark_rebased()
            self._remember_carry(pair, saved.get("carry"))

    def _remember_carry(self, pair: LoRAPair, saved: dict[str, Tensor] | None) -> None:
        if saved is not None:
            self._carry_accumulator.carry_of(pair).load(saved)
        elif pair.carry is not None:
            pair.carry.clear()

    def _carries(self) -> dict[str, Carry]:
        found = {pair.name: pair.carry for pair in self.pairs}
        return {name: carry for name, carry in found.items() if carry is not None}

    @torch.no_grad()
    def rebase(self, optimizer: torch.optim.Optimizer, count: int) -> None:
        """Re-base every layer that has gradients.

        Every layer is re-based whole or not at all, whatever is raised in between: first
        everything new is computed, then the base takes its increment, then the rest is written.

        Args:
            optimizer: the inner optimizer; its state and the gradients change coordinates.
            count: how many re-basings came before, part of the rounding noise's seed.
        """
        pairs = [p for p in self.pairs if self._accumulator(p).takes(p, self._columns(p))]
        self._last = []
        for batch, alpha, beta in self._rule.scalings(pairs, optimizer, self._key):
            columns = self._columns(batch.pairs[0])
            self._accumulator(batch.pairs[0]).make_room(batch.pairs, columns)
            alpha, beta = self._apply(batch, optimizer, alpha, beta, count)
            self._last.append(([pair.name for pair in batch.pairs], alpha, beta))

    def _columns(self, pair: LoRAPair) -> int:
        return increment_columns(pair, P_alone=self.options.scales_P_alone)

    def _accumulator(self, pair: LoRAPair) -> Accumulator:
        return self._accumulators[self.places[pair.name]]

    def _key(self, pair: LoRAPair) -> tuple[Any, ...]:
        return self.places[pair.name], self._accumulator(pair).key(pair)

    def _apply(
        self,
        batch: LayerBatch,
        optimizer: torch.optim.Optimizer,
        alpha: Tensor,
        beta: Tensor | None,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        """Commit one batch; returns the scaling that was applied."""
        P, Q, own = stack(batch.P), stack(batch.Q), sharding.own_rows(batch.Q[0])
        writes: list[Write] = [(batch.P, P, transfer(P, alpha, 1, _P_RANK_AXIS))]
        if beta is not None:
            writes.append((batch.Q, Q, transfer(Q, beta[:, own], 1, _Q_RANK_AXIS)))
            writes += self._moved(batch.P, optimizer, beta, _P_RANK_AXIS)
        writes += self._moved(batch.Q, optimizer, alpha[:, own], _Q_RANK_AXIS)
        writes = [(targets, old, new.to(old.dtype)) for targets, old, new in writes]

        totals = [
            new.flatten(1).sum(1, dtype=torch.promote_types(new.dtype, torch.float32))
            for *_, new in writes
        ]
        if beta is None:
            totals.append(Q.flatten(1).sum(1, dtype=totals[0].dtype))
        finite = sharding.everywhere(torch.stack(totals).isfinite().all(0), batch.P[0])
        writes = [(targets, old, _where(finite, new, old)) for targets, old, new in writes]
        alpha = _where(finite, alpha, torch.ones_like(alpha))
        if beta is None:
            columns = sharding.own_columns(Q, batch.Q[0])
            left, right = increment_of_P(P, writes[0][2], columns, finite)
            beta = torch.ones_like(alpha)
        else:
            beta = _where(finite, beta, torch.ones_like(beta))
            left, right = increment(*_factors(batch, writes, beta), alpha * beta)
        accumulator = self._accumulator(batch.pairs[0])
        accumulator.commit(batch.pairs, left, right, writes, count)
        return alpha, beta

    def _moved(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        factor: Tensor,
        axis: int,
    ) -> list[Write]:
        """The gradients and moments of one factor of every layer, under the other's scaling."""
        grads = gradients(parameters)
        stacked = stack(grads)
        moved = transfer(stacked, factor, 1, axis)
        states = moved_states(optimizer, self.moments, parameters, factor, axis)
        return [(grads, stacked, moved), *states]


def _factors(
    batch: LayerBatch, writes: Sequence[Write], beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P before and after, own rows; Q, own columns.  ``writes`` begin with these."""
    (_, P, P_new), (_, Q, Q_new), *_ = writes
    if sharding.is_sharded(batch.Q[0]):
        # The same products as of the own rows, to the bit: cheaper than sending them as well.
        Q = sharding.own_columns(Q, batch.Q[0])
        Q_new = transfer(Q, beta, 1, _Q_RANK_AXIS).to(Q.dtype)
    return P, P_new, Q, Q_new


def _copy_to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone().to(device)


def _where(layers: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(layers.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
