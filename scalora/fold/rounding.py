"""Roundings with which half-precision weights do not lose small increments.

One unit in the last place of a bfloat16 weight of 0.02 is about 1e-4, larger than most increments.
Rounding to nearest would silently lose all increments below half of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_INT32_SIGN = 1 << 31
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
# The exponent field, as float32 has it, below which units in the last place count as no smaller.
_LOWEST_EXPONENT = {torch.bfloat16: 32, torch.float16: 113}
_PARTS_OF_A_UNIT = 254  # the resolution of a residual: half a unit is an int8, 127
_FLOAT16_SMALLEST_NORMAL = 2.0**-14
_FLOAT16_SUBNORMAL_STEP = 2.0**-24


def is_rounded(dtype: torch.dtype) -> bool:
    """Return whether weights of this dtype are rounded when something is added to them here."""
    return dtype in _DROPPED_BITS


def noise_seed(*parts: int) -> int:
    """Return a 32-bit seed mixed from integers (splitmix64), the same on every machine."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK_32


def noise_bits(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return random 32-bit words for the elements ``first`` to ``first + count - 1`` of a weight.

    They have the shape (count,) and dtype int32.  Each is a hash of the seed and the element's
    position: without a generator there is no state to save, and replicas and devices agree to the
    bit.
    """
    x = torch.arange(first, first + count, device=device).to(torch.int32)
    x = x * _signed(0x9E3779B9) + _signed(seed)
    x = x ^ _shift(x, 16)
    x = x * _signed(0x7FEB352D)
    x = x ^ _shift(x, 15)
    x = x * _signed(0x846CA68B)
    return x ^ _shift(x, 16)


def round_stochastically(value: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 up or down to ``dtype`` so that the expectation is ``value``.

    Args:
        value: float32, any shape.
        dtype: bfloat16 or float16.
        bits: int32 noise, one word per element of ``value``.

    Returns:
        A tensor of ``value``'s shape in ``dtype``.  A finite value stays finite.
    """
    bits = bits.view_as(value)
    dropped = (1 << _DROPPED_BITS[dtype]) - 1
    raw = value.view(torch.int32)
    rounded = ((raw + (bits & dropped)) & ~dropped).view(torch.float32)
    if dtype == torch.float16:
        uniform = (bits & 0xFFFFFF).to(torch.float32) * 2.0**-24
        steps = value / _FLOAT16_SUBNORMAL_STEP
        below = steps.floor()
        steps = below + (uniform < steps - below)  # exact; the sum steps + uniform would round
        small = value.abs() < _FLOAT16_SMALLEST_NORMAL
        rounded = torch.where(small, steps * _FLOAT16_SUBNORMAL_STEP, rounded)
    return _finite(value, rounded, dtype).to(dtype)


def round_to_nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to the nearest in ``dtype``.  A finite value stays finite."""
    return _finite(value, value, dtype).to(dtype)


def encode_residual(cut: Tensor, rounded: Tensor, bits: Tensor) -> Tensor:
    """Return what rounding to nearest cut off, as int8 multiples of 1/254 of a unit.

    The unit is that in the last place of what it was rounded to; a cut is half of it at most, but
    of a weight that is the largest of its dtype.  It is rounded up or down so that the expectation
    is the cut.

    Args:
        cut: float32, any shape.
        rounded: bfloat16 or float16, in the same shape.
        bits: int32 noise, one word per element.
    """
    uniform = (bits.view_as(cut) & 0xFFFFFF).to(torch.float32) * 2.0**-24
    parts = cut * _unit(rounded, inverse=True) * _PARTS_OF_A_UNIT
    below = parts.floor()
    parts = below + (uniform < parts - below)  # exact; the sum parts + uniform would round
    return parts.clamp(-127, 127).to(torch.int8)


def decode_residual(residual: Tensor, rounded: Tensor) -> Tensor:
    """Return in float32 what `encode_residual` was given, in the expectation.

    Args:
        residual: int8, any shape.
        rounded: the very numbers that the cut was rounded to.
    """
    return residual.to(torch.float32) * (_unit(rounded) * (1 / _PARTS_OF_A_UNIT))


def _finite(value: Tensor, rounded: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``rounded`` within the dtype's range; what was not finite before stays as it was."""
    largest = torch.finfo(dtype).max
    return torch.where(value.isfinite(), rounded.clamp(-largest, largest), value)


def _unit(value: Tensor, *, inverse: bool = False) -> Tensor:
    """Return the unit in the last place of half-precision numbers, a power of two, in float32."""
    exponent = (value.to(torch.float32).view(torch.int32) >> 23) & 0xFF
    exponent = exponent.clamp_min(_LOWEST_EXPONENT[value.dtype])
    exponent = exponent - (23 - _DROPPED_BITS[value.dtype])
    return ((254 - exponent if inverse else exponent) << 23).view(torch.float32)


def _signed(word: int) -> int:
    """Return the int32 with the bits of a 32-bit word."""
    return word - (1 << 32) if word & _INT32_SIGN else word


def _shift(x: Tensor, places: int) -> Tensor:
    """Shift int32 words right, filling with zeros."""
    return (x >> places) & (_MASK_32 >> places)
