"""Rows of a matrix, and which process holds them; DTensors, which only this module knows.

Held by tests/sharding/test_sharded_training.py and test_sharded_carry.py.

The mathematics asks a `Rows` for what it needs of all rows (a sum, a maximum) and never asks how
many processes there are.  `SharedRows` is the case of several, under FSDP2's ``fully_shard``: each
process holds some rows (axis 0) of a parameter, of its gradient and of its moments.  For P (m, r)
these are rows of the weight.  For Q, stored as (r, n), they are some of the r rows; `own_columns`
exchanges them for some of the n columns.  Small matrices are summed over the processes, which then
all compute the same with them, so nothing has to be sent back; each writes its own rows.  All
processes must call the collective functions in the same order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


class Rows:
    """Rows that are all in this process.  One object serves matrices of any number of rows.

    Attributes:
        processes: number of processes among which the rows are divided.
        index: position of this process among them.
    """

    processes: int = 1
    index: int = 0

    def slices(self, count: int) -> list[slice]:
        """Return which of ``count`` rows each process holds, in the order of the processes."""
        return [slice(0, count)]

    def own(self, count: int) -> slice:
        """Return which of ``count`` rows are here."""
        return self.slices(count)[self.index]

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' ``part``, on each of them."""
        return part

    def max(self, part: Tensor) -> Tensor:
        """Return the elementwise maximum of all processes' ``part``, on each of them."""
        return part

    def each(self, part: Tensor) -> Tensor:
        """Return all processes' ``part``, of one shape, as (processes, ...), on each of them."""
        return part.unsqueeze(0)

    def gathered(self, part: Tensor, axis: int, count: int) -> Tensor:
        """Return all ``count`` rows along ``axis``, of which ``part`` has the ones held here."""
        return part

    def rows_to_columns(self, part: Tensor, held: Sequence[int]) -> Tensor:
        """Exchange rows held here for columns held here.

        Args:
            part: (layers, rows held here, n).
            held: number of rows that each process holds.

        Returns:
            (layers, all rows, columns held here), the rows in the order of the processes.
        """
        return part


HERE = Rows()
"""The rows of every matrix that is not sharded."""


