"""Which scaling each rule chooses for the layers that take part in a re-basing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scalora import sharding
from scalora.moments import Moments
from scalora.moments.inner_states import stacked_states
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair
from scalora.rebasing.accumulators import LayerMemory
from scalora.rebasing.batches import LayerBatch, batches_with_gradients
from scalora.scaling import rules
from scalora.scaling.memory import bounded_age, leak
from scalora.scaling.quadratic import QuadraticModel, quadratic_model, solver_dtype
from scalora.sharding.stacks import gradients, stack, widened
from scalora.step_length.learned_steps import Count, LearnedSteps
from scalora.step_length.rates import host_rate

Scaling = tuple[LayerBatch, Tensor, Tensor | None]
"""Layers of one shape, alpha (layers, r), and beta likewise; no beta: Q stays as it is."""

Key = Callable[[LoRAPair], Hashable]


class RememberedColumns:
    """Scales P alone, so that the adapter remembers its last K steps: the rules leak and age.

    Args:
        options: the user's.
        moments: how the optimizer's state depends on the gradient.

    Attributes:
        learned: what each layer has learned since it was last re-based.
    """

    def __init__(self, options: RebasingOptions, moments: Moments) -> None:
        self.options = options
        self.moments = moments
        self.learned = LearnedSteps()

    def scalings(
        self, pairs: Sequence[LoRAPair], optimizer: torch.optim.Optimizer, key_of: Key
    ) -> Iterator[Scaling]:
        """Yield the scaling of every batch of layers; it counts as done when the next is asked for.

        Args:
            pairs: the layers.
            optimizer: the inner optimizer, with gradients.
            key_of: what must agree within a batch.
        """
        groups = {
            id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]
        }

        def steps(pair: LoRAPair) -> Count:
            return self.learned.since(pair.name, groups[id(pair.P_parameter)])

        def key(pair: LoRAPair) -> Hashable:
            # Layers that have learned for equally long share one alpha, a number.
            own = steps(pair) if id(pair.P_parameter) in groups else 0.0
            return key_of(pair), None if isinstance(own, Tensor) else own

        least = 1 / self.options.bound  # a column must not vanish
        for batch in batches_with_gradients(pairs, optimizer, key):
            counts = [steps(pair) for pair in batch.pairs]
            if self.options.resolved_rule == "age":
                bounded = self._bounded(batch, optimizer, groups[id(batch.P[0])])
                yield batch, bounded.clamp_min(least), None
            elif any(isinstance(count, Tensor) or count > 0 for count in counts):
                yield batch, self._leaked(batch, counts).clamp_min(least), None
            self.learned.mark([pair.name for pair in batch.pairs], groups[id(batch.P[0])])

    def _leaked(self, batch: LayerBatch, counts: Sequence[Count]) -> Tensor:
        P, memory = batch.P[0], self.options.memory_steps
        shape, dtype = (len(batch.P), P.shape[1]), solver_dtype(P.device)
        first = counts[0]
        if not isinstance(first, Tensor):  # a fill does not wait for the device
            return torch.full(shape, float(leak(memory, first)), dtype=dtype, device=P.device)
        alphas = [torch.as_tensor(leak(memory, count), device=P.device) for count in counts]
        return torch.stack(alphas).to(dtype).unsqueeze(-1).expand(shape)

    def _bounded(self, batch: LayerBatch, optimizer: torch.optim.Optimizer, group: int) -> Tensor:
        P, rows = widened(stack(batch.P)).flatten(2), sharding.rows_of(batch.P[0])
        _, direction = gradient_and_direction(optimizer, self.moments, batch.P, batch.group_P)
        squares = torch.stack([P.square().sum(1), direction.flatten(2).square().sum(1)])
        columns, moves = rows.sum(squares.to(solver_dtype(P.device)))
        step = self.learned.peak(group, host_rate(batch.group_P["lr"])) * moves.mean(-1).sqrt()
        return bounded_age(columns.sqrt(), step, self.options.memory_steps)


class OptimalColumns:
    """Scales both factors by the optimum of the coming step: exact, paper, scalar, direction.

    Args:
        options: the user's.
        moments: how the optimizer's state depends on the gradient.
        memory: layer name -> where L times the learning rate is kept.
    """

    def __init__(
        self, options: RebasingOptions, moments: Moments, memory: Mapping[str, LayerMemory]
    ) -> None:
        self.options = options
        self.moments = moments
        self.memory = memory

    def scalings(
        self, pairs: Sequence[LoRAPair], optimizer: torch.optim.Optimizer, key_of: Key
    ) -> Iterator[Scaling]:
        """Yield the scaling of every batch of layers, as `RememberedColumns.scalings` does."""
        batches = batches_with_gradients(pairs, optimizer, key_of)
        models = [self._model(batch, optimizer) for batch in batches]
        for batch, model, x in zip(batches, models, self._solve(models), strict=True):
            alpha, beta, products = self._scaling(batch, optimizer, model, x)
            yield batch, alpha, beta
            for pair, product in zip(batch.pairs, products, strict=True):
                self.memory[pair.name].product = product

    def _model(self, batch: LayerBatch, optimizer: torch.optim.Optimizer) -> QuadraticModel:
        """The model that the rule solves."""
        if self.options.resolved_rule == "direction":
            return self._step_model(batch, optimizer)
        grad_P, grad_Q = stack(gradients(batch.P)), stack(gradients(batch.Q))
        return _quadratic_model(batch, grad_P, grad_Q, grad_P, grad_Q)

    def _step_model(self, batch: LayerBatch, optimizer: torch.optim.Optimizer) -> QuadraticModel:
        """The model of the step that the inner optimizer is about to take."""
        grad_P, direction_P = gradient_and_direction(
            optimizer, self.moments, batch.P, batch.group_P
        )
        grad_Q, direction_Q = gradient_and_direction(
            optimizer, self.moments, batch.Q, batch.group_Q
        )
        return _quadratic_model(batch, grad_P, grad_Q, direction_P, direction_Q)

    def _solve(self, models: Sequence[QuadraticModel]) -> list[Tensor]:
        """The rule's weights of every model, all layers of one rank and device in one call."""
        together: dict[Any, list[int]] = {}
        for i, model in enumerate(models):
            together.setdefault((model.rank, model.lam.device), []).append(i)
        solutions: dict[int, Tensor] = {}
        for indices in together.values():
            stacked = QuadraticModel(
                torch.cat([models[i].H for i in indices]),
                torch.cat([models[i].lam for i in indices]),
            )
            x = rules.solve(stacked, self.options.resolved_rule)
            sizes = [models[i].lam.shape[0] for i in indices]
            solutions.update(zip(indices, x.split(sizes), strict=True))
        return [solutions[i] for i in range(len(models))]

    def _scaling(
        self, batch: LayerBatch, optimizer: torch.optim.Optimizer, model: QuadraticModel, x: Tensor
    ) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """alpha, beta: (layers, r), and every layer's product of L and the learning rate."""
        lr_P, lr_Q = batch.learning_rates
        rate = (lr_P * lr_Q) ** 0.5
        plain = rules.plain_weights(model, lr_P / rate, lr_Q / rate)
        products: Sequence[Tensor | None] = [self.memory[pair.name].product for pair in batch.pairs]
        lipschitz = self.options.lipschitz
        degree = 1
        if self.options.resolved_rule == "direction":
            degree = self.moments.direction_degree
            product = rules.matching_lipschitz(x, plain, degree, model, degree)
        elif lipschitz is None or isinstance(lipschitz, str):
            product = self._calibrated(batch, optimizer, model, x, plain, products)
            products = product.unbind()
        else:
            product = torch.ones_like(x[..., 0]) * (lipschitz * rate)
        x = x * rate / product.unsqueeze(-1)
        alpha, beta = rules.scaling_from_weights(model, x, lr_P, lr_Q, degree, self.options.bound)
        return alpha, beta, products

    def _calibrated(
        self,
        batch: LayerBatch,
        optimizer: torch.optim.Optimizer,
        model: QuadraticModel,
        x: Tensor,
        plain: Tensor,
        products: Sequence[Tensor | None],
    ) -> Tensor:
        """What is held of L times the learning rate, where nothing is yet what matches: (layers,).

        An optimizer that was registered without a direction is taken for gradient descent.
        """
        nothing = x.new_full((), torch.nan)
        held = torch.stack([nothing if product is None else product for product in products])
        if held.device.type == "cpu" and not bool(held.isnan().any()):  # looking costs nothing here
            return held
        step, step_degree = model, 1
        if self.moments.direction is not None:
            step, step_degree = self._step_model(batch, optimizer), self.moments.direction_degree
        now = rules.matching_lipschitz(x, plain, 1, step, step_degree)
        return torch.where(held.isnan(), now, held)


