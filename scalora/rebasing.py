"""One re-basing of all LoRA layers: read, solve, fold, carry the moments; all or nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scalora import sharding
from scalora.accumulators import (
    Accumulator,
    CarryAccumulator,
    DenseAccumulator,
    LayerMemory,
    increment,
    increment_columns,
)
from scalora.carry import Carry
from scalora.fold import noise_seed
from scalora.inner_states import moved_states, stacked_states
from scalora.layer_batches import (
    LayerBatch,
    Write,
    batches_with_gradients,
    gradients,
    stack,
    widened,
)
from scalora.moments import Moments, transfer
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair
from scalora.renewal import due_columns, renewed
from scalora.scaling import rules
from scalora.scaling.quadratic import QuadraticModel, quadratic_model

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
        dense = DenseAccumulator(options, self.memory)
        self._carry_accumulator = CarryAccumulator(options, dense)
        self._accumulators: dict[str, Accumulator] = {
            "dense": dense,
            "carry": self._carry_accumulator,
        }
        self._last: list[tuple[list[str], Tensor, Tensor]] = []

    @property
    def folds(self) -> bool:
        """Whether increments go into base weights, of any layer."""
        full = self.options.when_full == "fold" and bool(self.pairs)
        return full or "dense" in self.places.values()

    @property
    def last_scaling(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name -> (alpha, beta), each (r,), of the newest re-basing."""
        return {
            name: (alpha[i], beta[i])
            for names, alpha, beta in self._last
            for i, name in enumerate(names)
        }

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
        pairs = [p for p in self.pairs if self._accumulator(p).takes(p, increment_columns(p))]
        batches = batches_with_gradients(pairs, optimizer, self._key)
        models = [self._model(batch, optimizer) for batch in batches]
        self._last = []
        for batch, model, x in zip(batches, models, self._solve(models), strict=True):
            alpha, beta, products = self._scaling(batch, optimizer, model, x)
            columns = increment_columns(batch.pairs[0])
            self._accumulator(batch.pairs[0]).make_room(batch.pairs, columns, count)
            alpha, beta = self._apply(batch, optimizer, alpha, beta, count)
            for pair, product in zip(batch.pairs, products, strict=True):
                self.memory[pair.name].product = product
            self._last.append(([pair.name for pair in batch.pairs], alpha, beta))

    @torch.no_grad()
    def renew(self, optimizer: torch.optim.Optimizer, before: int, now: int, count: int) -> bool:
        """Freeze the columns whose time is over, and begin new ones; whether there were any.

        Args:
            optimizer: the inner optimizer, which has just stepped.
            before: the number of steps done when this was called last.
            now: the number of steps done.
            count: as for `rebase`.
        """
        due = {
            rank: due_columns(rank, self.options.lifetime, before, now)
            for rank in {pair.rank for pair in self.pairs}
        }
        pairs = [
            p for p in self.pairs if due[p.rank] and self._accumulator(p).takes(p, len(due[p.rank]))
        ]
        batches = batches_with_gradients(pairs, optimizer, self._key) if pairs else []
        for batch in batches:
            accumulator, columns = self._accumulator(batch.pairs[0]), due[batch.pairs[0].rank]
            accumulator.make_room(batch.pairs, len(columns), count)
            indices = [self.memory[pair.name].index for pair in batch.pairs]
            seeds = [noise_seed(self.options.seed, count, index, 1) for index in indices]
            left, right, writes = renewed(batch, optimizer, self.moments, columns, seeds)
            accumulator.commit(batch.pairs, left, right, writes, count)
        return bool(batches)

    def _accumulator(self, pair: LoRAPair) -> Accumulator:
        return self._accumulators[self.places[pair.name]]

    def _key(self, pair: LoRAPair) -> tuple[Any, ...]:
        return self.places[pair.name], self._accumulator(pair).key(pair)

    def _model(self, batch: LayerBatch, optimizer: torch.optim.Optimizer) -> QuadraticModel:
        """The model that the rule solves."""
        if self.options.resolved_rule == "direction":
            return self._step_model(batch, optimizer)
        grad_P, grad_Q = stack(gradients(batch.P)), stack(gradients(batch.Q))
        return _quadratic_model(batch, grad_P, grad_Q, grad_P, grad_Q)

    def _step_model(self, batch: LayerBatch, optimizer: torch.optim.Optimizer) -> QuadraticModel:
        """The model of the step that the inner optimizer is about to take."""
        direction = self.moments.direction
        assert direction is not None
        arguments = []
        for parameters, group in ((batch.P, batch.group_P), (batch.Q, batch.group_Q)):
            grad = widened(stack(gradients(parameters)))
            grad = -grad if group.get("maximize") else grad
            state = stacked_states(optimizer, self.moments, parameters)
            arguments.append((grad, direction(widened(stack(parameters)), grad, state, group)))
        (grad_P, direction_P), (grad_Q, direction_Q) = arguments
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

    def _apply(
        self,
        batch: LayerBatch,
        optimizer: torch.optim.Optimizer,
        alpha: Tensor,
        beta: Tensor,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        """Commit one batch; returns the scaling that was applied."""
        P, Q, own = stack(batch.P), stack(batch.Q), sharding.own_rows(batch.Q[0])
        writes: list[Write] = [
            (batch.P, P, transfer(P, alpha, 1, _P_RANK_AXIS)),
            (batch.Q, Q, transfer(Q, beta[:, own], 1, _Q_RANK_AXIS)),
        ]
        for parameters, factor, axis in (
            (batch.P, beta, _P_RANK_AXIS),
            (batch.Q, alpha[:, own], _Q_RANK_AXIS),
        ):
            grads = gradients(parameters)
            stacked = stack(grads)
            writes.append((grads, stacked, transfer(stacked, factor, 1, axis)))
            writes += moved_states(optimizer, self.moments, parameters, factor, axis)
        writes = [(targets, old, new.to(old.dtype)) for targets, old, new in writes]

        totals = [
            new.flatten(1).sum(1, dtype=torch.promote_types(new.dtype, torch.float32))
            for *_, new in writes
        ]
        finite = sharding.everywhere(torch.stack(totals).isfinite().all(0), batch.P[0])
        writes = [(targets, old, _where(finite, new, old)) for targets, old, new in writes]
        alpha, beta = (_where(finite, f, torch.ones_like(f)) for f in (alpha, beta))

        factors = _factors(batch, writes, beta)
        left, right = increment(*factors, alpha * beta)
        accumulator = self._accumulator(batch.pairs[0])
        accumulator.commit(batch.pairs, left, right, writes, count)
        return alpha, beta


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