@dataclass(frozen=True)
class SharedRows(Rows):
    """Rows that one axis of a mesh divides as ``torch.chunk`` does; the other axes replicate them.

    Attributes:
        mesh: the processes.
        placements: one per axis of the mesh; exactly one of them is a ``Shard``.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def _axis(self) -> int:
        return next(axis for axis, p in enumerate(self.placements) if p.is_shard())

    @property
    def processes(self) -> int:  # type: ignore[override]
        """Number of processes among which the rows are divided, replicas counted once."""
        return self.mesh.size(self._axis)

    @property
    def index(self) -> int:  # type: ignore[override]
        """Position of this process among them."""
        return self.mesh.get_local_rank(self._axis)

    def slices(self, count: int) -> list[slice]:
        """Return which of ``count`` rows each process holds, in the order of the processes."""
        each = -(-count // self.processes)
        starts = [min(count, process * each) for process in range(self.processes)]
        return [slice(start, min(count, start + each)) for start in starts]

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' ``part``, on each of them."""
        return self._redistributed(part, Partial("sum"), part.shape)

    def max(self, part: Tensor) -> Tensor:
        """Return the elementwise maximum of all processes' ``part``, on each of them."""
        return self._redistributed(part, Partial("max"), part.shape)

    def each(self, part: Tensor) -> Tensor:
        """Return all processes' ``part``, of one shape, as (processes, ...), on each of them."""
        return self.gathered(part.unsqueeze(0), 0, self.processes)

    def gathered(self, part: Tensor, axis: int, count: int) -> Tensor:
        """Return all ``count`` rows along ``axis``, of which ``part`` has the ones held here."""
        shape = torch.Size((*part.shape[:axis], count, *part.shape[axis + 1 :]))
        return self._redistributed(part, Shard(axis), shape)

    def rows_to_columns(self, part: Tensor, held: Sequence[int]) -> Tensor:
        """Exchange rows held here for columns held here, as `Rows.rows_to_columns` says."""
        layers, here, columns = part.shape
        shares = [share.stop - share.start for share in self.slices(columns)]
        own = shares[self.index]
        sent = [share * layers * here for share in shares]
        received = [own * layers * rows for rows in held]
        # Columns first: what goes to one process is then in one piece.
        outgoing = part.permute(2, 0, 1).contiguous().flatten()
        incoming = outgoing.new_empty(sum(received))
        group = self.mesh.get_group(self._axis)
        dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
        pieces = zip(incoming.split(received), held, strict=True)
        return torch.cat([x.view(own, layers, rows) for x, rows in pieces], 2).permute(1, 2, 0)

    def _redistributed(self, part: Tensor, placement: Placement, shape: torch.Size) -> Tensor:
        """Return the whole tensor of which ``part`` is this process's share under ``placement``."""
        spread = DTensor.from_local(
            part.contiguous(),
            self.mesh,
            [placement if p.is_shard() else p for p in self.placements],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        return spread.full_tensor()


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is spread over processes."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows, in the same memory; a plain tensor is returned as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return detached tensors stacked as (layers, ...); of sharded ones, this process's rows."""
    return torch.stack([local(tensor) for tensor in tensors]).detach()


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of parameters that have one; of sharded ones, this process's rows."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def layout(tensor: Tensor) -> Hashable:
    """Return a key that is equal for tensors spread alike; None for a plain tensor."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


def rows_of(tensor: Tensor) -> Rows:
    """Return who holds the rows (axis 0) of a parameter."""
    if not isinstance(tensor, DTensor) or not any(p.is_shard() for p in tensor.placements):
        return HERE
    return SharedRows(tensor.device_mesh, tensor.placements)


def own_rows(tensor: Tensor) -> slice:
    """Return which rows of the whole tensor this process holds."""
    return rows_of(tensor).own(tensor.shape[0])


def everywhere(flags: Tensor, like: Tensor) -> Tensor:
    """Return whether flags (bool, any shape) are true on all processes with rows of ``like``."""
    rows = rows_of(like)
    return flags if rows.processes == 1 else rows.sum((~flags).to(torch.float32)) == 0


def own_columns(stack: Tensor, like: Tensor) -> Tensor:
    """Exchange own rows of stacked matrices for own columns.

    Args:
        stack: (layers, rows held here, ...); later axes are flattened into n columns.
        like: a parameter that is spread as each matrix is, with all its rows.

    Returns:
        (layers, all rows, columns held here).
    """
    rows = rows_of(like)
    held = [share.stop - share.start for share in rows.slices(like.shape[0])]
    return rows.rows_to_columns(stack.flatten(2), held)


def layouts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return one tensor per `layout` among the sharded ones, in their order."""
    found = {layout(tensor): tensor for tensor in tensors if is_sharded(tensor)}
    return list(found.values())


def why_layout_unsupported(tensor: Tensor) -> str | None:
    """Return why a tensor's layout is unsupported, or None; a plain tensor's never is."""
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


def is_sharded_alone(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on this very module."""
    return isinstance(module, FSDPModule)


def class_under_sharding(module: nn.Module) -> type[nn.Module]:
    """Return a module's class, or the one it had before ``fully_shard`` derived another from it."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that ``fully_shard`` was called on.

    A forward pass without a backward pass leaves them gathered; call ``reshard()`` of each then.
    """
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def require_whole(model: nn.Module, doing: str) -> None:
    """Raise a ValueError if a model is sharded, which ``doing`` cannot be done with."""
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"{doing} needs the whole model in one process, and this one is sharded: write it with "
            "torch.distributed.checkpoint, and load that where it is not (docs/many_processes.md)."
        )


def why_sharding_unsupported(model: nn.Module) -> str | None:
    """Return why what shards this model (FSDP1 or ZeRO) is unsupported, or None."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "it is in FullyShardedDataParallel (FSDP1), which hides its parameters"
    # ZeRO-3 marks every parameter with the first attribute, ZeRO-1 and ZeRO-2 with the second.
    if any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters()):
        return "DeepSpeed's ZeRO has taken its parameters apart"
    if _accelerate_uses_zero():
        # With an offloaded optimizer, accelerate would also replace ours by another.
        return "accelerate gives it to DeepSpeed's ZeRO, which takes its parameters apart"
    return None


def _accelerate_uses_zero() -> bool:
    if AcceleratorState._shared_state.get("distributed_type") != DistributedType.DEEPSPEED:
        return False
    config = AcceleratorState().deepspeed_plugin.deepspeed_config
    return config.get("zero_optimization", {}).get("stage", 0) != 0
