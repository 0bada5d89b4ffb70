"""The inner optimizer's state: read for the coming direction, carried across a re-basing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.moments import Moments, transfer, transfer_reduced
from scalora.moments.bitsandbytes import BitsandbytesMoments, decoded_states, moved_tensors
from scalora.sharding.stacks import Write, stack, widened


def stacked_states(
    optimizer: torch.optim.Optimizer, moments: Moments, parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Every state of a batch by torch's name for it, as the direction functions take them.

    Returns:
        Tensors (layers, ...) on the parameters' device, float32 at least; a counter that is kept on
        the host, equal within a batch, is 0-d.
    """
    states = [optimizer.state.get(p, {}) for p in parameters]
    device = parameters[0].device
    # A fill does not wait for the device.
    stacked = {
        name: torch.full((), float(value), device=device)
        for name, value in states[0].items()
        if _is_on_host_alone(value, device)
    }
    if isinstance(moments, BitsandbytesMoments):
        return stacked | decoded_states(moments, states, device)
    for name, value in states[0].items():
        if isinstance(value, Tensor) and name not in stacked:
            stacked[name] = widened(stack([state[name] for state in states]))
    return stacked


def moved_states(
    optimizer: torch.optim.Optimizer,
    moments: Moments,
    parameters: Sequence[nn.Parameter],
    factor: Tensor,
    axis: int,
) -> list[Write]:
    """(targets, old, new) of everything in the state that is not of degree 0.

    Args:
        optimizer: the inner optimizer.
        moments: the entry of its class.
        parameters: one factor of every layer of a batch.
        factor: (layers, r): beta for P's state, alpha for Q's; of a sharded Q, for its own rows.
        axis: which axis of (layers, *parameter shape) runs over the r columns.

    Raises:
        TypeError: a state that is not known, or that cannot be carried across.
    """
    states = [optimizer.state.get(p, {}) for p in parameters]
    for name, value in states[0].items():
        if isinstance(value, Tensor) and name not in moments.tensor_names:
            raise TypeError(
                f"{type(optimizer).__name__} keeps a state {name!r} whose degree is not known; "
                "nothing was changed. Register it with scalora.register_moments."
            )
        if isinstance(value, Tensor) and value.ndim and not _spread_alike(value, parameters[0]):
            raise TypeError(
                f"{type(optimizer).__name__}'s state {name!r} is not sharded as its parameter is: "
                "it cannot be carried across a re-basing. Nothing was changed."
            )
    if isinstance(moments, BitsandbytesMoments):
        return moved_tensors(moments, states, parameters[0].device, factor, axis)
    return [
        _moved(optimizer, moments, states, name, factor, axis)
        for name, value in states[0].items()
        if isinstance(value, Tensor) and moments.degrees[name] != 0
    ]


def _moved(
    optimizer: torch.optim.Optimizer,
    moments: Moments,
    states: Sequence[Mapping[str, Any]],
    name: str,
    factor: Tensor,
    axis: int,
) -> Write:
    targets = [sharding.local(state[name]) for state in states]
    degree = moments.degrees[name]
    old = stack(targets)
    if not old.is_floating_point():
        raise TypeError(
            f"{type(optimizer).__name__}'s state {name!r} is {old.dtype}: codes cannot be carried "
            "across a re-basing as if they were numbers. Nothing was changed."
        )
    if old.ndim > axis and old.shape[axis] == factor.shape[-1]:
        return targets, old, transfer(old, factor, degree, axis)
    partner = (moments.partners or {}).get(name)
    if partner is not None:
        other = stack([state[partner] for state in states])
        return targets, old, transfer_reduced(old, other, factor, degree, axis)
    raise TypeError(
        f"{type(optimizer).__name__}'s state {name!r} has shape {tuple(targets[0].shape)}, "
        f"which does not run over the {factor.shape[-1]} columns of its parameter: it "
        "cannot be carried across a re-basing. Nothing was changed."
    )


def _spread_alike(value: Tensor, parameter: Tensor) -> bool:
    if not sharding.is_sharded(parameter):
        return True
    return value.shape == parameter.shape and sharding.layout(value) == sharding.layout(parameter)


def _is_on_host_alone(value: Any, device: torch.device) -> bool:
    """A counter: a number, or a tensor of one that is not where its parameter is."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.device != device
    return isinstance(value, (int, float))
