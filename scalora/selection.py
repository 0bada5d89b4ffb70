"""Which LoRA layers are re-based, and why the others are not."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from scalora import peft_layers
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair


def pairs_to_rebase(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: RebasingOptions
) -> list[LoRAPair]:
    """The layers to re-base; one warning names those that stay plain LoRA, and why.

    Raises:
        ValueError: the model has no such adapter, none of its layers can be re-based, or a base
            weight is tied to another module.
    """
    pairs = peft_layers.lora_pairs(model, options.adapter_name)
    if not pairs:
        names = sorted(peft_layers.adapter_names(model))
        raise ValueError(
            f"the model has no LoRA adapter named {options.adapter_name!r} "
            f"(adapters found: {names}). Create one with peft.get_peft_model, or pass adapter_name."
        )
    if options.resolved_rule == "none":
        return []
    if peft_layers.peft_model(model) is None:
        warnings.warn(
            f"{type(model).__name__} is not a PeftModel: it trains, but scalora.save_merged and "
            "save_adapter need one. Make it with peft.get_peft_model.",
            UserWarning,
            stacklevel=4,
        )
    users = peft_layers.sharing_modules(model)
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    chosen, left = [], {}
    for pair in pairs:
        reason = peft_layers.why_not_rebased(pair) or _why_not_stepped(pair, stepped, users)
        if reason is not None:
            left[pair.name] = reason
            continue
        others = users.get(peft_layers.storage_address(pair.base_weight), [])
        if len(others) > 1:
            raise ValueError(
                f"the base weight of {pair.name!r} is tied: {others} share it, and folding an "
                "increment into one would change the others. Leave this layer out of "
                "target_modules, or untie the weights (tie_word_embeddings=False)."
            )
        chosen.append(pair)
    if not chosen:
        name, reason = next(iter(left.items()))
        raise ValueError(f"no LoRA layer can be re-based; for example {name!r}: {reason}.")
    if left:
        listed = "; ".join(f"{name} ({reason})" for name, reason in left.items())
        warnings.warn(
            f"{len(left)} LoRA layers stay plain LoRA, they are not re-based: {listed}.",
            UserWarning,
            stacklevel=4,
        )
    return chosen


def _why_not_stepped(pair: LoRAPair, stepped: set[int], users: dict[int, list[str]]) -> str | None:
    for parameter in (pair.P_parameter, pair.Q_parameter):
        if not parameter.requires_grad:
            return "one of its factors is frozen"
        if id(parameter) not in stepped:
            return "its parameters are not in the optimizer"
        if len(users.get(peft_layers.storage_address(parameter), [])) > 1:
            return "its factors are shared with another layer"
    return None
