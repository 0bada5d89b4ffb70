"""From the quadratic model to column scalings: the rules, their magnitude, and the safe cases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scalora.scaling.nonnegative import minimize_nonnegative
from scalora.scaling.quadratic import QuadraticModel


def exact(model: QuadraticModel) -> Tensor:
    """The non-negative optimum of the model with L = 1: (..., 2r)."""
    return minimize_nonnegative(model.H, model.lam)


def scalar(model: QuadraticModel) -> Tensor:
    """One scalar for all columns of P and one for Q, both non-negative and optimal: (..., 2r)."""
    tied = model.tied()
    return minimize_nonnegative(tied.H, tied.lam).repeat_interleave(model.rank, dim=-1)


def paper(model: QuadraticModel) -> Tensor:
    """The published theorem (arXiv 2510.23818): ``H^-1 lambda`` where that is non-negative.

    Elsewhere its fallback, one scalar for each factor: (..., 2r).
    """
    diagonal = model.H.diagonal(dim1=-2, dim2=-1)
    dead = (diagonal <= 0).to(diagonal.dtype)
    scale = (diagonal + dead).rsqrt()
    unit = model.H * scale.unsqueeze(-1) * scale.unsqueeze(-2) + torch.diag_embed(dead)
    solution, _ = torch.linalg.solve_ex(unit, (model.lam * scale).unsqueeze(-1))
    solution = solution.squeeze(-1) * scale
    feasible = (torch.isfinite(solution) & (solution >= 0)).all(-1, keepdim=True)
    return torch.where(feasible, solution, scalar(model))


SOLVERS: dict[str, Callable[[QuadraticModel], Tensor]] = {
    "paper": paper,
    "exact": exact,
    "scalar": scalar,
    "direction": exact,
}


def solve(model: QuadraticModel, rule: str) -> Tensor:
    """The rule's ``x`` for L = 1, zero where the model is not live: (..., 2r)."""
    alive = live(model).unsqueeze(-1)
    lam = torch.where(alive, model.lam, torch.zeros_like(model.lam))
    identity = torch.eye(lam.shape[-1], dtype=lam.dtype, device=lam.device)
    H = torch.where(alive.unsqueeze(-1), model.H, identity)
    return SOLVERS[rule](QuadraticModel(H, lam))


def plain_weights(model: QuadraticModel, lr_P: float | Tensor, lr_Q: float | Tensor) -> Tensor:
    """The ``x`` of plain LoRA, ``alpha = beta = 1``: ``[lr_Q; lr_P]``, (..., 2r)."""
    ones = torch.ones_like(model.lam)
    return torch.cat([ones[..., : model.rank] * lr_Q, ones[..., model.rank :] * lr_P], dim=-1)


def matching_lipschitz(
    x: Tensor,
    plain: Tensor,
    degree: int,
    step: QuadraticModel,
    step_degree: int,
) -> Tensor:
    """The L at which ``x / L`` makes the coming step as long as plain LoRA's: (...,).

    A rule whose directions have ``degree`` d scales by ``f = (x / (L lr))^(1/(1+d))``.  The inner
    optimizer, whose own directions ``step`` and ``step_degree`` describe, then moves the weight by
    ``|[lr_Q alpha^(1+step_degree); lr_P beta^(1+step_degree)]|_H``, and plain LoRA's by the same
    with ``f = 1``.

    Args:
        x: (..., 2r), the rule's weights for L = 1.
        plain: (..., 2r), plain LoRA's (`plain_weights`).
        degree: of the directions that the rule assumes.
        step: the quadratic model of the inner optimizer's directions.
        step_degree: of those.

    Returns:
        NaN where there is nothing to match yet.
    """
    factors = (x / plain).pow(1 / (1 + degree))
    ratio = step.step_size(plain * factors.pow(1 + step_degree)) / step.step_size(plain)
    constant = ratio.pow((1 + degree) / (1 + step_degree))
    usable = live(step) & torch.isfinite(constant) & (constant > 0)
    return torch.where(usable, constant, torch.nan)


def live(model: QuadraticModel) -> Tensor:
    """Where there is something to scale: (...,), bool.

    False for a non-finite gradient and for a factor that is still zero, as PEFT's ``lora_B`` is at
    first (H is singular then).
    """
    finite = torch.isfinite(model.H).all(-1).all(-1) & torch.isfinite(model.lam).all(-1)
    moving = (model.H.diagonal(dim1=-2, dim2=-1) > 0).unflatten(-1, (2, model.rank)).any(-1).all(-1)
    return finite & moving


def scaling_from_weights(
    model: QuadraticModel,
    x: Tensor,
    lr_P: float | Tensor,
    lr_Q: float | Tensor,
    degree: int,
    bound: float,
) -> tuple[Tensor, Tensor]:
    """``alpha = (x_P / lr_Q)^(1/(1+degree))`` and ``beta`` likewise, kept within bounds.

    A layer that is not live, a column with a zero row in H and a non-finite result are scaled
    by 1.  All others stay within ``[1/bound, bound]``: a column whose two factors both vanished
    could never come back.

    Returns:
        alpha, beta: (..., r) in the solver's dtype.
    """
    factors = (x / plain_weights(model, lr_P, lr_Q)).pow(1 / (1 + degree))
    column = model.H.diagonal(dim1=-2, dim2=-1) > 0
    keep = live(model).unsqueeze(-1) & column & torch.isfinite(factors)
    factors = torch.where(keep, factors.clamp(1 / bound, bound), torch.ones_like(factors))
    alpha, beta = factors.split(model.rank, dim=-1)
    return alpha, beta