def gradient_and_direction(
    optimizer: torch.optim.Optimizer,
    moments: Moments,
    parameters: Sequence[torch.nn.Parameter],
    group: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Return the descent gradient of one factor of every layer, and the coming step's direction.

    Both (layers, *parameter shape), float32 at least; of sharded factors the rows held here.
    """
    assert moments.direction is not None
    grad = widened(stack(gradients(parameters)))
    grad = -grad if group.get("maximize") else grad
    state = stacked_states(optimizer, moments, parameters)
    return grad, moments.direction(widened(stack(parameters)), grad, state, group)


def _quadratic_model(
    batch: LayerBatch, grad_P: Tensor, grad_Q: Tensor, direction_P: Tensor, direction_Q: Tensor
) -> QuadraticModel:
    """From stacks as PEFT stores them, (layers, m, r, ...) and (layers, r, n, ...), own rows."""

    def columns(stacked: Tensor) -> Tensor:
        return sharding.own_columns(stacked, batch.Q[0]).mT

    thin_P, thin_Q = grad_P.flatten(2), columns(grad_Q)
    same = direction_P is grad_P
    return quadratic_model(
        stack(batch.P).flatten(2),
        columns(stack(batch.Q)),
        thin_P,
        thin_Q,
        thin_P if same else direction_P.flatten(2),
        thin_Q if same else columns(direction_Q),
        batch.pairs[0].scaling,
        sharding.rows_of(batch.P[0]),
    )
