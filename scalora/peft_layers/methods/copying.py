"""A copy of a PEFT model that can be merged while the model itself goes on training."""

from __future__ import annotations

import copy
from typing import TypeVar

from peft.tuners.lora import layer as lora_layers
from torch import nn

_Model = TypeVar("_Model", bound=nn.Module)


def copied(model: _Model) -> _Model:
    """Return a deep copy of the model.

    A layer whose factors are tied to an embedding's (``ensure_weight_tying``) keeps the views that
    PEFT made them from.  Nothing reads those any more and torch cannot copy them: the copy has the
    very same.
    """
    views = {
        id(view): view
        for module in model.modules()
        if isinstance(module, lora_layers.LoraLayer)
        for view in (getattr(module, "kwargs", {}).get("tied_adapter") or {}).values()
    }
    return copy.deepcopy(model, dict(views))
