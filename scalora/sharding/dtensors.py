"""The one place that knows sharded parameters: the DTensors of FSDP2's ``fully_shard``.

Every process holds some rows (axis 0) of a parameter, of its gradient and of its moments.  Of P
(m, r) these are rows of the weight, but of Q (r, n) they are columns of the adapter: what is
computed with Q is computed with some of its n columns in every process.  Small matrices are summed
over the processes, which all compute the same with them, so that nothing has to be sent back; each
then writes its own rows.  All processes must call these functions in the same order.
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

from scalora.sharding.rows import HERE, Rows


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


@dataclass(frozen=True)
class SharedRows(Rows):
    """Rows dealt out over one axis of a mesh as ``torch.chunk`` does it, the same on the others.

    Attributes:
        mesh: of the processes.
        placements: one an axis of the mesh, one of them a ``Shard``.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def _axis(self) -> int:
        return next(axis for axis, p in enumerate(self.placements) if p.is_shard())

    @property
    def processes(self) -> int:  # type: ignore[override]
        """How many hold rows; of those that replicate them, one each."""
        return self.mesh.size(self._axis)

    @property
    def index(self) -> int:  # type: ignore[override]
        """Of this process among them."""
        return self.mesh.get_local_rank(self._axis)

    def slices(self, count: int) -> list[slice]:
        """Which of ``count`` rows each process holds."""
        each = -(-count // self.processes)
        starts = [min(count, process * each) for process in range(self.processes)]
        return [slice(start, min(count, start + each)) for start in starts]

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every process's ``part``, on all of them."""
        return self._redistributed(part, Partial("sum"), part.shape)

    def max(self, part: Tensor) -> Tensor:
        """The largest of every process's ``part``, element by element, on all of them."""
        return self._redistributed(part, Partial("max"), part.shape)

    def each(self, part: Tensor) -> Tensor:
        """(processes, ...): every process's ``part``, of one shape, on all of them."""
        return self.gathered(part.unsqueeze(0), 0, self.processes)

    def gathered(self, part: Tensor, axis: int, count: int) -> Tensor:
        """All ``count`` rows, on every process, from the rows along ``axis`` that each holds."""
        shape = torch.Size((*part.shape[:axis], count, *part.shape[axis + 1 :]))
        return self._redistributed(part, Shard(axis), shape)

    def rows_to_columns(self, part: Tensor, held: Sequence[int]) -> Tensor:
        """Deal out the columns instead of the rows: see `Rows.rows_to_columns`."""
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
        spread = DTensor.from_local(
            part.contiguous(),
            self.mesh,
            [placement if p.is_shard() else p for p in self.placements],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        return spread.full_tensor()


def rows_of(tensor: Tensor) -> Rows:
    """Who holds the rows of a parameter (axis 0)."""
    if not isinstance(tensor, DTensor) or not any(p.is_shard() for p in tensor.placements):
        return HERE
    return SharedRows(tensor.device_mesh, tensor.placements)


def own_rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor this process holds."""
    return rows_of(tensor).own(tensor.shape[0])


def everywhere(flags: Tensor, like: Tensor) -> Tensor:
    """Whether flags, bool of any shape, are true on every process that holds rows."""
    rows = rows_of(like)
    return flags if rows.processes == 1 else rows.sum((~flags).to(torch.float32)) == 0


def own_columns(stack: Tensor, like: Tensor) -> Tensor:
    """(layers, rows of ``like``, its own columns) of a stack of own rows, later axes flattened."""
    rows = rows_of(like)
    held = [share.stop - share.start for share in rows.slices(like.shape[0])]
    return rows.rows_to_columns(stack.flatten(2), held)


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


def is_sharded_alone(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this very module."""
    return isinstance(module, FSDPModule)


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
    # ZeRO-3 leaves the one attribute on every parameter, ZeRO-1 and ZeRO-2 the other.
    if any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters()):
        return "DeepSpeed's ZeRO has taken its parameters apart"
    if _accelerate_uses_zero():
        # With an optimizer that it offloads, accelerate would even put another in place of ours.
        return "accelerate gives it to DeepSpeed's ZeRO, which takes its parameters apart"
    return None


def _accelerate_uses_zero() -> bool:
    if AcceleratorState._shared_state.get("distributed_type") != DistributedType.DEEPSPEED:
        return False
    config = AcceleratorState().deepspeed_plugin.deepspeed_config
    return config.get("zero_optimization", {}).get("stage", 0) != 0
