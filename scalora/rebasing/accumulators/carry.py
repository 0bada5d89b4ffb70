"""The carry accumulator: increments are kept as low-rank factors beside the base weight."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from scalora import sharding
from scalora.carry import (
    Carry,
    absorbed,
    compress,
    frozen,
    relative_cut,
    rounded,
    rounding_energy,
)
from scalora.moments.history import Write
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair, is_quantized
from scalora.rebasing.accumulators.commit import write_all
from scalora.rebasing.batches import thin_factors
from scalora.rebasing.coordinates import increment_columns
from scalora.warning import warn

# Where carry_rank="auto" begins, in re-basings, and where it stops growing, in adapters' ranks.
_AUTO_FIRST, _AUTO_MOST = 4, 32
# So many numbers of carries are recompressed at once: 8 bytes each, several times over.
_NUMBERS_AT_ONCE = 1 << 23


class CarryAccumulator:
    """Keeps increments beside base weights, which it never touches.

    Args:
        options: of the carry.
    """

    def __init__(self, options: RebasingOptions) -> None:
        self.options = options
        self._warned = False

    def key(self, pair: LoRAPair) -> Hashable:
        """Return what must agree, beyond the factors, for layers to be served by one call."""
        dtype, carry = self._dtype(pair), pair.carry
        return "carry", dtype if carry is None else torch.promote_types(dtype, carry.dtype)

    def has_room(self, pair: LoRAPair) -> bool:
        """Return whether the layer's carry takes in another increment without being compressed."""
        carry = pair.carry
        return carry is None or carry.columns + self._increment_columns(pair) <= carry.capacity

    def carry_of(self, pair: LoRAPair) -> Carry:
        """Return the layer's carry, with as much room as was asked for."""
        wanted = self.options.carry_rank
        first = _AUTO_FIRST * self._increment_columns(pair)
        columns = first if isinstance(wanted, str) else wanted
        least, most = 2 * self._increment_columns(pair), self._most_useful(pair)
        return pair.ensure_carry(min(max(columns, least), most), self._dtype(pair))

    @torch.no_grad()
    def make_room(self, pairs: Sequence[LoRAPair], columns: int) -> None:
        """Recompress the carries that are full, or let them grow; no layer's function changes.

        Args:
            pairs: the layers.
            columns: of the increment that each is to take in.
        """
        full: dict[Hashable, list[LoRAPair]] = {}
        for pair in pairs:
            carry = self.carry_of(pair)
            if carry.columns + columns > carry.capacity:
                key = carry.up.shape, carry.down.shape, carry.columns, carry.up.device
                full.setdefault(key, []).append(pair)
        for alike in full.values():
            carry = _carry(alike[0])
            # Of whole carries, so that all processes that share them cut at the same places.
            at_once = max(1, _NUMBERS_AT_ONCE // (carry.capacity * (carry.m + carry.n)))
            for start in range(0, len(alike), at_once):
                self._compress(alike[start : start + at_once], columns)

    def commit(
        self,
        pairs: Sequence[LoRAPair],
        left: Tensor,
        right: Tensor,
        writes: Sequence[Write],
        count: int,
    ) -> None:
        """Append the increments to the carries, and write the rest with them.

        Where the carry is narrower than the adapter, ``writes`` begin with P, and the adapter keeps
        what rounding cuts.

        Args:
            pairs, left, right, writes, count: as for `DenseAccumulator.commit`.
        """
        self.make_room(pairs, left.shape[-1])
        carries = [_carry(pair) for pair in pairs]
        dtype = carries[0].dtype
        if _is_narrow(dtype):
            left, right, writes = _rounded(pairs, left, right, writes, dtype)
        left, right = left.to(dtype), right.to(dtype).mT
        k = left.shape[-1]
        ups = [carry.up[:, carry.columns : carry.columns + k] for carry in carries]
        downs = [carry.down[carry.columns : carry.columns + k] for carry in carries]
        counts = [carry.columns + k for carry in carries]
        writes = [(ups, left, left), (downs, right, right), *writes]
        write_all(writes, range(len(pairs)), lambda: _count(carries, counts))

    def _compress(self, pairs: Sequence[LoRAPair], columns: int) -> None:
        """Recompress the carries, or let them grow where ``"auto"`` would cut too much."""
        carries = [_carry(pair) for pair in pairs]
        keep = _kept_columns(pairs[0], carries[0], columns)
        dtype, wide, rows = carries[0].dtype, carries[0].wide_dtype, carries[0].rows
        up = torch.stack([carry.used_up for carry in carries]).to(wide)
        down = torch.stack([carry.used_down for carry in carries]).to(wide)
        new = compress(up, down, keep, rows)
        cuts = torch.stack([carry.cut for carry in carries]) + new.cut
        if _is_narrow(dtype):
            cuts = cuts + rounding_energy(new.up, new.down, dtype, rows)
        P, Q = thin_factors(pairs)
        # The eigenproblem has waited for the device; reading these costs nothing more.
        shares = relative_cut(cuts, new.energy, up, down, P, Q, rows).tolist()
        chosen = []
        for i, (pair, carry) in enumerate(zip(pairs, carries, strict=True)):
            too_much = shares[i] > self.options.carry_tolerance
            larger = min(carry.capacity + carry.capacity // 2, self._most_columns(pair))
            if too_much and larger >= carry.columns + columns:
                carry.grow(larger)
                continue
            chosen.append(i)
            if too_much:
                self._warn(pair, carry, shares[i])
        if chosen:
            self._replace(
                [carries[i] for i in chosen],
                torch.stack([rounded(new.up[i], dtype) for i in chosen]),
                torch.stack([rounded(new.down[i], dtype) for i in chosen]),
                torch.stack([cuts[i] for i in chosen]),
            )

    def _replace(self, carries: Sequence[Carry], up: Tensor, down: Tensor, cuts: Tensor) -> None:
        keep = up.shape[-1]
        more = carries[0].capacity - keep
        up = torch.nn.functional.pad(up, (0, more))
        down = torch.nn.functional.pad(down, (0, 0, 0, more))
        writes = [
            ([carry.up for carry in carries], up, up),
            ([carry.down for carry in carries], down, down),
            ([carry.cut for carry in carries], cuts, cuts),
        ]
        counts = [keep] * len(carries)
        write_all(writes, range(len(carries)), lambda: _count(carries, counts))

    def _most_columns(self, pair: LoRAPair) -> int:
        """Return up to where the layer's carry may grow."""
        if not isinstance(self.options.carry_rank, str):
            return 0
        return min(_AUTO_MOST * pair.rank, self._most_useful(pair))

    def _most_useful(self, pair: LoRAPair) -> int:
        """Return the number of columns with which nothing of a layer's carry is ever cut."""
        return _full_rank(pair) + 4 * self._increment_columns(pair)

    def _increment_columns(self, pair: LoRAPair) -> int:
        return increment_columns(pair, P_alone=self.options.scales_P_alone)

    def _dtype(self, pair: LoRAPair) -> torch.dtype:
        """Return the dtype of a carry that is made now.

        Float16 beside a quantized base and an adapter in float32, under a rule that scales P alone,
        by little at a time: the adapter then keeps what rounding an increment cuts, and what
        rounding a compression cuts is far below the quantization's own error.  Else the adapter's,
        float32 at least.
        """
        dtype = torch.promote_types(pair.P_parameter.dtype, pair.Q_parameter.dtype)
        factors = {pair.P_parameter.dtype, pair.Q_parameter.dtype}
        narrow = self.options.resolved_rule in ("leak", "age") and is_quantized(pair)
        if narrow and factors == {torch.float32}:
            return torch.float16
        return torch.promote_types(dtype, torch.float32)

    def _warn(self, pair: LoRAPair, carry: Carry, share: float) -> None:
        if self._warned:
            return
        self._warned = True
        warn(
            f"the carry of {pair.name!r} is full at {carry.capacity} columns, and the energy that "
            f"was cut from it by now is {share:.1e} of what the layer has learned "
            f"(carry_tolerance={self.options.carry_tolerance:g}): so much the model's function was "
            "moved. Pass a larger carry_rank or interval; optimizer.report() has every layer."
        )


def _is_narrow(dtype: torch.dtype) -> bool:
    """Return whether a carry of that dtype needs what rounding cuts to stay elsewhere."""
    return dtype not in (torch.float32, torch.float64)


def _rounded(
    pairs: Sequence[LoRAPair],
    left: Tensor,
    right: Tensor,
    writes: Sequence[Write],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, list[Write]]:
    """Return increments that the dtype holds, and writes by which the adapter keeps the rest."""
    (targets, P, _), *others = writes
    share = frozen(P.flatten(2), left, dtype, sharding.rows_of(pairs[0].P_parameter))
    parameters = [pair.Q_parameter for pair in pairs]
    Q = sharding.stack(parameters)
    ratio = share.ratio[:, sharding.own_rows(parameters[0])]
    kept = absorbed(Q.flatten(2), ratio, dtype).view_as(Q)
    factors = [(targets, P, share.P.view_as(P)), (parameters, Q, kept)]
    return share.up, rounded(right, dtype), [*factors, *others]


def _count(carries: Sequence[Carry], columns: Sequence[int]) -> None:
    for carry, count in zip(carries, columns, strict=True):
        carry.columns = count


def _carry(pair: LoRAPair) -> Carry:
    carry = pair.carry
    assert carry is not None
    return carry


def _full_rank(pair: LoRAPair) -> int:
    return min(pair.P_parameter.shape[0], pair.Q_parameter.shape[1:].numel())


def _kept_columns(pair: LoRAPair, carry: Carry, k: int) -> int:
    """Return how many a compression keeps: with a quarter free not every re-basing compresses."""
    if carry.capacity - k >= _full_rank(pair):
        return _full_rank(pair)
    return carry.capacity - max(k, carry.capacity // 4 // k * k)
