"""The rules that bound the length of P's columns, for ablations: age and expected.

Held by tests/rebasing/test_forgetting.py.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import Tensor

from scalora import sharding
from scalora.moments import Moments
from scalora.moments.history import widened
from scalora.options import RebasingOptions
from scalora.rebasing.batches import LayerBatch, at_once
from scalora.rebasing.coordinates import Q_RANK_AXIS, Rebased, with_P_scaled
from scalora.scaling.memory import bounded, descent, leak, longest, shares
from scalora.scaling.quadratic import solver_dtype
from scalora.step_length.rates import LearnedSteps, host_rate

_AVERAGED_STEPS = 50


class BoundedLengths:
    """Bounds each column of P by the length that K steps of the inner optimizer make.

    Or, with ``rule="expected"``, by the theorem's share of r times that length.

    Args:
        options: the user's.
        moments: how the optimizer's state depends on the gradient.
        learned: knows the highest learning rates.
        descents: layer name -> (2, r), where the mean of `descent` over batches is kept.
    """

    def __init__(
        self,
        options: RebasingOptions,
        moments: Moments,
        learned: LearnedSteps,
        descents: MutableMapping[str, Tensor],
    ) -> None:
        self.options = options
        self.moments = moments
        self.learned = learned
        self.descents = descents

    step_key = None  # nothing more must agree within a batch

    def rebased(
        self, batches: Sequence[LayerBatch], optimizer: torch.optim.Optimizer
    ) -> Iterator[Rebased]:
        """Yield the batches in new coordinates.

        What was measured of a batch is kept when the next is asked for.
        """
        for together in at_once(batches):
            histories = [
                self.moments.history(optimizer, batch.Q, Q_RANK_AXIS) for batch in together
            ]
            alphas, descents = zip(*[self._bounds(b, optimizer) for b in together], strict=True)
            alpha = torch.cat(alphas).clamp_min(1 / self.options.bound)  # no column vanishes
            rebased = with_P_scaled(together, histories, alpha)
            for found, means in zip(rebased, descents, strict=True):
                yield found
                if means is not None:
                    names = [pair.name for pair in found.batch.pairs]
                    self.descents.update(zip(names, means, strict=True))

    def _bounds(
        self, batch: LayerBatch, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, Tensor | None]:
        """Return alpha, (layers, r), and, if the rule needs them, `_descents`."""
        parameter, rows = sharding.stack(batch.P), sharding.rows_of(batch.P[0])
        stacks = parameter, sharding.stack(sharding.gradients(batch.P))
        _, moves = self.moments.gradient_and_direction(optimizer, batch.P, stacks, batch.group_P)
        P = widened(parameter).flatten(2)
        squares = torch.stack([P.square().sum(1), moves.flatten(2).square().sum(1)])
        columns, moved = rows.sum(squares.to(solver_dtype(P.device)))
        lengths = columns.sqrt()
        rate = self.learned.peak(batch.index_P, host_rate(batch.group_P["lr"]))
        most = longest(rate * moved.mean(-1).sqrt(), self.options.memory_steps)
        if self.options.resolved_rule == "age":
            return bounded(lengths, most), None
        means = self._descents(batch, optimizer, lengths)
        return bounded(lengths, most * shares(means, self.moments.direction_degree)), means

    def _descents(
        self, batch: LayerBatch, optimizer: torch.optim.Optimizer, lengths: Tensor
    ) -> Tensor:
        """Return the means of the descents, with this batch's: (layers, 2, r).

        A column of which this batch says nothing keeps its own.
        """
        gradients = sharding.stack(sharding.gradients(batch.Q))
        # Without a gradient of its own the direction is that of the batches before.
        stacks = sharding.stack(batch.Q), torch.zeros_like(gradients)
        _, earlier = self.moments.gradient_and_direction(optimizer, batch.Q, stacks, batch.group_Q)
        gradients = -gradients if batch.group_Q.get("maximize") else gradients
        g, u = widened(gradients).flatten(2), earlier.flatten(2)
        sums = torch.stack([(g * u).sum(-1), u.square().sum(-1)]).to(lengths.dtype)
        products, squares = sharding.rows_of(batch.Q[0]).gathered(sums, 2, batch.rank)
        new = descent(lengths, products, squares, self.moments.direction_degree)
        zero = torch.zeros_like(new[0])
        old = torch.stack([self.descents.get(pair.name, zero) for pair in batch.pairs])
        weight = 1 - leak(_AVERAGED_STEPS, self.options.interval_steps)
        return torch.where(new.isfinite().all(-2, keepdim=True), old.lerp(new, weight), old)
