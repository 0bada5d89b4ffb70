"""Selection of the LoRA layers that are re-based, and the places that their increments go to.

Of every other layer it says why it is left out.

Held by tests/peft_layers/test_layers.py and tests/rebasing/test_carry_training.py.
"""

from __future__ import annotations

import torch
from torch import nn

from scalora import peft_layers
from scalora.guards.layers import check_engine
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair
from scalora.rebasing.coordinates import increment_columns
from scalora.warning import warn


def places_of_layers(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: RebasingOptions
) -> dict[LoRAPair, str]:
    """Return the layers to re-base -> "dense" or "carry"; warn of those that stay plain LoRA.

    Raises:
        ValueError: the model has no such adapter, none of its layers can be re-based, a base
            weight is tied to another module and would have to take increments, or a carry would
            have no room for two increments.
    """
    pairs = peft_layers.lora_pairs(model, options.adapter_name)
    if not pairs:
        names = sorted(peft_layers.adapter_names(model))
        raise ValueError(
            f"the model has no LoRA adapter named {options.adapter_name!r} "
            f"(adapters found: {names}). Create one with peft.get_peft_model, or pass adapter_name."
        )
    check_engine(model)
    if options.resolved_rule == "none":
        return {}
    users = peft_layers.sharing_modules(model)
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    places: dict[LoRAPair, str] = {}
    left: dict[str, str] = {}
    for pair in pairs:
        reason = _why_nowhere(pair, users, options) or _why_not_stepped(pair, stepped, users)
        if reason is None:
            places[pair] = _place(pair, users, options)
        else:
            left[pair.name] = reason
    _warn_of_vocabulary(model, options.adapter_name)
    if not places:
        name, reason = next(iter(left.items()))
        raise ValueError(f"no LoRA layer can be re-based; for example {name!r}: {reason}.")
    if left:
        listed = "; ".join(f"{name} ({reason})" for name, reason in left.items())
        warn(f"{len(left)} LoRA layers stay plain LoRA, they are not re-based: {listed}.")
    return places


def _warn_of_vocabulary(model: nn.Module, adapter: str) -> None:
    wrapped = peft_layers.peft_model(model)
    lost = [] if wrapped is None else peft_layers.forgotten_embeddings(wrapped, adapter)
    if lost:
        warn(
            f"the vocabulary was changed, and PEFT leaves {lost} out of the adapters that it "
            "writes: a Trainer's checkpoint, or save_pretrained, does not bring the new tokens' "
            "rows back. scalora.save_adapter and save_merged do; for checkpoints add those modules "
            "to modules_to_save."
        )


def _why_nowhere(
    pair: LoRAPair, users: dict[int, list[str]], options: RebasingOptions
) -> str | None:
    """Return why no accumulator that was asked for can take the layer's increments, or None."""
    not_dense, no_carry = peft_layers.why_not_dense(pair), peft_layers.why_no_carry(pair)
    if options.accumulator == "auto":
        # The base weight of a tied layer takes none.
        dense = not_dense is None and len(_sharing(pair, users)) == 1
        return None if dense else no_carry
    return not_dense if options.accumulator == "dense" else no_carry


def _place(pair: LoRAPair, users: dict[int, list[str]], options: RebasingOptions) -> str:
    """Return where the layer's increments go, "dense" or "carry"."""
    not_dense = peft_layers.why_not_dense(pair)
    sharing = [] if not_dense else _sharing(pair, users)
    if options.accumulator == "dense" and len(sharing) > 1:
        raise ValueError(
            f"the base weight of {pair.name!r} is tied: {sharing} share it, and folding an "
            "increment into one would change the others. Use accumulator='carry', leave this layer "
            "out of target_modules, or untie the weights (tie_word_embeddings=False)."
        )
    if options.accumulator == "carry" or len(sharing) != 1:
        _check_carry(pair, options)
        return "carry"
    return "dense"


def _sharing(pair: LoRAPair, users: dict[int, list[str]]) -> list[str]:
    """Return the names of all modules that use the layer's base weight, its own among them."""
    return users[peft_layers.storage_address(pair.base_weight)]


def _check_carry(pair: LoRAPair, options: RebasingOptions) -> None:
    least = 2 * increment_columns(pair, P_alone=options.scales_P_alone)
    if not isinstance(options.carry_rank, str) and options.carry_rank < least:
        raise ValueError(
            f"carry_rank={options.carry_rank} is too small for {pair.name!r}: every re-basing adds "
            f"{least // 2} columns, and two of them must fit. Pass {least} at least, or 'auto'."
        )


def _why_not_stepped(pair: LoRAPair, stepped: set[int], users: dict[int, list[str]]) -> str | None:
    for parameter in (pair.P_parameter, pair.Q_parameter):
        if not parameter.requires_grad:
            return "one of its factors is frozen"
        if id(parameter) not in stepped:
            return "its parameters are not in the optimizer"
        if len(users.get(peft_layers.storage_address(parameter), [])) > 1:
            return "its factors are shared with another layer"
    return None
