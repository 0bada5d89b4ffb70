"""Embeddings in an adapter's files: those of a new vocabulary, and adapted ones.

Held by tests/peft_layers/test_adapter_files.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

from peft import get_peft_model_state_dict, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from scalora import transformers_models
from scalora.peft_layers.finding import PREFIX, base_model, base_weight_name

# Warnings of PEFT about what this module decides.
_ASIDES = ("Setting `save_embedding_layers` to `True`", "Could not identify embedding layer")


def vocabulary_changed(model: nn.Module, adapter: str) -> bool:
    """Return whether the vocabulary has another size than that of the model the adapter names."""
    adapted: Any = model
    config = adapted.peft_config[adapter]
    own = base_model(model)
    source = config.base_model_name_or_path or getattr(own, "name_or_path", None)
    return bool(source) and transformers_models.has_other_vocabulary(own, str(source))


def saved_embeddings(model: nn.Module, adapter: str, grown: bool) -> dict[str, Tensor]:
    """Return the base weights that PEFT writes with the adapter, by their names in its files.

    These are an adapted embedding and head, which may have been changed before training began, and
    both where the vocabulary was changed, whose new rows are nowhere else.  Quantized weights are
    left out: nothing changes them.

    Args:
        model: one of `adapted_models`.
        adapter: the adapter's name.
        grown: whether the vocabulary was changed, as `vocabulary_changed` returns.
    """
    without = _tensors(model, adapter, False)
    found = {
        name: tensor
        for name, tensor in _tensors(model, adapter, True if grown else "auto").items()
        if name not in without
    }
    if grown:
        found |= _plain_embeddings(model, without)
    return {
        name: tensor
        for name, tensor in found.items()
        if name.endswith((".weight", ".bias")) and tensor.is_floating_point()
    }


def forgotten_embeddings(model: nn.Module, adapter: str) -> list[str]:
    """Return the weights with a new vocabulary's rows that PEFT leaves out of its own files.

    PEFT leaves out a head beside an adapted embedding, and both in a model of text and images.
    """
    if not vocabulary_changed(model, adapter):
        return []
    written = _tensors(model, adapter, "auto")
    needed = saved_embeddings(model, adapter, True)
    return sorted(base_weight_name(name) for name in needed if name not in written)


def weights_in_files(folder: Path) -> set[str]:
    """Return the names of the base's weights that an adapter's files in ``folder`` hold.

    These are of ``modules_to_save`` and of embeddings; loading the adapter puts them in place.
    """
    names = load_peft_weights(str(folder), device="cpu")
    return set(map(base_weight_name, names))


def _tensors(model: nn.Module, adapter: str, embeddings: bool | Literal["auto"]) -> dict[str, Any]:
    """Return the tensors of PEFT's own adapter file, by ``save_embedding_layers``."""
    with warnings.catch_warnings():
        for aside in _ASIDES:
            warnings.filterwarnings("ignore", message=aside)
        return dict(
            get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=embeddings)
        )


def _plain_embeddings(model: nn.Module, without: dict[str, Any]) -> dict[str, Tensor]:
    """Return the embedding's and head's weights outside PEFT's wrappers.

    PEFT forgets one of them where the other is adapted.
    """
    own: Any = base_model(model)
    layers = {id(own.get_input_embeddings()), id(own.get_output_embeddings())}
    return {
        f"{PREFIX}{name}.{leaf}": tensor
        for name, module in own.named_modules()
        if id(module) in layers and _is_plain(module)
        for leaf, tensor in module.state_dict().items()
        if f"{PREFIX}{name}.{leaf}" not in without
    }


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is none of PEFT's wrappers."""
    return not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
