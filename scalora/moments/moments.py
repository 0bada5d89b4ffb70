"""An inner optimizer's state: how it depends on the gradient, is read and is carried across.

A state that is homogeneous of degree k in the gradient history moves with a re-basing: column j
of P's is multiplied by ``beta_j**k`` and of Q's by ``alpha_j**k`` (docs/mathematics.md, moments).

Held by tests/moments/test_moments.py and tests/moments/test_bitsandbytes_states.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.moments.directions import Direction
from scalora.moments.history import Averaged, Column, FactorHistory, Kept, widened

States = Sequence[Mapping[str, Any]]
"""``optimizer.state`` of one factor of each layer of a batch; all have the same entries."""


@dataclass(frozen=True)
class Moments:
    """Everything that a re-basing has to know of one optimizer class.

    Attributes:
        degrees: state name -> degree of homogeneity in the gradient history.
        direction: computes the coming step's direction (`scalora.register_moments`); None if
            unknown.
        direction_degree: 0 if the step does not grow with the gradient (Adam), 1 if it does (SGD).
        partners: pairs of states that factor one second moment (Adafactor).
        linear_in_rate: whether the step is proportional to the learning rate, weight decay and all.
    """

    degrees: Mapping[str, int]
    direction: Direction | None = None
    direction_degree: int = 0
    partners: Mapping[str, str] | None = None
    linear_in_rate: bool = True

    @property
    def tensor_names(self) -> set[str]:
        """The optimizer's names of its tensors."""
        return set(self.degrees)

    @property
    def can_be_sharded(self) -> bool:
        """Return whether every shard of a state depends on its own shard of the gradients alone."""
        return self.partners is None

    def stacked_states(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> dict[str, Tensor]:
        """Return every state of a batch by torch's name for it, as the direction functions take it.

        Returns:
            Tensors (layers, ...) on the parameters' device, float32 at least; a counter that is
            kept on the host, equal within a batch, is 0-d.
        """
        states = [optimizer.state.get(p, {}) for p in parameters]
        device = parameters[0].device
        # A fill does not wait for the device.
        counters = {
            name: torch.full((), float(value), dtype=torch.float32, device=device)
            for name, value in states[0].items()
            if _is_on_host_alone(value, device)
        }
        others = [{k: v for k, v in state.items() if k not in counters} for state in states]
        return counters | self.stacked(others, device)

    def gradient_and_direction(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        stacks: tuple[Tensor, Tensor],
        group: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Return one factor's descent gradient and its coming direction, of every layer.

        Only where the direction is known.

        Args:
            optimizer: the inner optimizer.
            parameters: the factor of every layer of a batch.
            stacks: parameters and gradients, (layers, *parameter shape) each; the rows held here.
            group: their parameter group.

        Returns:
            Both (layers, *parameter shape), float32 at least.
        """
        assert self.direction is not None
        parameter, gradient = map(widened, stacks)
        gradient = -gradient if group.get("maximize") else gradient
        state = self.stacked_states(optimizer, parameters)
        return gradient, self.direction(parameter, gradient, state, group)

    def history(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], axis: int
    ) -> FactorHistory:
        """Return one factor of every layer of a batch, with its gradients and state.

        Args:
            optimizer: the inner optimizer.
            parameters: the factor of every layer, with gradients.
            axis: which axis of (layers, *parameter shape) runs over the r columns.

        Raises:
            TypeError: a state that is not known, or that cannot be carried across.
        """
        states = [optimizer.state.get(p, {}) for p in parameters]
        first, name_of_class = parameters[0], type(optimizer).__name__
        for name, value in states[0].items():
            if isinstance(value, Tensor) and name not in self.tensor_names:
                raise TypeError(
                    f"{name_of_class} keeps a state {name!r} whose degree is not known; "
                    "nothing was changed. Register it with scalora.register_moments."
                )
            if isinstance(value, Tensor) and value.ndim and not _spread_alike(value, first):
                raise TypeError(
                    f"{name_of_class}'s state {name!r} is not sharded as its parameter is: "
                    "it cannot be carried across a re-basing. Nothing was changed."
                )
        own, grads = [sharding.local(p) for p in parameters], sharding.gradients(parameters)
        columns, others = self.kept(states, own[0], axis, name_of_class)
        return FactorHistory.of(own, grads, columns, others, axis)

    def stacked(self, states: States, device: torch.device) -> dict[str, Tensor]:
        """Return the state tensors by torch's names: (layers, ...), float32 at least.

        Args:
            states: of a batch.
            device: the parameters'.
        """
        return {
            name: widened(sharding.stack([state[name] for state in states]))
            for name, value in states[0].items()
            if isinstance(value, Tensor)
        }

    def kept(
        self, states: States, parameter: Tensor, axis: int, optimizer: str
    ) -> tuple[list[Column], list[Kept]]:
        """Return the state that is not of degree 0: what runs over the r columns, and the rest.

        Args:
            states: of one factor of every layer of a batch.
            parameter: the first of them; of sharded ones the rows held here.
            axis: which axis of (layers, *parameter shape) runs over the r columns.
            optimizer: the name of its class, for messages.

        Raises:
            TypeError: a state that cannot be carried across.
        """
        columns: list[Column] = []
        others: list[Kept] = []
        rank = parameter.shape[axis - 1]
        for name, value in states[0].items():
            if not isinstance(value, Tensor) or self.degrees[name] == 0:
                continue
            targets = [sharding.local(state[name]) for state in states]
            first, degree = targets[0], self.degrees[name]
            if not first.is_floating_point():
                raise TypeError(
                    f"{optimizer}'s state {name!r} is {first.dtype}: codes cannot be carried "
                    "across a re-basing as if they were numbers. Nothing was changed."
                )
            if first.ndim >= axis and first.shape[axis - 1] == rank:
                columns.append(Column(targets, degree))
            elif (partner := (self.partners or {}).get(name)) is not None:
                others.append(Averaged(targets, [s[partner] for s in states], degree, axis))
            else:
                raise TypeError(
                    f"{optimizer}'s state {name!r} has shape {tuple(first.shape)}, "
                    f"which does not run over the {rank} columns of its parameter: it "
                    "cannot be carried across a re-basing. Nothing was changed."
                )
        return columns, others


def _spread_alike(value: Tensor, parameter: Tensor) -> bool:
    if not sharding.is_sharded(parameter):
        return True
    return value.shape == parameter.shape and sharding.layout(value) == sharding.layout(parameter)


def _is_on_host_alone(value: Any, device: torch.device) -> bool:
    """Return whether this is a counter: a number, or a 0-d tensor that is not on the device."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.device != device
    return isinstance(value, (int, float))
