"""``add_weighted_adapter``, PEFT's combination of adapters, with their frozen increments.

Held by tests/peft_layers/test_combined_adapters.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from scalora.peft_layers.finding import all_lora_pairs
from scalora.peft_layers.pair import LoRAPair, folded_adapters
from scalora.warning import warn

_METHOD = "add_weighted_adapter"


def guard_combinations(tuner: Any) -> None:
    """Make ``add_weighted_adapter`` of PEFT's LoRA model combine carries too, or warn or refuse."""
    if hasattr(type(tuner), _METHOD) and _METHOD not in vars(tuner):
        setattr(tuner, _METHOD, partial(_add_weighted_adapter, tuner))


def _add_weighted_adapter(tuner: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do what the method does, and combine the carries."""
    method = getattr(type(tuner), _METHOD)
    call = inspect.signature(method).bind(tuner, *args, **kwargs)
    call.apply_defaults()
    combination = call.arguments
    if combination["adapter_name"] in tuner.peft_config:  # PEFT does nothing then
        return method(tuner, *args, **kwargs)
    pairs = all_lora_pairs(tuner)
    combined = [pair for pair in pairs if pair.adapter in combination["adapters"]]
    adds_products = _adds_products(combination)
    if any(pair.has_carry for pair in combined) and not adds_products:
        _check_carries(combined, combination)
    _warn_of_folded(pairs)
    result = method(tuner, *args, **kwargs)
    if adds_products:
        made = [p for p in all_lora_pairs(tuner) if p.adapter == combination["adapter_name"]]
        _carry_along(combined, made, combination)
    return result


def _adds_products(combination: Mapping[str, Any]) -> bool:
    """Return whether the new adapter's product is the weighted sum of the others' products."""
    return len(combination["adapters"]) == 1 or combination["combination_type"] == "cat"


def _check_carries(combined: Sequence[LoRAPair], combination: Mapping[str, Any]) -> None:
    """Raise a ValueError, or warn, where a carry would be left out or cut."""
    names = ", ".join(map(repr, sorted({pair.adapter for pair in combined if pair.has_carry})))
    ranks: dict[str, int] = {}
    for pair in combined:
        ranks[pair.name] = ranks.get(pair.name, 0) + pair.learned_rank
    whole = max(min(ranks[pair.name], *pair.shape) for pair in combined)
    kind = combination["combination_type"]
    # PEFT computes the svd types from the changes of the weights, which include the carry, and all
    # others from the factors alone.
    if not kind.endswith("svd"):
        raise ValueError(
            f"combination_type={kind!r} mixes factors, and part of what {names} learned is in "
            "ScaLoRA's carry beside them, which would be left out. Use combination_type='cat', "
            "which keeps all of it, or 'svd' with a svd_rank. Nothing was changed."
        )
    if combination["svd_rank"] is None:
        warn(
            f"the combination of {names} is cut to the adapters' own rank, but with ScaLoRA's "
            f"carry it has up to {whole} ranks: use combination_type='cat', which keeps all of "
            "them, or pass a svd_rank."
        )


def _carry_along(
    combined: Sequence[LoRAPair], made: Sequence[LoRAPair], combination: Mapping[str, Any]
) -> None:
    """Give the new adapter the weighted sum of the combined adapters' carries."""
    sources = {(pair.name, pair.adapter): pair for pair in combined if pair.has_carry}
    weights = list(zip(combination["adapters"], combination["weights"], strict=True))
    for pair in made:
        ups, downs, cut, columns = [], [], torch.zeros(()), 0
        for adapter, weight in weights:
            source = sources.get((pair.name, adapter))
            if source is None or source.carry is None:
                continue
            factor = weight * source.scaling / pair.scaling
            state = source.carry.state()
            ups.append(state["up"].to(source.carry.wide_dtype))
            downs.append(factor * state["down"].to(source.carry.wide_dtype))
            cut = cut.to(state["cut"]) + factor**2 * state["cut"]
            columns += state["up"].shape[1]
        if columns:
            whole = {"up": torch.cat(ups, 1), "down": torch.cat(downs), "cut": cut}
            carry = pair.ensure_carry(columns, whole["up"].dtype)
            carry.load({**whole, "capacity": torch.tensor(columns)})


def _warn_of_folded(pairs: Sequence[LoRAPair]) -> None:
    """Warn if increments of an adapter are in the base weights, under every combination."""
    folded = sorted({p.adapter for p in pairs if p.adapter in folded_adapters(p.module)})
    if folded:
        names = ", ".join(map(repr, folded))
        warn(
            f"ScaLoRA has folded part of what {names} learned into the base weights: that is under "
            "every combination, and with the weight 1. Call scalora.save_adapter(model, path, "
            "base=...) and combine that with others on the pretrained model, or train with "
            "accumulator='carry'."
        )
