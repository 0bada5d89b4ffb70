"""The fold as one Triton kernel for all layers of one shape: one read and one write per weight.

Held by tests/fold/test_fused_kernel.py, in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_NEAREST, _STOCHASTIC, _COMPENSATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_MODES = {"nearest": 0, "stochastic": 1, "compensated": 2}
_SMALLEST_RANK_OF_DOT, _LARGEST_RANK_AT_ONCE = 16, 64
_BLOCK_ROWS, _BLOCK_COLUMNS = 64, 128
_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _fold_kernel(
    weight_addresses,
    residual_addresses,
    seeds,
    left,
    right,
    rows,
    columns,
    rank,
    first_row,
    scale,
    element: tl.constexpr,
    mode: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_rank: tl.constexpr,
    aligned: tl.constexpr,
):
    layer = tl.program_id(1)
    tiles_across = tl.cdiv(columns, block_columns)
    row = (tl.program_id(0) // tiles_across) * block_rows + tl.arange(0, block_rows)
    column = (tl.program_id(0) % tiles_across) * block_columns + tl.arange(0, block_columns)

    left += layer.to(tl.int64) * rows * rank
    right += layer.to(tl.int64) * columns * rank
    increment = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for start in range(0, rank, block_rank):
        k = start + tl.arange(0, block_rank)
        a = tl.load(
            left + row[:, None] * rank + k[None, :],
            mask=(row[:, None] < rows) & (k[None, :] < rank),
            other=0.0,
        )
        b = tl.load(
            right + column[None, :] * rank + k[:, None],
            mask=(column[None, :] < columns) & (k[:, None] < rank),
            other=0.0,
        )
        increment = tl.dot(a, b, increment, input_precision=precision)

    inside = (row[:, None] < rows) & (column[None, :] < columns)
    position = row[:, None].to(tl.int64) * columns + column[None, :]
    weight = _matrix(weight_addresses + layer, element, aligned) + position
    old = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    exact = old + scale * increment
    if mode != _NEAREST:
        place = position + tl.cast(first_row, tl.int64) * columns
        bits = _noise_bits(tl.load(seeds + layer), place)
    if mode == _COMPENSATED:
        residual = _matrix(residual_addresses + layer, tl.int8, aligned) + position
        code = tl.load(residual, mask=inside, other=0).to(tl.float32)
        exact += code * (_unit(old, element) * 0.003937007874015748)
        rounded = _finite(exact, exact, element).to(element)
        nearest = rounded.to(tl.float32)
        tl.store(residual, _encode_residual(exact - nearest, nearest, bits, element), mask=inside)
    elif mode == _STOCHASTIC:
        rounded = _round_stochastically(exact, bits, element)
    else:
        rounded = _finite(exact, exact, element).to(element)
    tl.store(weight, rounded, mask=inside)


@triton.jit
def _matrix(address, element: tl.constexpr, aligned: tl.constexpr):
    """Return the pointer stored at ``address``; an aligned one is read 16 bytes at a time."""
    pointer = tl.load(address).to(tl.pointer_type(element))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _noise_bits(seed, position):
    """Return the bits of `scalora.fold.rounding.noise_bits`."""
    x = position.to(tl.uint32) * 0x9E3779B9 + seed.to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_stochastically(exact, bits, element: tl.constexpr):
    """Return the bits of `scalora.fold.rounding.round_stochastically`."""
    raw = exact.to(tl.uint32, bitcast=True)
    if element == tl.bfloat16:
        rounded = ((raw + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = ((raw + (bits & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        uniform = (bits & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08
        steps = exact * 16777216.0
        below = tl.floor(steps)
        steps = below + tl.where(uniform < steps - below, 1.0, 0.0)
        rounded = tl.where(tl.abs(exact) < 6.103515625e-05, steps * 5.9604644775390625e-08, rounded)
    return _finite(exact, rounded, element).to(element)


@triton.jit
def _finite(exact, rounded, element: tl.constexpr):
    """Return ``rounded`` within the type's range; what was not finite before stays as it was."""
    if element == tl.float32:
        return rounded
    largest: tl.constexpr = 3.3895313892515355e38 if element == tl.bfloat16 else 65504.0
    bounded = tl.minimum(tl.maximum(rounded, -largest), largest)
    return tl.where(tl.abs(exact) < float("inf"), bounded, exact)


