"""What a re-basing asks of the place where increments go."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from torch import Tensor

from scalora.peft_layers import LoRAPair
from scalora.sharding.stacks import Write


class Accumulator(Protocol):
    """Takes in the increments of layers."""

    def key(self, pair: LoRAPair) -> Hashable:
        """What must agree, beyond the factors, for layers to be served in one call."""

    def takes(self, pair: LoRAPair, columns: int) -> bool:
        """Whether the layer is still re-based, by an increment of so many columns."""

    def make_room(self, pairs: Sequence[LoRAPair], columns: int) -> None:
        """Let every layer have room for one more increment; its function does not change.

        Args:
            pairs: the layers.
            columns: of the increment.
        """

    def commit(
        self,
        pairs: Sequence[LoRAPair],
        left: Tensor,
        right: Tensor,
        writes: Sequence[Write],
        count: int,
    ) -> None:
        """Take in ``s left right^T`` and write what else changes, a layer wholly or not at all.

        Args:
            pairs: layers of one `key` and scaling, with room.
            left: (layers, m, k), the rows held here.
            right: (layers, n, k), likewise.
            writes: factors, gradients and moments in the new coordinates.
            count: the number of this re-basing, part of the rounding noise's seed.
        """
