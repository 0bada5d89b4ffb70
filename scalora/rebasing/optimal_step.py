"""The rules that scale both factors by the optimum of the coming step: exact, paper and others.

Held by tests/optimizer/test_optimizer.py and tests/rebasing/test_optimal_step.py.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalora import sharding
from scalora.moments import Moments
from scalora.moments.history import FactorHistory
from scalora.options import RebasingOptions
from scalora.rebasing.batches import LayerBatch, at_once, places
from scalora.rebasing.coordinates import P_RANK_AXIS, Q_RANK_AXIS, Rebased, with_both_scaled
from scalora.scaling.quadratic import QuadraticModel, joined, quadratic_model, solver_dtype
from scalora.scaling.rules import ColumnScaling, column_scaling


class OptimalStep:
    """Brings the coming step closest to that of full fine-tuning (docs/mathematics.md).

    Args:
        options: the user's.
        moments: how the optimizer's state depends on the gradient.
        lipschitz_lr: layer name -> where L times the learning rate is kept, 0-d.
    """

    def __init__(
        self, options: RebasingOptions, moments: Moments, lipschitz_lr: MutableMapping[str, Tensor]
    ) -> None:
        self.options = options
        self.moments = moments
        self.held = HeldLipschitz(lipschitz_lr)

    step_key = None  # nothing more must agree within a batch

    def rebased(
        self, batches: Sequence[LayerBatch], optimizer: torch.optim.Optimizer
    ) -> Iterator[Rebased]:
        """Yield the batches in new coordinates.

        The product of L and the learning rate of its layers is held from when the next is asked
        for.
        """
        for together in at_once(batches):
            histories = [self._histories(batch, optimizer) for batch in together]
            held = self.held.of(together) if self._holds else None
            scaling = self._scaling(together, histories, optimizer, held)
            found = with_both_scaled(together, histories, scaling.alpha, scaling.beta)
            matched = held is not None and not held.is_known
            for rebased, layers in zip(found, places(together), strict=True):
                yield rebased
                if matched:
                    self.held.hold(rebased.batch, scaling.lipschitz_lr[layers])
            if matched:
                self.held.settle(together, scaling.lipschitz_lr)

    @property
    def _holds(self) -> bool:
        """Return whether L times the learning rate is matched once, and held from then on."""
        return self.options.resolved_rule != "direction" and self._lipschitz is None

    @property
    def _lipschitz(self) -> float | None:
        """L where the user gives it; without it the length of the step is matched."""
        lipschitz = self.options.lipschitz
        return None if lipschitz is None or isinstance(lipschitz, str) else float(lipschitz)

    def _histories(
        self, batch: LayerBatch, optimizer: torch.optim.Optimizer
    ) -> tuple[FactorHistory, FactorHistory]:
        return (
            self.moments.history(optimizer, batch.P, P_RANK_AXIS),
            self.moments.history(optimizer, batch.Q, Q_RANK_AXIS),
        )

    def _scaling(
        self,
        batches: Sequence[LayerBatch],
        histories: _Histories,
        optimizer: torch.optim.Optimizer,
        held: Held | None,
    ) -> ColumnScaling:
        """Return the scaling of all layers, by one call."""

        def step_model() -> QuadraticModel:
            """Return the model of the step that the inner optimizer is about to take."""
            parts = zip(batches, histories, strict=True)
            return joined([self._step_model(*part, optimizer) for part in parts])

        if self.options.resolved_rule == "direction":  # matched anew at every re-basing
            return self._solved(batches, step_model())
        parts = zip(batches, histories, strict=True)
        model = joined([_gradient_model(*part) for part in parts])
        if held is None:
            return self._solved(batches, model, lipschitz=self._lipschitz)
        if held.is_known:
            return self._solved(batches, model, lipschitz_lr=held.lipschitz_lr)
        # An optimizer that was registered without a direction is taken for gradient descent.
        step = None if self.moments.direction is None else step_model
        return self._solved(batches, model, held=held.lipschitz_lr, step_model=step)

    def _solved(
        self, batches: Sequence[LayerBatch], model: QuadraticModel, **magnitude: Any
    ) -> ColumnScaling:
        rule, bound, lr = self.options.resolved_rule, self.options.bound, batches[0].learning_rates
        return column_scaling(model, rule, lr, bound=bound, **magnitude)

    def _step_model(
        self,
        batch: LayerBatch,
        histories: tuple[FactorHistory, FactorHistory],
        optimizer: torch.optim.Optimizer,
    ) -> QuadraticModel:
        factors = (batch.P, batch.group_P), (batch.Q, batch.group_Q)
        (grad_P, direction_P), (grad_Q, direction_Q) = (
            self.moments.gradient_and_direction(
                optimizer, parameters, (history.parameter, history.gradient), group
            )
            for (parameters, group), history in zip(factors, histories, strict=True)
        )
        degree = self.moments.direction_degree
        return _model(batch, histories, (grad_P, grad_Q), (direction_P, direction_Q), degree)


_Histories = Sequence[tuple[FactorHistory, FactorHistory]]


def _gradient_model(
    batch: LayerBatch, histories: tuple[FactorHistory, FactorHistory]
) -> QuadraticModel:
    """Return the model of a step along the gradients."""
    gradients = histories[0].gradient, histories[1].gradient
    return _model(batch, histories, gradients, gradients, 1)


def _model(
    batch: LayerBatch,
    histories: tuple[FactorHistory, FactorHistory],
    gradients: tuple[Tensor, Tensor],
    directions: tuple[Tensor, Tensor],
    degree: int,
) -> QuadraticModel:
    """Return the model of stacks (layers, m, r, ...) and (layers, r, n, ...), as PEFT has them."""

    def columns(stacked: Tensor) -> Tensor:
        return sharding.own_columns(stacked, batch.Q[0]).mT

    thin_P, thin_Q = gradients[0].flatten(2), columns(gradients[1])
    same = directions[0] is gradients[0]
    return quadratic_model(
        histories[0].parameter.flatten(2),
        columns(histories[1].parameter),
        thin_P,
        thin_Q,
        thin_P if same else directions[0].flatten(2),
        thin_Q if same else columns(directions[1]),
        batch.pairs[0].scaling,
        degree,
        sharding.rows_of(batch.P[0]),
    )


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
