"""Repairs to bitsandbytes' 4-bit layers that were evaluated on a CPU.

To evaluate on some CPUs bitsandbytes rearranges codes and scales in place, and ``state_dict()`` of
the layer takes that back.  It forgets scales that are not quantized themselves: they stay (blocks
per row, rows), and every weight with more than one block per row is wrong from then on.

Held by tests/saving/test_quantized_saving.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unpack(layer: nn.Module) -> None:
    """Arrange a layer's codes and scales as they were before the layer was evaluated."""
    state: Any = getattr(layer._parameters.get("weight"), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()
    put_scales_back(layer)


@torch.no_grad()
def put_scales_back(model: nn.Module) -> None:
    """Transpose scales that ``state_dict()`` has left the wrong way round, in all of a model."""
    for module in model.modules():
        state: Any = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            continue
        scales = getattr(state, "absmax", None)
        if scales is not None and scales.ndim == 2:
            state.absmax = scales.mT.reshape(-1).float()
