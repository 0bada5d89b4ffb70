"""The place where increments go, as a re-basing sees it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from torch import Tensor

from scalora.peft_layers import LoRAPair
from scalora.sharding.stacks import Write


class Accumulator(Protocol):
    """Takes in the increments of layers."""

    def key(self, pair: LoRAPair) -> Hashable:
        """Return what must agree, beyond the factors, for layers to be served by one call."""
        return type(self)

    def takes(self, pair: LoRAPair, columns: int) -> bool:
        """Return whether the layer takes in another increment of that many columns."""
        return True

    def make_room(self, pairs: Sequence[LoRAPair], columns: int) -> None:
        """Make room in every layer for one more increment, without changing its function.

        Args:
            pairs: the layers.
            columns: of the increment.
        """
        return

    def commit(
        self,
        pairs: Sequence[LoRAPair],
        left: Tensor,
        right: Tensor,
        writes: Sequence[Write],
        count: int,
    ) -> None:
        """Take in ``s left right^T`` and write what else changes, of each layer all or nothing.

        Args:
            pairs: layers of one `key` and scaling, with room.
            left: (layers, m, k), the rows held here.
            right: (layers, n, k), likewise.
            writes: factors, gradients and moments in the new coordinates.
            count: the number of this re-basing, part of the rounding noise's seed.
        """
        raise NotImplementedError
