"""Checkpoints of a sharded model, which all processes write and read together.

Held by tests/sharding/test_sharded_trainer.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from scalora.files import file_written_whole
from scalora.optimizer import ScaLoRA

SHARDED_FOLDER = "scalora_sharded"
"""Name of the folder inside that of a Trainer's checkpoint."""
_SUMS = "sha256.json"  # file name -> SHA-256 of every other file; written last
_BYTES_AT_ONCE = 1 << 24


def save_sharded(optimizer: ScaLoRA, folder: str | PathLike[str]) -> None:
    """Write model and optimizer as docs/many_processes.md does; call it on every process.

    Base weights are left out where none takes increments.

    Args:
        optimizer: the optimizer in training, over a sharded model.
        folder: the checkpoint's folder, the same for every process.
    """
    path, rank = Path(folder) / SHARDED_FOLDER, dist.get_rank()
    if rank == 0:  # until all files are written, the folder must not look whole
        (path / _SUMS).unlink(missing_ok=True)
    dist.barrier()
    state = {"model": _model_state(optimizer), "optimizer": _optimizer_state(optimizer)}
    dcp.save(state, checkpoint_id=path)
    own = sorted(path.glob(f"__{rank}_*")) + ([path / ".metadata"] if rank == 0 else [])
    sums = _of_all({file.name: _sha256(file) for file in own})
    if rank == 0:
        with file_written_whole(path / _SUMS) as temporary:
            temporary.write_text(json.dumps(sums), encoding="utf-8")
    dist.barrier()


def load_sharded(optimizer: ScaLoRA, folder: str | PathLike[str]) -> None:
    """Restore what `save_sharded` wrote, in any number of processes; call it on every process.

    The files are read twice, first to compare their checksums.

    Args:
        optimizer: a new optimizer over the same kind of model, with the same rule and seed.
        folder: the checkpoint's folder.

    Raises:
        ValueError: the checkpoint has no such folder, is damaged, or is of another kind of run;
            nothing is loaded then.
    """
    path = Path(folder) / SHARDED_FOLDER
    _check_files(path)
    _check_shapes({"model": _model_state(optimizer)}, path)
    # The optimizer first: it refuses another kind of run before the model is changed.
    state: dict[str, Any] = {"optimizer": _optimizer_state(optimizer)}
    _load(state, path)
    set_optimizer_state_dict(optimizer.model, optimizer, state["optimizer"])
    state = {"model": _model_state(optimizer)}
    _load(state, path)
    options = StateDictOptions(strict=False)
    set_model_state_dict(optimizer.model, state["model"], options=options)


def _load(state: dict[str, Any], path: Path) -> None:
    """Load into the tensors of ``state``; raise a ValueError if they do not fit the files."""
    try:
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:
        reasons = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
        raise ValueError(
            f"{path} does not fit this model or optimizer: {reasons}. Nothing was loaded."
        ) from error


def _check_shapes(state: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Raise a ValueError if a tensor is missing in the files or has another shape there."""
    there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for part, tensors in state.items():
        for name, tensor in tensors.items():
            found = getattr(there.get(f"{part}.{name}"), "size", None)
            if found != tensor.shape:
                raise ValueError(
                    f"{path} belongs to another model: {name!r} is {tuple(tensor.shape)} here and "
                    f"{found and tuple(found)} there. Nothing was loaded."
                )


def _check_files(path: Path) -> None:
    """Raise a ValueError on every process if a file is not as it was written."""
    if not (path / _SUMS).exists():
        raise ValueError(
            f"{path.parent} is incomplete: it has no whole {path.name!r}, which ScaLoRACallback "
            "writes where the model is sharded. Resume from an earlier checkpoint, or from one "
            "that was written under FSDP2. Nothing was loaded."
        )
    sums = json.loads((path / _SUMS).read_text(encoding="utf-8"))
    own = sorted(sums)[dist.get_rank() :: dist.get_world_size()]
    found = {name: _sha256(path / name) if (path / name).exists() else None for name in own}
    damaged = sorted(name for name, value in _of_all(found).items() if value != sums[name])
    if damaged:
        raise ValueError(
            f"{path} is damaged: {damaged} are not what was written. Nothing was loaded; take an "
            "earlier checkpoint."
        )


def _of_all(own: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of all processes together."""
    parts: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


def _sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BYTES_AT_ONCE):
            found.update(block)
    return found.hexdigest()


def _optimizer_state(optimizer: ScaLoRA) -> dict[str, Any]:
    return get_optimizer_state_dict(optimizer.model, optimizer)


def _model_state(optimizer: ScaLoRA) -> dict[str, Any]:
    """Return the model's state dict, without frozen parameters where no base weight changes."""
    all_carried = "dense" not in optimizer.places.values()
    options = StateDictOptions(ignore_frozen_params=all_carried)
    return get_model_state_dict(optimizer.model, options=options)
