"""Everything that was learned, written as one ordinary PEFT adapter.

Held by tests/saving/test_saving.py and tests/saving/test_quantized_saving.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from scalora import peft_layers, sharding
from scalora.arguments import check_model
from scalora.autocast import without_autocast
from scalora.carry import compress
from scalora.files import folder_written_whole, write_tensors
from scalora.guards.watches import check_factors
from scalora.peft_layers import LoRAPair
from scalora.saving.pretrained import Base, base_has_moved, has_one_change, weight_changes

_TOLERANCE = 1e-4

Factors = tuple[Tensor, Tensor, float]
"""P (m, k) and Q (n, k) in float32, and the relative error of their product."""


@torch.no_grad()
@without_autocast()
def save_adapter(
    model: nn.Module,
    path: str | PathLike[str],
    rank: int | None = None,
    base: Base | None = None,
    *,
    adapter_name: str | None = None,
) -> dict[str, float]:
    """Write everything learned as one ordinary PEFT LoRA adapter for the pretrained base.

    Adapter and carry together are one pair of factors of rank r + R, and are written as they are.
    Where increments were folded into the base, the change of the weight is cut to ``rank`` by an
    SVD.  Either way no adapter of that rank is closer (Eckart and Young 1936).  The adapter loads
    with ``PeftModel.from_pretrained`` where this package is not installed.

    As with PEFT, an adapted embedding or head is part of the files, and so are both where the
    vocabulary's size is not the pretrained one's: resize the base alike before loading the adapter.
    Where the vocabulary was changed, what was folded into embedding and head stays in them.

    Args:
        model: the fine-tuned model (or a module around it), as for `save_merged`.
        path: a folder, created if need be.  It gets both files or neither, and keeps others.
        rank: rank of every layer.  None keeps all of it; where increments were folded, None takes
            the smallest rank with a relative error of at most 1e-4 in that layer.
        base: the pretrained model, its state dict, or a folder or hub id to load it from.  It may
            be left out while nothing has been folded.  Pass it after ``model.load_state_dict`` in a
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
    adapted = peft_layers.one_adapted_model(model)
    check_factors(adapted)
    sharding.require_whole(adapted, "save_adapter")
    name = adapter_name or peft_layers.active_adapter(model)
    if not peft_layers.lora_pairs(adapted, name):
        raise ValueError(f"the model has no LoRA adapter named {name!r}.")
    grown = peft_layers.vocabulary_changed(adapted, name)
    return write_adapter(adapted, Path(path), rank, base, name, grown)


@torch.no_grad()
def write_adapter(
    model: nn.Module,
    folder: Path,
    rank: int | None,
    base: Base | None,
    adapter: str,
    grown: bool,
) -> dict[str, float]:
    """Write an adapter as `save_adapter` does, without its checks.

    Args:
        model: one of `peft_layers.adapted_models`.
        folder, rank, base: as in `save_adapter`.
        adapter: the adapter's name.
        grown: whether the vocabulary was changed before training.
    """
    pairs = peft_layers.lora_pairs(model, adapter)
    if any(map(peft_layers.is_quantized, pairs)):
        _check_initialisation(model, adapter)
    embeddings = peft_layers.saved_embeddings(model, adapter, grown)
    moved = base_has_moved(model, adapter)
    beside = [pair for pair in pairs if pair.carry is not None or peft_layers.is_quantized(pair)]
    if 0 < len(beside) == len(pairs) and not moved:
        factors = factors_beside(pairs, rank)
        return write_factors(model, folder, adapter, factors, embeddings, keep_dora=True)
    # An initialisation that moved the base moved it under a carry too.
    at_creation = peft_layers.moves_base_at_creation(model, adapter)
    thin = [p for p in beside if not (at_creation or p.was_rebased or p.has_variant)]
    stored = set(map(peft_layers.base_weight_name, embeddings)) if grown else set()
    on_own_base = [p for p in pairs if f"{p.name}.weight" in stored and p not in thin]
    factors = {pair.name: _factors_beside(pair, rank) for pair in thin}
    factors |= {pair.name: _factors_on_own_base(pair, rank) for pair in on_own_base}
    changes = weight_changes(model, base, adapter, [*thin, *on_own_base])
    for layer, (pair, change) in changes.items():
        factors[layer] = _best_factors(pair.as_matrix(change), rank)
    if moved or base is not None:  # these changes are relative to the pretrained weights
        embeddings = {
            name: weight
            for name, weight in embeddings.items()
            if peft_layers.base_weight_name(name).rpartition(".")[0] not in changes
        }
    return write_factors(model, folder, adapter, factors, embeddings, keep_dora=False)


