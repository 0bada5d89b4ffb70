"""Saving a re-based model so that nothing is lost: merged, or as an ordinary adapter."""

from __future__ import annotations

import copy
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scalora import peft_layers, sharding
from scalora.arguments import check_model
from scalora.carry import compress
from scalora.files import folder_written_whole, write_tensors
from scalora.guards.factor_watch import check_factors
from scalora.saving.pretrained import (
    Base,
    base_has_moved,
    full_precision_base,
    has_one_change,
    weight_changes,
)
from scalora.saving.ties import keeping_ties, settle_ties, write_model

# Without them nothing loads the other files.
ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_MODEL_FILES = ("model.safetensors*", "model-*-of-*.safetensors")
_TOLERANCE = 1e-4

_Factors = tuple[Tensor, Tensor, float]  # P (m, k), Q (n, k), and what they miss, relative


def save_merged(model: nn.Module, path: str | PathLike[str], base: Base | None = None) -> None:
    """Write the model as a plain transformers checkpoint, the adapter merged into its weights.

    The model itself is left as it is: PEFT merges a copy, which needs as much memory again.  An
    adapted weight that was tied to another is no longer tied there: each has its own change.  What
    was written is loaded and compared before it is put in place.  A
    quantized base cannot take in the adapter without losing most of it, so what is written is in
    full precision: the quantized base's own weights, dequantized, which gives the model's own
    answers; or ``base``.

    Args:
        model: the fine-tuned model (or a module around it): a PeftModel, or one with adapters by
            ``add_adapter``.  Of a ``SentenceTransformer`` all parts are written.
        path: folder, created if need be.  It takes in all files or none, and keeps others.  In
            many processes (DDP) call this in one of them.
        base: for a quantized model: the pretrained one in full precision (a model, a state dict, a
            folder or a hub id) to merge onto instead.

    Raises:
        ValueError: not a PEFT model around a transformers model, a base for one that is not
            quantized, or a model that would not load as it is; the folder is as it was then.
        OSError: the files cannot be written; what was in the folder is still there.
    """
    check_model(model, "save_merged")
    merged = merged_model(model, base)
    whole = _with_what_is_around(model, merged)
    with folder_written_whole(Path(path), MODEL_CONFIG, _MODEL_FILES) as staged:
        write_model(whole, staged)


def merged_model(model: nn.Module, base: Base | None = None) -> PreTrainedModel:
    """The model that `save_merged` writes; the arguments and errors are its own."""
    wrapped = _require_peft_model(model)
    check_factors(wrapped)
    sharding.require_whole(wrapped, "merging")
    own = peft_layers.base_model(wrapped)
    if not hasattr(own, "save_pretrained"):
        raise ValueError(
            f"{type(own).__name__} is not a transformers model: write its adapter with "
            "scalora.save_adapter, or merge a copy (PEFT's merge_and_unload, or merge() of every "
            "layer) and save its state_dict yourself."
        )
    peft_layers.check_mergeable(wrapped)
    if any(map(peft_layers.is_quantized, peft_layers.all_lora_pairs(wrapped))):
        apart = _in_full_precision(wrapped, base)
    elif base is not None:
        raise ValueError("this model is not quantized and has its own base: leave base out.")
    else:
        apart = peft_layers.copied(wrapped)
    peft_layers.untie_adapted_weights(apart)
    with keeping_ties(apart):
        merged = peft_layers.merge_and_unload(apart)
    settle_ties(merged)
    return merged


def _with_what_is_around(model: nn.Module, merged: PreTrainedModel) -> Any:
    """The merged model, in a copy of what it is a part of if that is saved with its parts.

    A ``SentenceTransformer`` is; wrappers such as DDP have no ``save_pretrained``.
    """
    adapted = _require_peft_model(model)
    if adapted is model or not hasattr(type(model), "save_pretrained"):
        return merged
    return copy.deepcopy(model, {id(adapted): merged})


