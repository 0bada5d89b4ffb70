"""``optimal_scaling``: what a re-basing computes, for tensors that belong to no model.

Held by tests/scaling/test_scaling.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scalora.autocast import without_autocast
from scalora.scaling.quadratic import quadratic_model
from scalora.scaling.rules import SOLVERS, LearningRate, column_scaling

DEFAULT_BOUND = 1e3


@torch.no_grad()
@without_autocast()
def optimal_scaling(
    P: Tensor,
    Q: Tensor,
    grad_P: Tensor,
    grad_Q: Tensor,
    *,
    direction_P: Tensor | None = None,
    direction_Q: Tensor | None = None,
    rule: str = "exact",
    lipschitz: float | str = 1.0,
    lr: LearningRate | tuple[LearningRate, LearningRate] = 1.0,
    scaling: float = 1.0,
    direction_degree: int = 0,
    bound: float = DEFAULT_BOUND,
) -> tuple[Tensor, Tensor]:
    """Return the column scalings that bring one step closest to the full fine-tuning step.

    With ``W = W0 + s P Q^T`` the pair may be replaced by ``P diag(alpha)`` and ``Q diag(beta)``,
    the difference frozen.  This returns the non-negative ``alpha`` and ``beta`` that minimise
    ``|G/L - D(alpha, beta)|_F``, where ``D`` is the first-order move of the weight in the next step
    (ScaLoRA, arXiv 2510.23818, and docs/mathematics.md).  ``G`` itself is never needed.

    Args:
        P: (..., m, r); PEFT's ``lora_B.weight``.
        Q: (..., n, r); PEFT's ``lora_A.weight`` transposed.
        grad_P: (..., m, r).
        grad_Q: (..., n, r).
        direction_P: (..., m, r), the direction the inner optimizer will take (it subtracts
            ``lr * direction``); needed by ``rule="direction"``, refused by the others, which model
            plain gradient descent.
        direction_Q: (..., n, r), likewise.
        rule: ``"paper"``, ``"exact"``, ``"direction"``, ``"scalar"`` or ``"none"`` (ones).
        lipschitz: the smoothness constant L, or ``"auto"``: the L at which the step is predicted
            to be as long as plain LoRA's.
        lr: learning rate, or a pair ``(lr_P, lr_Q)``; each a float or a tensor that broadcasts
            with (..., 1).
        scaling: PEFT's ``s`` (``scaling[adapter]``).
        direction_degree: how the direction scales with the gradient: 0 for the Adam family, 1 for
            momentum SGD.  Only ``rule="direction"`` takes another value than 0.
        bound: every factor stays within ``[1/bound, bound]``.

    Returns:
        alpha, beta: (..., r), positive, in the inputs' dtype (float32 at least).  Ones where there
        is nothing to scale: a factor that is zero, a non-finite gradient.

    Raises:
        ValueError: shapes that do not belong together, or an argument out of its range.
    """
    _check_shapes(P, Q, grad_P, grad_Q, direction_P, direction_Q)
    result_dtype = torch.promote_types(P.dtype, torch.float32)
    if rule == "none":
        ones = torch.ones_like(P[..., 0, :], dtype=result_dtype)
        return ones, ones.clone()
    if rule not in SOLVERS:
        raise ValueError(f"rule={rule!r} is not one of {[*SOLVERS, 'none']}.")
    given = [d for d in (direction_P, direction_Q) if d is not None]
    if len(given) != (2 if rule == "direction" else 0):
        raise ValueError(
            "rule='direction' needs direction_P and direction_Q; the other rules take neither."
        )
    if rule != "direction":
        direction_P, direction_Q, direction_degree = grad_P, grad_Q, 1
    assert direction_P is not None and direction_Q is not None
    if not bound >= 1:
        raise ValueError(f"bound={bound} must be at least 1.")
    lr_P, lr_Q = lr if isinstance(lr, tuple) else (lr, lr)
    for rate in (lr_P, lr_Q):
        if not isinstance(rate, Tensor) and not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"lr={rate} must be positive and finite.")

    matched = lipschitz == "auto"
    if not matched and (
        isinstance(lipschitz, str) or not (lipschitz > 0 and math.isfinite(lipschitz))
    ):
        raise ValueError(f"lipschitz={lipschitz!r} must be 'auto' or a positive number.")

    found = column_scaling(
        quadratic_model(P, Q, grad_P, grad_Q, direction_P, direction_Q, scaling, direction_degree),
        rule,
        (lr_P, lr_Q),
        bound=bound,
        lipschitz=None if matched else float(lipschitz),
    )
    return found.alpha.to(result_dtype), found.beta.to(result_dtype)


def _check_shapes(
    P: Tensor,
    Q: Tensor,
    grad_P: Tensor,
    grad_Q: Tensor,
    direction_P: Tensor | None,
    direction_Q: Tensor | None,
) -> None:
    """Raise a ValueError if shapes do not belong together."""
    if P.ndim < 2 or Q.ndim != P.ndim or P.shape[:-2] != Q.shape[:-2] or P.shape[-1] != Q.shape[-1]:
        raise ValueError(
            f"P {tuple(P.shape)} and Q {tuple(Q.shape)} must be (..., m, r) and (..., n, r); "
            "PEFT's lora_A.weight is Q transposed."
        )
    given = {
        "grad_P": (grad_P, P),
        "grad_Q": (grad_Q, Q),
        "direction_P": (direction_P, P),
        "direction_Q": (direction_Q, Q),
    }
    for name, (tensor, factor) in given.items():
        if tensor is not None and tensor.shape != factor.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, its factor is {tuple(factor.shape)}; "
                "they must be equal."
            )
