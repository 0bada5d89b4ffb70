"""Merging the adapters of a model, or of a copy of it, into the base weights.

Held by tests/saving/test_saving.py, test_merged_ties.py and
tests/peft_layers/test_injected_adapters.py.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from scalora.peft_layers.finding import all_lora_pairs, sharing_modules
from scalora.peft_layers.methods import restore_methods
from scalora.storage import storage_address

_Model = TypeVar("_Model", bound=nn.Module)


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the active adapters of one of `adapted_models` in place, and return the plain model.

    This is PEFT's method of that name, also for a model without PEFT's wrapper.
    """
    if isinstance(model, PeftModel):
        return model.merge_and_unload()
    merged: Any = _tuner_around(model).merge_and_unload()
    restore_methods(merged)
    if hasattr(merged, "_hf_peft_config_loaded"):
        merged._hf_peft_config_loaded = False
    return merged


def check_mergeable(model: nn.Module) -> None:
    """Raise a ValueError if a bias of ``lora_bias`` has no bias of the base to be merged into."""
    for pair in all_lora_pairs(model):
        base: Any = pair.base_layer
        biased = getattr(pair.module, "lora_bias", {}).get(pair.adapter, False)
        if biased and pair.runs and getattr(base, "bias", None) is None:
            raise ValueError(
                f"{pair.name!r} has no bias that the adapter's (lora_bias=True) could be merged "
                "into: use scalora.save_adapter. Nothing was written."
            )


def copied(model: _Model) -> _Model:
    """Return a deep copy of the model.

    A layer whose factors are tied to an embedding's (``ensure_weight_tying``) keeps the views from
    which PEFT made them.  Nothing reads these any more and torch cannot copy them, so the copy
    shares them.
    """
    views = {
        id(view): view
        for module in model.modules()
        if isinstance(module, lora_layers.LoraLayer)
        for view in (getattr(module, "kwargs", {}).get("tied_adapter") or {}).values()
    }
    return copy.deepcopy(model, dict(views))


@torch.no_grad()
def untie_adapted_weights(model: nn.Module) -> None:
    """Give every adapted base weight that other modules share a storage of its own.

    Otherwise merging into it would change those modules too.
    """
    users = sharing_modules(model)
    for module in model.modules():
        if not isinstance(module, lora_layers.LoraLayer):
            continue
        base: Any = module.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is None or len(users.get(storage_address(weight), [])) < 2:
            continue
        base.weight = nn.Parameter(weight.clone(), requires_grad=weight.requires_grad)


def _tuner_around(model: Any) -> LoraModel:
    """Return PEFT's tuner as it was when it put the layers into the model, which keeps none."""
    tuner = LoraModel.__new__(LoraModel)
    nn.Module.__init__(tuner)
    tuner.model = model
    tuner.peft_config = model.peft_config
    tuner.targeted_module_names = [
        name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    return tuner