def _in_full_precision(model: nn.Module, base: Base | None) -> nn.Module:
    adapter = peft_layers.active_adapter(model)
    with tempfile.TemporaryDirectory() as folder:
        if base is None:  # onto the model's own base, which has in it what was folded
            factors, keep_dora = _all_beside(model, adapter, None)
            _write_adapter(model, Path(folder), adapter, factors, {}, keep_dora)
        else:
            save_adapter(model, folder, base=base, adapter_name=adapter)
        target = full_precision_base(model, base)
        return peft_layers.PeftModel.from_pretrained(target, folder)


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    rank: int | None = None,
    base: Base | None = None,
    *,
    adapter_name: str | None = None,
) -> dict[str, float]:
    """Write everything learned as one ordinary PEFT LoRA adapter for the pretrained base.

    What is beside the base, adapter and carry together, is one pair of factors of rank r + R and is
    written as it is.  Where increments were folded into the base, the change of the weight is cut
    to ``rank`` by an SVD.  Either way no adapter of that rank is closer.  The adapter loads with
    ``PeftModel.from_pretrained`` where this package is not installed.

    As PEFT does, it takes along an adapted embedding or head, and both of a vocabulary of another
    size than the pretrained one's: resize the base alike before the adapter is loaded.  Where the
    vocabulary was changed, what was folded into those stays in them.

    Args:
        model: the fine-tuned model (or a module around it), as for `save_merged`.
        path: folder, created if need be.  It takes in both files or neither, and keeps others.
        rank: of every layer; None for all of it, and for what was folded the smallest rank that
            keeps a layer's error at most 1e-4.
        base: the pretrained model, its state dict, or a folder or hub id to load it from; may be
            left out while nothing has been folded.  Pass it after ``model.load_state_dict`` in a
            new process: nothing in the model then says that its base has changed.  A quantized
            base never changes and needs none.
        adapter_name: None for the active adapter.

    Returns:
        Layer name -> relative error ``|change - saved|_F / |change|_F``.  Layers that stay plain
        LoRA because their change is not one matrix are saved as they are.

    Raises:
        ValueError: a rank below 1, a base that is missing or belongs to another model, or one that
            is quantized and was changed by the adapter's initialisation.
        OSError: the files cannot be written; what was in the folder is still there.
    """
    check_model(model, "save_adapter")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} must be at least 1.")
    wrapped = _require_peft_model(model)
    check_factors(wrapped)
    sharding.require_whole(wrapped, "save_adapter")
    name = adapter_name or peft_layers.active_adapter(model)
    if not peft_layers.lora_pairs(wrapped, name):
        raise ValueError(f"the model has no LoRA adapter named {name!r}.")
    grown = peft_layers.vocabulary_changed(wrapped, name)
    return write_adapter(wrapped, Path(path), rank, base, name, grown)


@torch.no_grad()
def write_adapter(
    model: peft_layers.PeftModel,
    folder: Path,
    rank: int | None,
    base: Base | None,
    name: str,
    grown: bool,
) -> dict[str, float]:
    """`save_adapter` for one who knows whether the vocabulary was changed (``grown``)."""
    pairs = peft_layers.lora_pairs(model, name)
    beside = [pair for pair in pairs if pair.carry is not None or peft_layers.is_quantized(pair)]
    if any(map(peft_layers.is_quantized, pairs)):
        _check_initialisation(model, name)
    embeddings = peft_layers.saved_embeddings(model, name, grown)
    moved = base_has_moved(model, name)
    if 0 < len(beside) == len(pairs) and not moved:
        factors, keep_dora = _all_beside(model, name, rank)
    else:
        keep_dora = False
        # An initialisation that moved the base moved it under a carry too.
        at_creation = peft_layers.moves_base_at_creation(model, name)
        thin = [p for p in beside if not (at_creation or p.was_rebased or p.has_variant)]
        factors = {pair.name: _factors_beside(pair, rank) for pair in thin}
        stored = set(map(peft_layers.base_weight_name, embeddings)) if grown else set()
        whole = [p for p in pairs if f"{p.name}.weight" in stored and p not in thin]
        factors |= {pair.name: _factors_on_own_base(pair, rank) for pair in whole}
        changes = weight_changes(model, base, name, [*thin, *whole])
        for layer, (pair, change) in changes.items():
            factors[layer] = _best_factors(pair.as_matrix(change), rank)
        if moved or base is not None:  # those changes are beside the pretrained weights
            embeddings = {
                file_name: weight
                for file_name, weight in embeddings.items()
                if peft_layers.base_weight_name(file_name).rpartition(".")[0] not in changes
            }
    return _write_adapter(model, folder, name, factors, embeddings, keep_dora)


