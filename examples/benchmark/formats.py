"""Formats that a base weight is stored in, and two ways of rounding to them.

bitsandbytes quantizes to nearest only.  To round stochastically to the same levels they are written
out here; `tests/examples/test_survival.py` holds rounding to nearest together with bitsandbytes'
own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scalora.fold.rounding import round_stochastically

_BLOCK = 64  # of BitsAndBytesConfig
_BLOCK_OF_SCALES = 256  # of bitsandbytes' double quantization
_SMALLEST_SCALE = 1e-38  # an all-zero block must not divide by zero


class Rounded(NamedTuple):
    """Weight as it is stored.

    Attributes:
        codes: (m, n), integers: which level.
        values: (m, n), float32: what the codes stand for.
        scale: (blocks, 1), float32: the value of the largest level in each block.
    """

    codes: Tensor
    values: Tensor
    scale: Tensor


class Format(Protocol):
    """Number format in which weights are stored."""

    def nearest(self, weight: Tensor, before: Rounded | None = None) -> Rounded:
        """Round every element of ``weight`` (m, n), float32, to the level closest to it.

        Args:
            weight: what to store.
            before: what is stored now; a format that holds its scales takes them from there.
        """

    def stochastic(
        self, weight: Tensor, before: Rounded | None = None, *, generator: torch.Generator
    ) -> Rounded:
        """Round every element to one of the two levels around it, unbiased."""

    def half_cells(self, stored: Rounded, increment: Tensor) -> Tensor:
        """Return half the way from each element to its neighbour on the increment's side: (m, n).

        Rounding to nearest undoes an increment below it, as long as the scale stays the same.
        """


@dataclass(frozen=True, eq=False)
class CodeBook:
    """Levels times a scale: the largest magnitude of each block of a row's elements.

    Attributes:
        levels: (k,), float32, from the smallest to the largest, which is at the scale.
        block: elements that share a scale; None: a whole row does.
        double: the scales are rounded to 8 bits in turn (bitsandbytes' double quantization).
        hold: scales stay what they were when something was stored first, and what has grown beyond
            them is cut off; bitsandbytes always takes new ones.
    """

    levels: Tensor
    block: int | None = _BLOCK
    double: bool = False
    hold: bool = False

    def nearest(self, weight: Tensor, before: Rounded | None = None) -> Rounded:
        """See `Format`."""
        scale, position = self._positions(weight, before)
        middles = (self.levels[:-1] + self.levels[1:]) / 2
        return self._rounded(torch.bucketize(position, middles), scale, weight)

    def stochastic(
        self, weight: Tensor, before: Rounded | None = None, *, generator: torch.Generator
    ) -> Rounded:
        """See `Format`; the scales are those that rounding to nearest would take."""
        scale, position = self._positions(weight, before)
        below = torch.bucketize(position, self.levels[1:-1], right=True)
        low, high = self.levels[below], self.levels[below + 1]
        uniform = torch.rand(position.shape, generator=generator, device=position.device)
        above = uniform < (position - low) / (high - low)
        return self._rounded(below + above, scale, weight)

    def half_cells(self, stored: Rounded, increment: Tensor) -> Tensor:
        """See `Format`; infinite beyond the outermost levels, where the scale itself moves."""
        endless = self.levels.new_tensor([math.inf])
        gaps = torch.cat([endless, self.levels.diff(), endless])
        gap = gaps[stored.codes + (increment > 0)].reshape(len(stored.scale), -1)
        return (gap * (stored.scale / self.levels[-1]) / 2).view_as(increment)

    def _positions(self, weight: Tensor, before: Rounded | None) -> tuple[Tensor, Tensor]:
        """Return scales (blocks, 1), and the elements in units of the levels (blocks, block)."""
        blocks = weight.reshape(-1, self.block or weight.shape[-1])
        scale = blocks.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST_SCALE)
        if self.hold and before is not None:
            scale = before.scale
        top = self.levels[-1]
        return scale, (blocks * (top / scale)).clamp(-top, top)

    def _rounded(self, codes: Tensor, scale: Tensor, weight: Tensor) -> Rounded:
        if self.double:
            scale = _double_quantized(scale)
        values = self.levels[codes] * (scale / self.levels[-1])
        return Rounded(codes.view_as(weight), values.view_as(weight), scale)


class BFloat16:
    """An unquantized weight in bfloat16; its codes are its bits, and it has no scales."""

    def nearest(self, weight: Tensor, before: Rounded | None = None) -> Rounded:
        """See `Format`."""
        return _as_stored(weight.to(torch.bfloat16))

    def stochastic(
        self, weight: Tensor, before: Rounded | None = None, *, generator: torch.Generator
    ) -> Rounded:
        """See `Format`."""
        low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
        words = torch.empty_like(weight, dtype=torch.int32)
        words.random_(low, high, generator=generator)
        return _as_stored(round_stochastically(weight, torch.bfloat16, words))

    def half_cells(self, stored: Rounded, increment: Tensor) -> Tensor:
        """See `Format`; half a unit in the last place, and below a power of two half of that."""
        mantissa, exponent = torch.frexp(stored.values)  # |mantissa| in [1/2, 1)
        finer = (mantissa.abs() == 0.5) & (increment * stored.values < 0)
        return torch.ldexp(torch.ones_like(increment), exponent - 9 - finer.int())


def formats(device: torch.device) -> dict[str, Format]:
    """Return the formats by name, with bitsandbytes' own levels.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from bitsandbytes.functional import get_4bit_type

    nf4 = get_4bit_type("nf4", device=device)
    fp4 = get_4bit_type("fp4", device=device).unique()  # sorted; it has a zero of either sign
    # LLM.int8: -128 is not used.
    int8 = torch.arange(-127, 128, device=device, dtype=torch.float32)
    return {
        "NF4": CodeBook(nf4),
        "NF4, double": CodeBook(nf4, double=True),
        "NF4, held": CodeBook(nf4, hold=True),
        "FP4": CodeBook(fp4),
        "int8": CodeBook(int8, block=None),
        "bfloat16": BFloat16(),
    }


def _as_stored(weight: Tensor) -> Rounded:
    return Rounded(weight.view(torch.int16), weight.float(), weight.new_ones(1, 1))


def _double_quantized(scale: Tensor) -> Tensor:
    """Return the scales (blocks, 1) as bitsandbytes rounds them to 8 bits."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    offset = scale.mean()
    codes, state = quantize_blockwise((scale - offset).flatten(), blocksize=_BLOCK_OF_SCALES)
    return (dequantize_blockwise(codes, state) + offset).view_as(scale)
