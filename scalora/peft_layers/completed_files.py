"""Frozen increments in an adapter's files, where PEFT and transformers load them from.

PEFT stores some weights of the base in an adapter's file (a resized embedding) and loads all base
weights that it finds there.  Folded base weights are put there too, bit for bit.  A carry has no
such place: it makes the adapter wider, or is missing.

Held by tests/integrations/test_trainer_ends.py and tests/peft_layers/test_injected_adapters.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scalora.files import file_written_whole, read_tensors, write_tensors
from scalora.peft_layers.adapter_files import ADAPTER_CONFIG, ADAPTER_FILE
from scalora.peft_layers.finding import PREFIX, lora_pairs, moves_base_at_creation
from scalora.peft_layers.pair import LoRAPair, folded_adapters
from scalora.peft_layers.support import why_not_dense

CARRY_IS_MISSING = (
    "ScaLoRA's carry is missing here: call scalora.load_rebased_weights(model, folder) after "
    "loading the adapter, or write a whole one with scalora export or scalora.save_adapter"
)
"""A config entry that PEFT does not know, and so quotes in a warning when it loads the adapter."""
BASE_COMES_ALONG = (
    "ScaLoRA's changed base weights come with this adapter: it is whole as it is, but "
    "save_pretrained of what was loaded writes it without them"
)
"""Another such entry."""


def add_folded_weights(model: nn.Module, adapter: str, folder: Path) -> None:
    """Add the base weights that increments were folded into to the adapter's file.

    Args:
        model: one of `adapted_models`.
        adapter: the adapter's name.
        folder: where PEFT or transformers has just written the adapter.
    """
    weights = folded_weights(model, adapter)
    if weights:
        _rewrite(folder, weights)
        _add_to_config(folder, **{BASE_COMES_ALONG: True})


def widen_by_carry(
    folder: Path, tensors: Mapping[str, Tensor], config: Any, moved: Mapping[str, Tensor]
) -> None:
    """Replace an adapter's files by those of adapter and carry as one adapter.

    Args:
        folder: where PEFT or transformers has just written the adapter.
        tensors, config: what `adapter_with_factors` returned.
        moved: base weights that are not the pretrained ones, of `moved_weights`.
    """
    _rewrite(folder, {**tensors, **moved})
    noted = {BASE_COMES_ALONG: True} if moved else {}
    written = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config.save_pretrained(str(folder))  # without the entries that only PeftModel writes
    _add_to_config(folder, auto_mapping=written.get("auto_mapping"), **noted)


def mark_as_incomplete(folder: Path) -> None:
    """Note in the adapter's config that a carry belongs to it, which PEFT then says on loading."""
    _add_to_config(folder, **{CARRY_IS_MISSING: True})


@contextmanager
def without_notes() -> Iterator[None]:
    """Silence PEFT's warnings about the config entries of this module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Unexpected keyword arguments .*ScaLoRA's")
        yield


def is_without_carry(folder: str | PathLike[str]) -> bool:
    """Return whether the adapter in ``folder`` was marked as incomplete; False for a hub id."""
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return False
    return CARRY_IS_MISSING in json.loads(path.read_text(encoding="utf-8"))


def folded_weights(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return name in the adapter's file -> base weight that its increments were folded into."""
    return {
        base_weight_key(pair): pair.base_weight
        for pair in lora_pairs(model, adapter)
        if adapter in folded_adapters(pair.module)
    }


def moved_weights(model: nn.Module, adapter: str) -> dict[str, Tensor] | None:
    """Return name in the adapter's file -> base weight that is not the pretrained one.

    Return None if such a weight cannot be written there, as a quantized one.
    """
    if not moves_base_at_creation(model, adapter):
        return folded_weights(model, adapter)
    pairs = lora_pairs(model, adapter)
    if any(why_not_dense(pair) is not None for pair in pairs):
        return None
    return {base_weight_key(pair): pair.base_weight for pair in pairs}


def base_weight_key(pair: LoRAPair) -> str:
    """Return the name of a layer's base weight in an adapter's file."""
    depth, layer = 0, pair.module
    while (inner := layer._modules.get("base_layer")) is not None:
        depth, layer = depth + 1, inner
    return f"{PREFIX}{pair.name}{'.base_layer' * depth}.weight"


def adapter_folder(folder: Path, adapter: str) -> Path:
    """Return where PEFT wrote an adapter: the default one in ``folder``, others one level below."""
    named = folder / adapter
    return named if (named / ADAPTER_FILE).is_file() else folder


def has_base_weights(pairs: Sequence[LoRAPair], folder: Path) -> bool:
    """Return whether the adapter's file in ``folder`` holds the base weight of every layer."""
    file = folder / ADAPTER_FILE
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as there:
        return {base_weight_key(pair) for pair in pairs} <= set(there.keys())


@torch.no_grad()
def weights_in_adapter_file(
    pairs: Sequence[LoRAPair], folder: Path, adapter: str
) -> tuple[str, dict[str, str]]:
    """Return which of the layers' base weights the adapter's file holds, equal to the bit.

    Args:
        pairs: the layers.
        folder: the checkpoint's folder.
        adapter: the adapter's name.

    Returns:
        The file, relative to ``folder``, and layer name -> the weight's name in it.
    """
    file = adapter_folder(folder, adapter) / ADAPTER_FILE
    if not pairs or not file.is_file():
        return ADAPTER_FILE, {}
    found = {}
    with safe_open(file, framework="pt", device="cpu") as there:
        names = set(there.keys())
        for pair in pairs:
            key, weight = base_weight_key(pair), pair.base_weight
            if key in names and _same_bits(there.get_tensor(key), weight.detach().cpu()):
                found[pair.name] = key
    return file.relative_to(folder).as_posix(), found


def base_weights_at(file: Path, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Return layer name -> base weight from an adapter's file.

    Args:
        file: the file's path.
        keys: layer name -> the weight's name in the file.

    Raises:
        ValueError: the file or one of the weights is missing.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as there:
            return {name: there.get_tensor(key) for name, key in keys.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is missing, or lacks base weights that belong to {file.parent}: {error}. "
            "Nothing was loaded."
        ) from error


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _rewrite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Add tensors to the adapter's file, or replace those of the same names."""
    written, metadata = read_tensors(folder / ADAPTER_FILE)
    write_tensors(folder / ADAPTER_FILE, {**written, **tensors}, metadata)


def _add_to_config(folder: Path, **entries: Any) -> None:
    """Set entries of the adapter's config."""
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    with file_written_whole(path) as temporary:
        text = json.dumps({**config, **entries}, indent=2, sort_keys=True)
        temporary.write_text(text, encoding="utf-8")
