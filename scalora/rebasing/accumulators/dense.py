"""The dense accumulator: increments are added to the base weight, in place."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from scalora import sharding
from scalora.fold import fold, is_rounded, noise_seed, write_whole
from scalora.moments.history import Write
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair, storage_address
from scalora.rebasing.accumulators.commit import commit


class DenseAccumulator:
    """Folds increments into base weights.

    Args:
        options: of rounding.
        pairs: all layers of the model; a layer's place is part of its rounding noise's seed.

    Attributes:
        residuals: layer name -> what rounding cut from its base weight, shaped as that, as a
            matrix; with ``rounding="compensated"`` only.
    """

    def __init__(self, options: RebasingOptions, pairs: Sequence[LoRAPair]) -> None:
        self.options = options
        self.residuals: dict[str, Tensor] = {}
        self._places = {pair.name: i for i, pair in enumerate(pairs)}

    def key(self, pair: LoRAPair) -> Hashable:
        """Return what must agree, beyond the factors, for layers to be served by one call."""
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
        """Add ``s left right^T`` to the base weights, then write the layers where that was done.

        Args:
            pairs: layers of one `key` and scaling.
            left: (layers, m, k), the rows held here.
            right: (layers, n, k), likewise.
            writes: factors, gradients and moments in the new coordinates.
            count: the number of this re-basing, part of the rounding noise's seed.
        """
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
        options = {
            "rounding": self.options.rounding,
            "first_row": sharding.own_rows(first.base_weight).start,
            "scale": first.scaling,
        }
        rounds = is_rounded(bases[0].dtype)
        seeds = self._seeds(pairs, count) if rounds else []
        residuals = self._residuals(pairs, bases) if rounds else []
        matrices = [base if base.ndim == 2 else base.detach().flatten(1) for base in bases]
        if [*map(storage_address, matrices)] == [*map(storage_address, bases)]:
            fold(matrices, left, right, seeds=seeds, residuals=residuals, **options)
            return
        # channels_last has no matrix view: a copy of each is folded into, then written back.
        for i, (base, matrix) in enumerate(zip(bases, matrices, strict=True)):
            one = slice(i, i + 1)
            kept = residuals[i] if residuals else None
            cut = None if kept is None else kept.clone()
            own = [] if cut is None else [cut]
            fold([matrix], left[one], right[one], seeds=seeds[one], residuals=own, **options)
            write_whole(base.detach(), matrix.view_as(base), kept, cut)

    def _seeds(self, pairs: Sequence[LoRAPair], count: int) -> list[int]:
        """Return the seed of each layer's rounding noise in this re-basing."""
        return [noise_seed(self.options.seed, count, self._places[pair.name]) for pair in pairs]

    def _residuals(self, pairs: Sequence[LoRAPair], bases: Sequence[Tensor]) -> list[Tensor]:
        """Return where each layer keeps the remainder of rounding, zeros at first."""
        if self.options.rounding != "compensated":
            return []
        for pair, base in zip(pairs, bases, strict=True):
            kept = self.residuals.get(pair.name)
            if kept is None:
                shape = base.shape[0], base.shape[1:].numel()
                kept = torch.zeros(shape, dtype=torch.int8, device=base.device)
            self.residuals[pair.name] = kept.to(base.device)
        return [self.residuals[pair.name] for pair in pairs]
