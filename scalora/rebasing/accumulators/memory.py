"""What re-basing remembers of one layer from step to step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LayerMemory:
    """One layer's, beside what its modules hold.

    Attributes:
        index: the layer's place in the model, part of its rounding noise's seed.
        product: L times the learning rate, calibrated at the layer's first re-basing, 0-d; None
            or NaN before it.
        residual: what rounding cut from the base weight; ``rounding="compensated"`` only.
    """

    index: int
    product: Tensor | None = None
    residual: Tensor | None = None
