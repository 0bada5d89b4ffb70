"""Merging the adapters of a model into it, whichever way they were put on."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from scalora.peft_layers.finding import all_lora_pairs
from scalora.peft_layers.methods.misleading import OUTSPOKEN
from scalora.peft_layers.methods.pretrained_methods import COMPLETED


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge the active adapters of one of `adapted_models`, in place, and return the plain model.

    What PEFT's method of that name does, also for a model without PEFT's wrapper.
    """
    if isinstance(model, PeftModel):
        return model.merge_and_unload()
    merged: Any = _tuner_around(model).merge_and_unload()
    for name in {*COMPLETED, *OUTSPOKEN} & vars(merged).keys():
        delattr(merged, name)
    if hasattr(merged, "_hf_peft_config_loaded"):
        merged._hf_peft_config_loaded = False
    return merged


def check_mergeable(model: nn.Module) -> None:
    """Raise a ValueError if a bias of ``lora_bias`` has no bias of the base to be merged into."""
    for pair in all_lora_pairs(model):
        base: Any = pair.module.get_base_layer()
        biased = getattr(pair.module, "lora_bias", {}).get(pair.adapter, False)
        if biased and pair.runs and getattr(base, "bias", None) is None:
            raise ValueError(
                f"{pair.name!r} has no bias that the adapter's (lora_bias=True) could be merged "
                "into: use scalora.save_adapter. Nothing was written."
            )


def _tuner_around(model: Any) -> LoraModel:
    """PEFT's own, as it was when it put the layers into the model; it does not keep it."""
    tuner = LoraModel.__new__(LoraModel)
    nn.Module.__init__(tuner)
    tuner.model = model
    tuner.peft_config = model.peft_config
    tuner.targeted_module_names = [
        name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    return tuner
