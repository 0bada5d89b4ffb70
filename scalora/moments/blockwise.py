"""States that are kept as 8-bit codes in blocks: their values, and their transfer.

A block is `BLOCK` consecutive elements of the flattened state (the last one may be shorter), so it
may hold elements of several columns.  The element with code ``c`` is ``level_map[c] * absmax``,
with the absmax of its block (arXiv 2110.02861).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from scalora.moments.history import transfer

BLOCK = 256


def decode(codes: Tensor, absmax: Tensor, level_map: Tensor) -> Tensor:
    """Return the state itself, in the dtype of ``level_map``.

    Args:
        codes: (..., *shape), uint8.
        absmax: (..., blocks), of which ``...`` are the axes that are not flattened.
        level_map: (256,), ascending.
    """
    axes = absmax.ndim - 1
    blocks = _in_blocks(level_map[codes.int()], axes) * absmax.unsqueeze(-1)
    return _out_of_blocks(blocks, codes.shape)


def encode(state: Tensor, level_map: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Return codes (..., *shape) and absmax (..., blocks), of the level nearest to each element.

    The absmax is the smallest with which no element of the block lies outside of the levels.  The
    signed map ends at 1 and at -0.993: a block whose largest element is negative gets an absmax
    that is larger by that, so that its largest element is a level and does not shrink every time.

    Every element moves by at most half the gap between the two levels around it.  A block of zeros
    has the absmax 0.  Where an element is not finite, its block's absmax is not.

    Args:
        state: (..., *shape).
        level_map: (256,), ascending.
        axes: number of axes in front of ``shape``.
    """
    blocks = _in_blocks(state, axes)
    ends = torch.where(blocks < 0, level_map[0], level_map[-1])
    absmax = (blocks / ends).amax(-1)
    unit = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    halfway = (level_map[1:] + level_map[:-1]) / 2
    codes = torch.bucketize(blocks / unit.unsqueeze(-1), halfway, out_int32=True)
    return _out_of_blocks(codes.to(torch.uint8), state.shape), absmax


def transfer_codes(
    codes: Tensor, absmax: Tensor, level_map: Tensor, factor: Tensor, degree: int, rank_axis: int
) -> tuple[Tensor, Tensor]:
    """Return a state that is kept as codes in new coordinates (`transfer`): codes and absmax.

    What rounding adds is at most half the gap between two levels, times the new absmax.  It adds
    nothing to a block all of whose elements are scaled alike: its codes stay, its absmax is scaled.

    Args:
        codes: (layers, ..., *parameter shape), uint8.
        absmax: (layers, ..., blocks).
        level_map: (256,), ascending.
        factor, degree, rank_axis: as in `transfer`.
    """
    # In units of the old absmax: a factor of 1 gives back the same bits.
    levels = transfer(level_map[codes.int()], factor, degree, rank_axis)
    new_codes, growth = encode(levels, level_map, absmax.ndim - 1)
    return new_codes, absmax * growth


def _in_blocks(state: Tensor, axes: int) -> Tensor:
    """Return (..., blocks, BLOCK), the last block filled up with zeros."""
    flat = state.flatten(axes)
    return pad(flat, (0, -flat.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _out_of_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    flat = blocks.flatten(-2)
    return flat.narrow(-1, 0, prod(shape[flat.ndim - 1 :])).reshape(shape)