@triton.jit
def _encode_residual(cut, rounded, bits, element: tl.constexpr):
    """Return the codes of `scalora.fold.rounding.encode_residual`."""
    uniform = (bits & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08
    parts = cut * _inverse_unit(rounded, element) * 254.0
    below = tl.floor(parts)
    parts = below + tl.where(uniform < parts - below, 1.0, 0.0)
    return tl.minimum(tl.maximum(parts, -127.0), 127.0).to(tl.int8)


@triton.jit
def _unit(value, element: tl.constexpr):
    """Return the unit in the last place of a number of that type, a power of two."""
    return (_unit_exponent(value, element) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _inverse_unit(value, element: tl.constexpr):
    return ((254 - _unit_exponent(value, element)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _unit_exponent(value, element: tl.constexpr):
    lowest: tl.constexpr = 32 if element == tl.bfloat16 else 113
    mantissa: tl.constexpr = 7 if element == tl.bfloat16 else 10
    exponent = (value.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.maximum(exponent, lowest) - mantissa


def fold_fused(
    weights: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    *,
    rounding: str,
    seeds: Sequence[int],
    residuals: Sequence[Tensor],
    first_row: int = 0,
    scale: float = 1.0,
) -> None:
    """Do what `scalora.fold.dense.fold` does in one launch, for contiguous weights of one dtype."""
    mode = _MODES["nearest" if weights[0].dtype == torch.float32 else rounding]
    fold = torch.ops.scalora.fold_
    fold(list(weights), left, right, mode, list(seeds), list(residuals), first_row, scale)
    torch.autograd.graph.increment_version(weights)


# Registered, so that modes and fake tensors see the launch.  Not by `torch.library.custom_op`: that
# counts a weight as written before it is, and re-basing decides from its version which layers were.
torch.library.define(
    "scalora::fold_",
    "(Tensor(a!)[] weights, Tensor left, Tensor right, int mode, int[] seeds, "
    "Tensor(b!)[] residuals, int first_row, float scale) -> ()",
)


@torch.library.register_fake("scalora::fold_")
def _write_nothing(
    weights: list[Tensor],
    left: Tensor,
    right: Tensor,
    mode: int,
    seeds: list[int],
    residuals: list[Tensor],
    first_row: int,
    scale: float,
) -> None:
    """Do what `_launch` does to shapes: nothing."""


@torch.library.impl("scalora::fold_", "default")
def _launch(
    weights: list[Tensor],
    left: Tensor,
    right: Tensor,
    mode: int,
    seeds: list[int],
    residuals: list[Tensor],
    first_row: int,
    scale: float,
) -> None:
    """Launch the kernel over all weights; ``mode`` is one of `_MODES`."""
    rows, columns = weights[0].shape
    device, rank = weights[0].device, left.shape[-1]
    addresses = _to_device([weight.data_ptr() for weight in weights], torch.int64, device)
    residual_addresses, seed_words = addresses, addresses
    if mode == _MODES["compensated"]:
        residual_addresses = _to_device([r.data_ptr() for r in residuals], torch.int64, device)
    if mode != _MODES["nearest"]:
        words = [seed - (1 << 32) if seed >> 31 else seed for seed in seeds]
        seed_words = _to_device(words, torch.int32, device)
    tiles = triton.cdiv(rows, _BLOCK_ROWS) * triton.cdiv(columns, _BLOCK_COLUMNS)
    # Triton launches on the current device, which need not be the weights'.
    with torch.cuda.device_of(weights[0]):
        _fold_kernel[(tiles, len(weights))](
            addresses,
            residual_addresses,
            seed_words,
            left.float().contiguous(),
            right.float().contiguous(),
            rows,
            columns,
            rank,
            first_row,
            scale,
            element=_ELEMENTS[weights[0].dtype],
            mode=mode,
            precision="ieee" if weights[0].dtype == torch.float32 else "tf32x3",
            block_rows=_BLOCK_ROWS,
            block_columns=_BLOCK_COLUMNS,
            block_rank=min(
                _LARGEST_RANK_AT_ONCE, max(_SMALLEST_RANK_OF_DOT, triton.next_power_of_2(rank))
            ),
            aligned=all(matrix.data_ptr() % 16 == 0 for matrix in (*weights, *residuals)),
        )


def _to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return host integers as a tensor on the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