def _all_beside(
    model: nn.Module, adapter: str, rank: int | None
) -> tuple[dict[str, _Factors], bool]:
    """What is beside the base of every layer, and that DoRA's magnitude is to be kept."""
    pairs = filter(has_one_change, peft_layers.lora_pairs(model, adapter))
    return {pair.name: _factors_beside(pair, rank) for pair in pairs}, True


def _write_adapter(
    model: nn.Module,
    folder: Path,
    adapter: str,
    factors: dict[str, _Factors],
    embeddings: dict[str, Tensor],
    keep_dora: bool,
) -> dict[str, float]:
    """Write the adapter with these factors and base weights; layer name -> relative error."""
    products = {layer: (P, Q) for layer, (P, Q, _) in factors.items()}
    tensors, config = peft_layers.adapter_with_factors(
        model, adapter, products, keep_dora=keep_dora
    )
    tensors |= embeddings
    with folder_written_whole(folder, ADAPTER_CONFIG, ("adapter_model.bin",)) as staged:
        write_tensors(staged / _ADAPTER_FILE, tensors, {"format": "pt"})
        config.save_pretrained(str(staged))
    return {layer: error for layer, (_, _, error) in factors.items()}


def _check_initialisation(model: nn.Module, adapter: str) -> None:
    if peft_layers.moves_base_at_creation(model, adapter):
        raise ValueError(
            f"the initialisation of adapter {adapter!r} (init_lora_weights) changed the quantized "
            "base, so no adapter for the original one gives this model; use scalora.save_merged."
        )


def _factors_beside(pair: peft_layers.LoRAPair, rank: int | None) -> _Factors:
    """Of adapter and carry together."""
    up, down = pair.scaling * pair.learned_P, pair.learned_Q
    if rank is None or rank >= up.shape[1]:
        return up.float(), down.mT.float(), 0.0
    cut = compress(up, down, rank)
    error = float((cut.cut / cut.energy).sqrt()) if cut.energy > 0 else 0.0
    return cut.up.float(), cut.down.mT.float(), error


def _factors_on_own_base(pair: peft_layers.LoRAPair, rank: int | None) -> _Factors:
    """Of what is beside the base weight as it is now, which the adapter's files hold too."""
    if pair.has_variant:
        return _best_factors(pair.as_matrix(pair.learned_change()), rank)
    return _factors_beside(pair, rank)


def _best_factors(matrix: Tensor, rank: int | None) -> _Factors:
    """Of the best approximation of a matrix (m, n)."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    k = _rank_within_tolerance(sigma) if rank is None else min(rank, len(sigma))
    root = sigma[:k].sqrt()
    P, Q = (U[:, :k] * root).float(), (Vh[:k].T * root).float()
    norm = torch.linalg.norm(matrix)
    return P, Q, float(torch.linalg.norm(matrix - P @ Q.T) / norm) if norm > 0 else 0.0


def _rank_within_tolerance(sigma: Tensor) -> int:
    """The smallest rank, 1 at least, whose cut leaves a relative error within the tolerance."""
    tail = sigma.double().square().flip(0).cumsum(0).flip(0)
    return max(1, int((tail > tail[0] * _TOLERANCE**2).sum()))


def _require_peft_model(model: nn.Module) -> nn.Module:
    """The one of `peft_layers.adapted_models`."""
    adapted = peft_layers.adapted_models(model)
    if not adapted:
        raise ValueError(
            f"{type(model).__name__} is no model with PEFT's adapters, nor a module around one."
        )
    if len(adapted) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(adapted)} models with adapters, at "
            f"{sorted(adapted)}: save each by itself."
        )
    return next(iter(adapted.values()))
