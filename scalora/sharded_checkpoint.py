"""The checkpoint of a sharded model, which all processes write and read together."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from scalora.optimizer import ScaLoRA

SHARDED_STATE = "scalora_sharded"
"""The folder's name, in that of a Trainer's checkpoint."""


def save_sharded(optimizer: ScaLoRA, folder: str | PathLike[str]) -> None:
    """Write model and optimizer, as docs/many_processes.md does it; call it on every process.

    Base weights are left out where none takes increments.

    Args:
        optimizer: the optimizer in training, over a sharded model.
        folder: the checkpoint's, the same for every process.
    """
    state = {"model": _model_state(optimizer), "optimizer": _optimizer_state(optimizer)}
    dcp.save(state, checkpoint_id=Path(folder) / SHARDED_STATE)


def load_sharded(optimizer: ScaLoRA, folder: str | PathLike[str]) -> None:
    """Restore what `save_sharded` wrote, in any number of processes; call it on every one.

    Args:
        optimizer: a new optimizer over the same kind of model, with the same rule and seed.
        folder: the checkpoint's.

    Raises:
        ValueError: the checkpoint has no such part, or is of another kind of run.
    """
    path = Path(folder) / SHARDED_STATE
    if not (path / ".metadata").exists():
        raise ValueError(
            f"{folder} is incomplete: it has no {SHARDED_STATE!r}, which ScaLoRACallback writes "
            "last, where the model is sharded. Resume from an earlier checkpoint, or from one that "
            "was written under FSDP2."
        )
    # The optimizer first: it refuses another kind of run before the model is changed.
    state: dict[str, Any] = {"optimizer": _optimizer_state(optimizer)}
    dcp.load(state, checkpoint_id=path)
    set_optimizer_state_dict(optimizer.model, optimizer, state["optimizer"])
    state = {"model": _model_state(optimizer)}
    dcp.load(state, checkpoint_id=path)
    options = StateDictOptions(strict=False)
    set_model_state_dict(optimizer.model, state["model"], options=options)


def _optimizer_state(optimizer: ScaLoRA) -> dict[str, Any]:
    return get_optimizer_state_dict(optimizer.model, optimizer)


def _model_state(optimizer: ScaLoRA) -> dict[str, Any]:
    beside = optimizer.options.when_full != "fold" and all(
        row.accumulator == "carry" for row in optimizer.report()
    )
    options = StateDictOptions(ignore_frozen_params=beside)
    return get_model_state_dict(optimizer.model, options=options)
