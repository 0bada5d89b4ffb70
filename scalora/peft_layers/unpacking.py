"""Four-bit layers of bitsandbytes that were evaluated on a CPU, and then looked at.

To evaluate on some CPUs bitsandbytes lays codes and scales out anew, in place; ``state_dict()`` of
the layer takes that back.  Of scales that are not quantized themselves it forgets to: they stay
(blocks in a row, rows), and every weight of more than one block in a row is another from then on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unpack(layer: nn.Module) -> None:
    """Lay a layer's weight out as it was before the layer was evaluated."""
    state: Any = getattr(layer._parameters.get("weight"), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()
    put_scales_back(layer)


@torch.no_grad()
def put_scales_back(model: nn.Module) -> None:
    """Put the scales in order wherever ``state_dict()`` has left them the wrong way round."""
    for module in model.modules():
        state: Any = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            continue
        scales = getattr(state, "absmax", None)
        if scales is not None and scales.ndim == 2:
            state.absmax = scales.mT.reshape(-1).float()
