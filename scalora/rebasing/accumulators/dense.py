"""The dense accumulator: increments are added to the base weight, in place."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from scalora import sharding
from scalora.fold import fold, noise_seed
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair, storage_address
from scalora.rebasing.accumulators.commit import commit
from scalora.rebasing.accumulators.memory import LayerMemory
from scalora.sharding.stacks import Write


class DenseAccumulator:
    """Folds increments into base weights.

    Args:
        options: of rounding.
        memory: layer name -> where what rounding cut is kept.
    """

    def __init__(self, options: RebasingOptions, memory: Mapping[str, LayerMemory]) -> None:
        self.options = options
        self.memory = memory

    def key(self, pair: LoRAPair) -> Hashable:
        """The base weight's shape, dtype and layout."""
        base = pair.base_weight
        return base.shape, base.dtype, pair.base_is_transposed, sharding.layout(base)

    def takes(self, pair: LoRAPair, columns: int) -> bool:
        """Always."""
        return True

    def make_room(self, pairs: Sequence[LoRAPair], columns: int) -> None:
        """Nothing to do."""

    def commit(
        self,
        pairs: Sequence[LoRAPair],
        left: Tensor,
        right: Tensor,
        writes: Sequence[Write],
        count: int,
    ) -> None:
        """Add the increments to the base weights, then write where that was done."""
        left = left * pairs[0].scaling
        commit(
            lambda: self._fold(pairs, left, right, count),
            [sharding.local(pair.base_weight) for pair in pairs],
            writes,
            lambda i: pairs[i].mark_rebased(),
        )

    def _fold(self, pairs: Sequence[LoRAPair], left: Tensor, right: Tensor, count: int) -> None:
        memories = [self.memory[pair.name] for pair in pairs]
        first, (m, n) = pairs[0], pairs[0].shape
        if first.base_is_transposed:
            left, right, m, n = right, left, n, m
        right = sharding.rows_of(first.P_parameter).whole(right, 1, n)
        if sharding.layout(first.base_weight) != sharding.layout(first.P_parameter):
            left = sharding.rows_of(first.P_parameter).whole(left, 1, m)
            left = left[:, sharding.own_rows(first.base_weight)]
        bases = [sharding.local(pair.base_weight) for pair in pairs]
        matrices = [base.detach().flatten(1) for base in bases]
        residuals: list[Tensor] = []
        if self.options.rounding == "compensated" and bases[0].dtype in (
            torch.bfloat16,
            torch.float16,
        ):
            for memory, matrix in zip(memories, matrices, strict=True):
                if memory.residual is None:
                    memory.residual = torch.zeros_like(matrix)
                residuals.append(memory.residual)
        fold(
            matrices,
            left,
            right,
            rounding=self.options.rounding,
            seeds=[noise_seed(self.options.seed, count, memory.index) for memory in memories],
            residuals=residuals,
            first_row=sharding.own_rows(first.base_weight).start,
        )
        for base, matrix in zip(bases, matrices, strict=True):
            # channels_last has no matrix view
            if storage_address(matrix) != storage_address(base):
                base.detach().copy_(matrix.view_as(base))
