"""Layers whose tensors can be stacked, so that one call serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.peft_layers import LoRAPair
from scalora.sharding.stacks import stack
from scalora.step_length.rates import host_rate, is_zero


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


def thin_factors(pairs: Sequence[LoRAPair]) -> tuple[Tensor, Tensor]:
    """P (layers, m, r) and Q (layers, r, n), of sharded ones the m rows and n columns held here."""
    P, Q = [pair.P_parameter for pair in pairs], [pair.Q_parameter for pair in pairs]
    return stack(P).flatten(2), sharding.own_columns(stack(Q), Q[0])


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