def write_factors(
    model: nn.Module,
    folder: Path,
    adapter: str,
    factors: dict[str, Factors],
    embeddings: dict[str, Tensor],
    *,
    keep_dora: bool,
) -> dict[str, float]:
    """Write an adapter's files with other factors in it.

    Args:
        model: one of `peft_layers.adapted_models`.
        folder: the folder to write, whole or not at all.
        adapter: the adapter's name.
        factors: layer name -> its factors; other layers keep their own.
        embeddings: base weights to write too, by their names in PEFT's files.
        keep_dora: as in `peft_layers.adapter_with_factors`.

    Returns:
        Layer name -> relative error.
    """
    products = {layer: (P, Q) for layer, (P, Q, _) in factors.items()}
    tensors, config = peft_layers.adapter_with_factors(
        model, adapter, products, keep_dora=keep_dora
    )
    tensors |= embeddings
    last, stale = peft_layers.ADAPTER_CONFIG, ("adapter_model.bin",)
    with folder_written_whole(folder, last, stale) as staged:
        write_tensors(staged / peft_layers.ADAPTER_FILE, tensors, {"format": "pt"})
        config.save_pretrained(str(staged))
    return {layer: error for layer, (_, _, error) in factors.items()}


def factors_beside(pairs: Iterable[LoRAPair], rank: int | None) -> dict[str, Factors]:
    """Return the factors of adapter and carry together, by layer; under DoRA, of the product alone.

    Layers whose change is not one matrix are left out.
    """
    return {pair.name: _factors_beside(pair, rank) for pair in pairs if has_one_change(pair)}


def _check_initialisation(model: nn.Module, adapter: str) -> None:
    """Raise a ValueError if the adapter's initialisation changed the quantized base."""
    if peft_layers.moves_base_at_creation(model, adapter):
        raise ValueError(
            f"the initialisation of adapter {adapter!r} (init_lora_weights) changed the quantized "
            "base, so no adapter for the original one gives this model; use scalora.save_merged."
        )


def _factors_beside(pair: LoRAPair, rank: int | None) -> Factors:
    """Return the factors of adapter and carry together, cut to ``rank``."""
    up, down = pair.scaling * pair.learned_P, pair.learned_Q
    if rank is None or rank >= up.shape[1]:
        return up.float(), down.mT.float(), 0.0
    cut = compress(up, down, rank)
    error = float((cut.cut / cut.energy).sqrt()) if cut.energy > 0 else 0.0
    return cut.up.float(), cut.down.mT.float(), error


def _factors_on_own_base(pair: LoRAPair, rank: int | None) -> Factors:
    """Return the factors of a change relative to the present base weight, which is written too."""
    if pair.has_variant:
        return _best_factors(pair.as_matrix(pair.learned_change()), rank)
    return _factors_beside(pair, rank)


def _best_factors(matrix: Tensor, rank: int | None) -> Factors:
    """Return the factors of the best approximation of a matrix (m, n)."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    k = _rank_within_tolerance(sigma) if rank is None else min(rank, len(sigma))
    root = sigma[:k].sqrt()
    P, Q = (U[:, :k] * root).float(), (Vh[:k].T * root).float()
    norm = torch.linalg.norm(matrix)
    return P, Q, float(torch.linalg.norm(matrix - P @ Q.T) / norm) if norm > 0 else 0.0


def _rank_within_tolerance(sigma: Tensor) -> int:
    """Return the smallest rank, 1 at least, with a relative error of at most 1e-4.

    Args:
        sigma: (k,), singular values in descending order.
    """
    tail = sigma.double().square().flip(0).cumsum(0).flip(0)
    return max(1, int((tail > tail[0] * _TOLERANCE**2).sum()))
