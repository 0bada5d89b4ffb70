"""The one place that knows sharded parameters: the DTensors of FSDP2's ``fully_shard``.

Every process holds some rows (axis 0) of a parameter, of its gradient and of its moments.  What is
computed from whole factors is computed on every process alike, from the same numbers, so that
nothing has to be sent back; each then writes its own rows.  Only the factors and what is of their
size is ever made whole.  All processes must call these functions in the same order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's rows, in the same memory; a tensor that is not sharded is returned itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def layout(tensor: Tensor) -> Hashable:
    """What two tensors have in common that are spread alike; None if not sharded."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def own_rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor this process holds, as ``torch.chunk`` deals them out."""
    rows = tensor.shape[0]
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if placement.is_shard():
                each = -(-rows // tensor.device_mesh.size(axis))
                first = min(rows, tensor.device_mesh.get_local_rank(axis) * each)
                return slice(first, min(rows, first + each))
    return slice(0, rows)


def whole(stack: Tensor, like: Tensor) -> Tensor:
    """Stacked rows of all processes together, on every process.

    Args:
        stack: (layers, own rows of ``like``, ...), of this process.
        like: a parameter that is spread as each layer is.

    Returns:
        (layers, rows of ``like``, ...); the stack itself where nothing is sharded.
    """
    if not isinstance(like, DTensor):
        return stack
    placements = [Shard(1) if p.is_shard() else p for p in like.placements]
    shape = torch.Size((stack.shape[0], like.shape[0], *stack.shape[2:]))
    return _redistributed(stack, like, placements, shape)


def summed(part: Tensor, like: Tensor) -> Tensor:
    """A sum over all rows, from every process's sum over its own: as ``part``, on every process."""
    if not isinstance(like, DTensor):
        return part
    placements = [Partial() if p.is_shard() else p for p in like.placements]
    return _redistributed(part, like, placements, part.shape)


def everywhere(flags: Tensor, like: Tensor) -> Tensor:
    """Whether flags, bool of any shape, are true on every process that holds rows."""
    return summed((~flags).to(torch.float32), like) == 0


def _redistributed(
    tensor: Tensor, like: DTensor, placements: Sequence[Placement], shape: torch.Size
) -> Tensor:
    stride = torch.empty(shape, device="meta").stride()
    spread = DTensor.from_local(
        tensor.contiguous(),
        like.device_mesh,
        placements,
        run_check=False,
        shape=shape,
        stride=stride,
    )
    return spread.full_tensor()


def layouts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One tensor of each way in which some are spread, in their order; plain ones have none."""
    found = {layout(tensor): tensor for tensor in tensors if is_sharded(tensor)}
    return list(found.values())


def why_not_understood(tensor: Tensor) -> str | None:
    """Why a sharded tensor cannot be handled here, or None; a plain one always can."""
    if not isinstance(tensor, DTensor):
        return None
    known = all(
        type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in tensor.placements
    )
    if not known or sum(p.is_shard() for p in tensor.placements) > 1:
        return f"it is spread as {tensor.placements}, and only rows over one axis are handled"
    if local(tensor).device.type != tensor.device_mesh.device_type:
        return "its shards are offloaded"
    return None


def class_under_sharding(module: nn.Module) -> type[nn.Module]:
    """A module's class before ``fully_shard`` gave it one of its own."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that ``fully_shard`` was called on.

    A forward pass without a backward leaves them whole; ``reshard()`` of each undoes that.
    """
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def require_whole(model: nn.Module, doing: str) -> None:
    """Raise a ValueError if a model is sharded: ``doing`` needs all of it in one process."""
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"{doing} needs the whole model in one process, and this one is sharded: write it with "
            "torch.distributed.checkpoint, and load that where it is not (docs/many_processes.md)."
        )


def why_not_sharded_so(model: nn.Module) -> str | None:
    """Why a model was made to be trained in many processes in a way that is not handled."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "it is in FullyShardedDataParallel (FSDP1), which hides its parameters"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed's ZeRO-3 has taken its parameters apart"
    return None
