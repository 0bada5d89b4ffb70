"""The dense accumulator: increments are added to the base weight, in place."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from scalora import sharding
from scalora.fold import fold, noise_seed
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair, storage_address
from scalora.rebasing.accumulators.accumulator import Accumulator
from scalora.rebasing.accumulators.commit import commit
from scalora.rebasing.accumulators.memory import LayerMemory
from scalora.sharding.stacks import Write

_HALF_PRECISION = (torch.bfloat16, torch.float16)


class DenseAccumulator(Accumulator):
    """Folds increments into base weights.

    Args:
        options: of rounding.
        memory: layer name -> where the remainder of rounding is kept.
    """

    def __init__(self, options: RebasingOptions, memory: Mapping[str, LayerMemory]) -> None:
        self.options = options
        self.memory = memory

    def key(self, pair: LoRAPair) -> Hashable:
        """Return the base weight's shape, dtype and layout."""
        base = pair.base_weight
        return base.shape, base.dtype, pair.base_is_transposed, sharding.layout(base)

    def commit(
        self,
        pairs: Sequence[LoRAPair],
        left: Tensor,
        right: Tensor,
        writes: Sequence[Write],
        count: int,
    ) -> None:
        """Add the increments to the base weights, then write the layers where that was done."""
        bases = [sharding.local(pair.base_weight) for pair in pairs]
        commit(
            lambda: self._fold(pairs, bases, left, right, count),
            bases,
            writes,
            lambda i: pairs[i].mark_rebased(),
        )

    def _fold(
        self,
        pairs: Sequence[LoRAPair],
        bases: Sequence[Tensor],
        left: Tensor,
        right: Tensor,
        count: int,
    ) -> None:
        first, (m, n) = pairs[0], pairs[0].shape
        if first.base_is_transposed:
            left, right, m, n = right, left, n, m
        right = sharding.rows_of(first.P_parameter).gathered(right, 1, n)
        if sharding.layout(first.base_weight) != sharding.layout(first.P_parameter):
            left = sharding.rows_of(first.P_parameter).gathered(left, 1, m)
            left = left[:, sharding.own_rows(first.base_weight)]
        matrices = [base if base.ndim == 2 else base.detach().flatten(1) for base in bases]
        rounds = bases[0].dtype in _HALF_PRECISION
        fold(
            matrices,
            left,
            right,
            rounding=self.options.rounding,
            seeds=self._seeds(pairs, count) if rounds else [],
            residuals=self._residuals(pairs, matrices) if rounds else [],
            first_row=sharding.own_rows(first.base_weight).start,
            scale=first.scaling,
        )
        for base, matrix in zip(bases, matrices, strict=True):
            if base.ndim == 2:
                break
            # channels_last has no matrix view
            if storage_address(matrix) != storage_address(base):
                base.detach().copy_(matrix.view_as(base))

    def _seeds(self, pairs: Sequence[LoRAPair], count: int) -> list[int]:
        """Return the seed of each layer's rounding noise in this re-basing."""
        return [
            noise_seed(self.options.seed, count, self.memory[pair.name].index) for pair in pairs
        ]

    def _residuals(self, pairs: Sequence[LoRAPair], matrices: Sequence[Tensor]) -> list[Tensor]:
        """Return where each layer keeps the remainder of rounding, zeros at first."""
        if self.options.rounding != "compensated":
            return []
        residuals = []
        for pair, matrix in zip(pairs, matrices, strict=True):
            memory = self.memory[pair.name]
            if memory.residual is None:
                memory.residual = torch.zeros_like(matrix)
            residuals.append(memory.residual)
        return residuals
