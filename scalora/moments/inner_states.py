"""The inner optimizer's state of a batch: read for the coming direction, carried across.

Held by tests/moments/test_bitsandbytes_states.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.moments.history import FactorHistory
from scalora.moments.moments import Moments
from scalora.sharding.stacks import gradients, widened


def stacked_states(
    optimizer: torch.optim.Optimizer, moments: Moments, parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Return every state of a batch by torch's name for it, as the direction functions take them.

    Returns:
        Tensors (layers, ...) on the parameters' device, float32 at least; a counter that is kept on
        the host, equal within a batch, is 0-d.
    """
    states = [optimizer.state.get(p, {}) for p in parameters]
    device = parameters[0].device
    # A fill does not wait for the device.
    counters = {
        name: torch.full((), float(value), device=device)
        for name, value in states[0].items()
        if _is_on_host_alone(value, device)
    }
    tensors = [{k: v for k, v in state.items() if k not in counters} for state in states]
    return counters | moments.stacked(tensors, device)


def gradient_and_direction(
    optimizer: torch.optim.Optimizer,
    moments: Moments,
    parameters: Sequence[nn.Parameter],
    stacks: tuple[Tensor, Tensor],
    group: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Return the descent gradient of one factor of every layer, and the coming step's direction.

    Args:
        optimizer: the inner optimizer.
        moments: the entry of its class, with a direction.
        parameters: the factor of every layer of a batch.
        stacks: parameters and gradients, (layers, *parameter shape) each; the rows held here.
        group: their parameter group.

    Returns:
        Both (layers, *parameter shape), float32 at least.
    """
    assert moments.direction is not None
    parameter, gradient = map(widened, stacks)
    gradient = -gradient if group.get("maximize") else gradient
    state = stacked_states(optimizer, moments, parameters)
    return gradient, moments.direction(parameter, gradient, state, group)


def factor_history(
    optimizer: torch.optim.Optimizer,
    moments: Moments,
    parameters: Sequence[nn.Parameter],
    axis: int,
) -> FactorHistory:
    """Return one factor of every layer of a batch, with its gradients and state.

    Args:
        optimizer: the inner optimizer.
        moments: the entry of its class.
        parameters: the factor of every layer, with gradients.
        axis: which axis of (layers, *parameter shape) runs over the r columns.

    Raises:
        TypeError: a state that is not known, or that cannot be carried across.
    """
    states = [optimizer.state.get(p, {}) for p in parameters]
    first, name_of_class = parameters[0], type(optimizer).__name__
    for name, value in states[0].items():
        if isinstance(value, Tensor) and name not in moments.tensor_names:
            raise TypeError(
                f"{name_of_class} keeps a state {name!r} whose degree is not known; "
                "nothing was changed. Register it with scalora.register_moments."
            )
        if isinstance(value, Tensor) and value.ndim and not _spread_alike(value, first):
            raise TypeError(
                f"{name_of_class}'s state {name!r} is not sharded as its parameter is: "
                "it cannot be carried across a re-basing. Nothing was changed."
            )
    own, grads = [sharding.local(p) for p in parameters], gradients(parameters)
    columns, others = moments.kept(states, own[0], axis, name_of_class)
    return FactorHistory.of(own, grads, columns, others, axis)


def _spread_alike(value: Tensor, parameter: Tensor) -> bool:
    if not sharding.is_sharded(parameter):
        return True
    return value.shape == parameter.shape and sharding.layout(value) == sharding.layout(parameter)


def _is_on_host_alone(value: Any, device: torch.device) -> bool:
    """Return whether this is a counter: a number, or a 0-d tensor that is not on the device."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.device != device
    return isinstance(value, (int, float))
