"""Saving and loading what a run has beside its adapter and inner optimizer's state.

Held by tests/resuming/test_training_state.py.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalora import peft_layers, sharding, transformers_models
from scalora.arguments import check_folder, check_model, described
from scalora.optimizer import ScaLoRA
from scalora.peft_layers import LoRAPair
from scalora.resuming.encoding import flattened
from scalora.saving.training_state_file import (
    TrainingStateFile,
    base_fingerprints,
    noted_in_adapter_file,
)


def save_training_state(
    optimizer: ScaLoRA, folder: str | PathLike[str], *, all_base_weights: bool = False
) -> Path:
    """Write folded base weights, carries and the state of re-basing to ``scalora.safetensors``.

    Together with the adapter (``model.save_pretrained``, best called before) and
    ``optimizer.state_dict()`` this is a complete checkpoint.  The file is written whole or not at
    all.  Base weights that nothing has been folded into yet are the pretrained ones: they are left
    out and checked when loading.  Those in the adapter's file are not written twice.

    Args:
        optimizer: the optimizer in training.
        folder: an existing folder.
        all_base_weights: whether to write the unchanged base weights too, so that the model in
            training can be taken back to this state without loading the pretrained one anew.

    Returns:
        The file's path.
    """
    _check_optimizer(optimizer, "save_training_state")
    sharding.require_whole(optimizer.model, "save_training_state")
    check_folder(Path(folder), "make it first; nothing was written")
    tensors, values = flattened(optimizer.rebasing_state())
    pairs, adapter = optimizer.rebased_pairs, optimizer.options.adapter_name
    dense = [p for p in pairs if values["places"][p.name] == "dense" or p.was_rebased]
    left_out = [p for p in dense if not (p.was_rebased or all_base_weights)]
    written = [pair for pair in dense if pair not in left_out]
    tensors |= {f"base:{pair.name}": pair.base_weight for pair in written}
    values["pretrained"] = base_fingerprints(left_out)
    values |= noted_in_adapter_file(written, Path(folder), adapter)
    values["adapter"] = peft_layers.adapter_checksums(pairs)
    # From here on, what `scalora export` needs to make the model anew.
    base = peft_layers.base_model(optimizer.model)
    values["adapter_name"] = adapter
    values["config"] = transformers_models.recorded_config(base)
    values["model_class"] = type(base).__name__
    values["quantized"] = any(map(peft_layers.is_quantized, pairs))
    return TrainingStateFile.write(folder, tensors, values)


def load_training_state(optimizer: ScaLoRA, folder: str | PathLike[str]) -> None:
    """Restore what `save_training_state` wrote; load the adapter of the same checkpoint first.

    Args:
        optimizer: a new optimizer over the same kind of model, with the same rule and seed.
        folder: the checkpoint's folder.

    Raises:
        ValueError: the file is missing or damaged, or belongs to another model, rank, rule or
            adapter; nothing is changed then.
    """
    _check_optimizer(optimizer, "load_training_state")
    sharding.require_whole(optimizer.model, "load_training_state")
    file = TrainingStateFile.read(folder)
    pairs = optimizer.rebased_pairs
    optimizer.check_same_run(file.values)
    file.check(pairs)
    file.put_weights(pairs)
    optimizer.load_rebasing_state(file.rebasing_state)


def load_rebased_weights(
    model: nn.Module, folder: str | PathLike[str], adapter_name: str | None = None
) -> None:
    """Give a model with a checkpoint's adapter the checkpoint's folded base weights and carries.

    It then is the model that was trained.  No optimizer is needed::

        model = PeftModel.from_pretrained(base, "checkpoint-500")
        scalora.load_rebased_weights(model, "checkpoint-500")

    Args:
        model: the PEFT model (or a module around it), on the same base.  A carry fits the base in
            any precision, quantized or not.
        folder: the checkpoint's folder, which `save_training_state` or a callback completed.
        adapter_name: None for the active adapter.

    Raises:
        ValueError: the file is missing or damaged, or belongs to another model, rank or adapter;
            nothing is changed then.
    """
    check_model(model, "load_rebased_weights")
    sharding.require_whole(model, "load_rebased_weights")
    file = TrainingStateFile.read(folder)
    name = adapter_name or peft_layers.active_adapter(model)
    pairs = _pairs_of(file, model, name)
    file.check(pairs)
    file.put_weights(pairs)
    for pair in pairs:
        saved = file.carry(pair.name)
        if saved is not None:
            pair.ensure_carry(int(saved["capacity"]), saved["up"].dtype).load(saved)
        elif pair.carry is not None or file.values["places"][pair.name] == "carry":
            # Whoever fills it widens it.
            pair.ensure_carry(2 * pair.rank, torch.float16).clear()
        if pair.name in file.values["base"]:
            pair.mark_rebased()
    if file.values["rebase_count"]:
        peft_layers.complete_what_is_saved(model)


def _check_optimizer(optimizer: Any, caller: str) -> None:
    """Raise a TypeError unless it is a ScaLoRA, which accelerate's and schedulers' hold inside."""
    if isinstance(optimizer, ScaLoRA):
        return
    inside = " It is around one: pass its .optimizer." * isinstance(
        getattr(optimizer, "optimizer", None), ScaLoRA
    )
    raise TypeError(
        f"{caller}(optimizer, folder) got {described(optimizer)}, not a ScaLoRA.{inside}"
    )


def _pairs_of(file: TrainingStateFile, model: nn.Module, adapter: str) -> list[LoRAPair]:
    """Return the model's layers that the file names, or raise a ValueError if one does not fit."""
    ranks = file.values["ranks"]
    pairs = {pair.name: pair for pair in peft_layers.lora_pairs(model, adapter)}
    for name, rank in ranks.items():
        if name not in pairs or pairs[name].rank != rank:
            found: Any = f"has rank {pairs[name].rank}" if name in pairs else "is missing"
            raise ValueError(
                f"{file.path} belongs to another model: the layer {name!r} has rank {rank} there "
                f"and {found} in this model's adapter {adapter!r}. Nothing was loaded."
            )
        if list(pairs[name].shape) != file.values["shapes"][name]:
            raise ValueError(
                f"{file.path} belongs to another model: the weight of {name!r} is "
                f"{tuple(file.values['shapes'][name])} there and {pairs[name].shape} here. "
                "Nothing was loaded."
            )
    return [pairs[name] for name in ranks]
