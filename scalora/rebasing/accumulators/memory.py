"""Per-layer state that re-basing remembers from step to step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LayerMemory:
    """Per-layer state that PEFT's modules do not hold.

    Attributes:
        index: the layer's place in the model, part of its rounding noise's seed.
        lipschitz_lr: 0-d, the smoothness constant L times the learning rate, matched at the layer's
            first re-basing and held from then on; None or NaN before it.
        residual: what rounding cut from the base weight; ``rounding="compensated"`` only.
    """

    index: int
    lipschitz_lr: Tensor | None = None
    residual: Tensor | None = None
