"""Completing an adapter's files: what was frozen goes where PEFT and transformers load it from.

PEFT stores weights of the base in an adapter's file where it must (a resized embedding), and loads
whatever base weights it finds there.  Folded base weights are put there as well, to the bit.  A
carry has no such place: it makes the adapter wider, or is missing.
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
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scalora.files import file_written_whole, read_tensors, write_tensors
from scalora.peft_layers.finding import PREFIX, lora_pairs, moves_base_at_creation
from scalora.peft_layers.pair import LoRAPair
from scalora.peft_layers.support import why_not_dense

ADAPTER_FILE = SAFETENSORS_WEIGHTS_NAME
CARRY_IS_MISSING = (
    "ScaLoRA's carry is missing here: call scalora.load_rebased_weights(model, folder) after "
    "loading the adapter, or write a whole one with scalora export or scalora.save_adapter"
)
"""An entry of an adapter's config.  PEFT does not know it, and says so when it loads that."""
BASE_COMES_ALONG = (
    "ScaLoRA's changed base weights come with this adapter: it is whole as it is, but "
    "save_pretrained of what was loaded writes it without them"
)
"""Likewise."""


def add_folded_weights(model: nn.Module, adapter: str, folder: Path) -> None:
    """Put the base weights that increments were folded into beside the adapter's own tensors.

    Args:
        model: one of `adapted_models`.
        adapter: its name.
        folder: where PEFT or transformers has just written it.
    """
    weights = folded_weights(model, adapter)
    if weights:
        _rewrite(folder, weights)
        _add_to_config(folder, **{BASE_COMES_ALONG: True})


def widen_by_carry(
    folder: Path, tensors: Mapping[str, Tensor], config: Any, moved: Mapping[str, Tensor]
) -> None:
    """Put adapter and carry as one adapter in the place of the adapter alone.

    Args:
        folder: where PEFT or transformers has just written the adapter.
        tensors, config: of `adapter_with_factors`.
        moved: base weights by the names of PEFT's files.
    """
    _rewrite(folder, {**tensors, **moved})
    noted = {BASE_COMES_ALONG: True} if moved else {}
    written = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config.save_pretrained(str(folder))  # which leaves out what only PeftModel notes
    _add_to_config(folder, auto_mapping=written.get("auto_mapping"), **noted)


def mark_as_incomplete(folder: Path) -> None:
    """Let whatever loads the adapter's config say that a carry belongs to it."""
    _add_to_config(folder, **{CARRY_IS_MISSING: True})


@contextmanager
def without_notes() -> Iterator[None]:
    """Let PEFT not speak of what is noted in a config, where that is taken care of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Unexpected keyword arguments .*ScaLoRA's")
        yield


def is_without_carry(folder: str | PathLike[str]) -> bool:
    """Whether the adapter in ``folder`` was marked so; False of what is no folder."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        return False
    return CARRY_IS_MISSING in json.loads(path.read_text(encoding="utf-8"))


def folded_weights(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Name in an adapter's file -> base weight that the adapter's increments were folded into."""
    return {
        base_weight_key(pair): pair.base_weight
        for pair in lora_pairs(model, adapter)
        if pair.adapter in getattr(pair.module, "scalora_folded", ())
    }


def moved_weights(model: nn.Module, adapter: str) -> dict[str, Tensor] | None:
    """Likewise of those that are not the pretrained ones; None where one cannot be put there."""
    if not moves_base_at_creation(model, adapter):
        return folded_weights(model, adapter)
    pairs = lora_pairs(model, adapter)
    if any(why_not_dense(pair) is not None for pair in pairs):
        return None
    return {base_weight_key(pair): pair.base_weight for pair in pairs}


def base_weight_key(pair: LoRAPair) -> str:
    """A base weight's name in an adapter's file."""
    depth, layer = 0, pair.module
    while (inner := layer._modules.get("base_layer")) is not None:
        depth, layer = depth + 1, inner
    return f"{PREFIX}{pair.name}{'.base_layer' * depth}.weight"


def adapter_folder(folder: Path, adapter: str) -> Path:
    """Where in ``folder`` PEFT writes an adapter: only the default one at the top."""
    named = folder / adapter
    return named if (named / ADAPTER_FILE).is_file() else folder


def has_base_weights(pairs: Sequence[LoRAPair], folder: Path) -> bool:
    """Whether the adapter's file in ``folder`` brings the base weight of every layer."""
    file = folder / ADAPTER_FILE
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as there:
        return {base_weight_key(pair) for pair in pairs} <= set(there.keys())


@torch.no_grad()
def weights_beside_adapter(
    pairs: Sequence[LoRAPair], folder: Path, adapter: str
) -> tuple[str, dict[str, str]]:
    """The adapter's file, relative to ``folder``, and the base weights that it holds to the bit.

    Args:
        pairs: the layers to look for.
        folder: a checkpoint's.
        adapter: its name.

    Returns:
        The file, and layer name -> the weight's name in it.
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
    """Layer name -> base weight, of an adapter's file.

    Args:
        file: its path.
        keys: layer name -> the weight's name in the file.

    Raises:
        ValueError: the file, or one of them, is missing.
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
    written, metadata = read_tensors(folder / ADAPTER_FILE)
    write_tensors(folder / ADAPTER_FILE, {**written, **tensors}, metadata)


def _add_to_config(folder: Path, **entries: Any) -> None:
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    with file_written_whole(path) as temporary:
        text = json.dumps({**config, **entries}, indent=2, sort_keys=True)
        temporary.write_text(text, encoding="utf-8")
