"""Addition of low-rank increments to dense base weights, in place.

Held by tests/fold/test_fold.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalora.fold.rounding import (
    decode_residual,
    encode_residual,
    is_rounded,
    noise_bits,
    round_stochastically,
    round_to_nearest,
)

ROUNDINGS = ("stochastic", "compensated", "nearest")
_ELEMENTS_AT_ONCE = 1 << 20


def fold(
    weights: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
    *,
    rounding: str = "stochastic",
    seeds: Sequence[int] = (),
    residuals: Sequence[Tensor] = (),
    first_row: int = 0,
    scale: float = 1.0,
) -> None:
    """Add ``scale left[l] @ right[l].T`` to ``weights[l]``, in place, for layers of one shape.

    float32 and float64 weights take the increment to round-off.  In bfloat16 and float16:

    - ``"stochastic"`` rounding is unbiased;
    - ``"compensated"`` keeps what rounding to nearest cut off in ``residuals`` and adds it the next
      time; a residual has 8 bits, to which it is itself rounded stochastically;
    - ``"nearest"`` loses increments below half a unit in the last place.

    Args:
        weights: each (m, n), of one dtype and device.
        left: (layers, m, k), float32 or wider.
        right: (layers, n, k), float32 or wider.
        rounding: one of `ROUNDINGS`; read in half precision only.
        seeds: one `noise_seed` per layer; ``"nearest"`` needs none.
        residuals: each (m, n), int8 and contiguous, as `encode_residual` returns, zeros at first;
            for ``"compensated"``, which needs one per weight.
        first_row: index of the weights' first row in the whole weight, where each process holds
            some rows: an element's noise depends on its place in the whole.
        scale: a factor of all increments.
    """
    if _fused_kernel_applies(weights, left):
        from scalora.fold.fused import fold_fused

        fold_fused(
            weights,
            left,
            right,
            rounding=rounding,
            seeds=seeds,
            residuals=residuals,
            first_row=first_row,
            scale=scale,
        )
        return
    dtype = weights[0].dtype
    if not is_rounded(dtype):
        lefts, rights = left.to(dtype).unbind(), right.to(dtype).mT.unbind()
        for weight, one, other in zip(weights, lefts, rights, strict=True):
            weight.addmm_(one, other, alpha=scale)
        return
    for layer, weight in enumerate(weights):
        residual = residuals[layer] if residuals else None
        seed = seeds[layer] if seeds else 0
        result, cut = _half_precision_sum(
            weight, left[layer], right[layer], rounding, seed, residual, first_row, scale
        )
        write_whole(weight, result, residual, cut)


def write_whole(
    weight: Tensor, result: Tensor, residual: Tensor | None, cut: Tensor | None
) -> None:
    """Write a weight, then what was cut from it if and only if the weight was written."""
    version = weight._version

    def follow() -> None:
        if residual is not None and cut is not None and weight._version != version:
            residual.copy_(cut)

    try:
        weight.copy_(result)
        follow()
    except BaseException:
        follow()
        raise


def _half_precision_sum(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    rounding: str,
    seed: int,
    residual: Tensor | None,
    first_row: int,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """Return ``weight + residual + left @ right.T`` in the weight's dtype, and what was cut.

    Both are new tensors, so that the single write into the weight is all or nothing.
    """
    rows, columns = weight.shape
    result = torch.empty_like(weight)
    cut = None if residual is None else torch.empty_like(residual)
    chunk = max(1, _ELEMENTS_AT_ONCE // columns)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        exact = torch.addmm(weight[part].float(), left[part].float(), right.float().T, alpha=scale)
        if rounding == "nearest":
            result[part] = round_to_nearest(exact, weight.dtype)
            continue
        bits = noise_bits(seed, (first_row + start) * columns, exact.numel(), weight.device)
        if residual is not None and cut is not None:
            exact += decode_residual(residual[part], weight[part])
            result[part] = round_to_nearest(exact, weight.dtype)
            cut[part] = encode_residual(exact - result[part], result[part], bits)
        else:
            result[part] = round_stochastically(exact, weight.dtype, bits)
    return result, cut


def _fused_kernel_applies(weights: Sequence[Tensor], left: Tensor) -> bool:
    """Return whether `scalora.fold.fused` takes these tensors and Triton is installed."""
    if left.device.type != "cuda" or torch.float64 in (left.dtype, weights[0].dtype):
        return False
    if not all(weight.is_contiguous() and weight.numel() for weight in weights):
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
