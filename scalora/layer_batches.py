"""Layers whose tensors can be stacked, so that one call serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.peft_layers import LoRAPair

Write = tuple[Sequence[Tensor], Tensor, Tensor]  # where to, and the stack before and after


@dataclass
class LayerBatch:
    """Layers whose tensors all have the same shapes, dtypes and hyperparameters.

    Attributes:
        group_P, group_Q: the optimizer's parameter groups of the factors.
        pairs: the layers.
        P: their factors as PEFT stores them, (m, r, ...).
        Q: likewise, (r, n, ...).
    """

    group_P: dict[str, Any]
    group_Q: dict[str, Any]
    pairs: list[LoRAPair] = field(default_factory=list)
    P: list[nn.Parameter] = field(default_factory=list)
    Q: list[nn.Parameter] = field(default_factory=list)

    def add(self, pair: LoRAPair, P: nn.Parameter, Q: nn.Parameter) -> None:
        """Add one layer."""
        self.pairs.append(pair)
        self.P.append(P)
        self.Q.append(Q)

    @property
    def learning_rates(self) -> tuple[float | Tensor, float | Tensor]:
        """Of P and of Q."""
        return host_rate(self.group_P["lr"]), host_rate(self.group_Q["lr"])


def batches_with_gradients(
    pairs: Sequence[LoRAPair],
    optimizer: torch.optim.Optimizer,
    key_of: Callable[[LoRAPair], Hashable],
) -> list[LayerBatch]:
    """The layers that take part in this step, grouped so that their tensors can be stacked.

    A layer without gradients, with a merged adapter or at learning rate 0 takes no part.

    Args:
        pairs: the layers.
        optimizer: holds their states and groups.
        key_of: what else must agree within a batch.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    batches: dict[Any, LayerBatch] = {}
    for pair in pairs:
        P, Q = pair.P_parameter, pair.Q_parameter
        if P.grad is None or Q.grad is None or pair.is_merged:
            continue
        group_P, group_Q = groups.get(id(P)), groups.get(id(Q))
        if group_P is None or group_Q is None:
            continue
        if is_zero(group_P["lr"]) or is_zero(group_Q["lr"]):
            continue
        state_P, state_Q = optimizer.state.get(P, {}), optimizer.state.get(Q, {})
        key = (
            *(P.shape, P.dtype, P.grad.dtype, Q.shape, Q.dtype, Q.grad.dtype, P.device),
            *(key_of(pair), pair.scaling, sharding.layout(P)),
            *(id(group_P), id(group_Q), _layout(state_P), _layout(state_Q)),
        )
        if (batch := batches.get(key)) is None:
            batch = batches[key] = LayerBatch(group_P, group_Q)
        batch.add(pair, P, Q)
    return list(batches.values())


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """(layers, ...), outside of autograd; of sharded tensors this process's rows."""
    return torch.stack([sharding.local(tensor) for tensor in tensors]).detach()


def thin_factors(pairs: Sequence[LoRAPair]) -> tuple[Tensor, Tensor]:
    """P (layers, m, r) and Q (layers, r, n), of sharded ones the m rows and n columns held here."""
    P, Q = [pair.P_parameter for pair in pairs], [pair.Q_parameter for pair in pairs]
    return stack(P).flatten(2), sharding.own_columns(stack(Q), Q[0])


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradient of each, all of which have one; of sharded ones this process's rows."""
    return [sharding.local(p.grad) for p in parameters if p.grad is not None]


def widened(tensor: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _layout(state: dict[str, Any]) -> tuple[Any, ...]:
    """What must agree for two parameters' states to be stacked."""
    found: list[Any] = []
    for name, value in state.items():
        if isinstance(value, Tensor):
            shape, device = value.shape, value.device
            # Of a counter on the host its value: reading that waits for nothing.
            number = float(value) if not shape and device.type == "cpu" else None
            found += (name, shape, value.dtype, device, number)
        elif isinstance(value, (int, float)):
            found += (name, value)
    return tuple(found)


def host_rate(lr: float | Tensor) -> float | Tensor:
    """A learning rate; one kept in a host tensor can be read without waiting."""
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


def is_zero(lr: float | Tensor) -> bool:
    """Whether a learning rate is 0, and is known to be without waiting."""
    rate = host_rate(lr)
    return not isinstance(rate, Tensor) and rate == 0
