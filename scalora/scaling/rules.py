"""Column scalings from the quadratic model: the rules, their magnitude, and the safe cases.

Held by tests/scaling/test_scaling.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scalora.scaling.nonnegative import minimize_nonnegative
from scalora.scaling.quadratic import QuadraticModel

LearningRate = float | Tensor


class ColumnScaling(NamedTuple):
    """The scaling of both factors' columns, and its magnitude.

    Attributes:
        alpha: (..., r), of P's columns.
        beta: (..., r), of Q's.
        lipschitz_lr: (...,), the smoothness constant L times the geometric mean of the two learning
            rates; NaN where it is still to be matched.
    """

    alpha: Tensor
    beta: Tensor
    lipschitz_lr: Tensor


def column_scaling(
    model: QuadraticModel,
    rule: str,
    lr: tuple[LearningRate, LearningRate],
    *,
    bound: float,
    lipschitz: float | None = None,
    lipschitz_lr: Tensor | None = None,
    held: Tensor | None = None,
    step_model: Callable[[], QuadraticModel] | None = None,
) -> ColumnScaling:
    """Return the scaling that a rule chooses for a model (docs/mathematics.md, the magnitude).

    Args:
        model: of the directions that the rule assumes.
        rule: one of `SOLVERS`.
        lr: of P and of Q; each a float or a tensor that broadcasts with (..., 1).
        bound: every factor stays within ``[1/bound, bound]``.
        lipschitz: the smoothness constant L.
        lipschitz_lr: (...,), its product with the geometric mean of the learning rates.  Without
            either it is the one with which the coming step is predicted to be as long as plain
            LoRA's.
        held: (...,), the product to keep; NaN where it is to be matched.
        step_model: returns the model of the directions in which the coming step really goes, if
            those are not the rule's.

    Returns:
        alpha and beta positive, in the solver's dtype.
    """
    x = _solve(model, rule)
    rate = (lr[0] * lr[1]) ** 0.5
    if lipschitz is not None:
        lipschitz_lr = (torch.ones_like(x[..., :1]) * (lipschitz * rate)).squeeze(-1)
    if lipschitz_lr is None:
        step = model if step_model is None else step_model()
        matching = _matching_lipschitz_lr(model, x, step, (lr[0] / rate, lr[1] / rate))
        lipschitz_lr = matching if held is None else torch.where(held.isnan(), matching, held)
    x = x * rate / lipschitz_lr.unsqueeze(-1)
    return ColumnScaling(*_scaling_from_weights(model, x, lr, bound), lipschitz_lr)


def exact(model: QuadraticModel) -> Tensor:
    """Return the non-negative optimum of the model with L = 1: (..., 2r)."""
    return minimize_nonnegative(model.H, model.lam)


def scalar(model: QuadraticModel) -> Tensor:
    """Return the optimum with one non-negative scalar for P and one for Q: (..., 2r)."""
    tied = model.tied()
    return minimize_nonnegative(tied.H, tied.lam).repeat_interleave(model.rank, dim=-1)


def paper(model: QuadraticModel) -> Tensor:
    """Return the published theorem (arXiv 2510.23818): ``H^-1 lambda`` if that is non-negative.

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


def _solve(model: QuadraticModel, rule: str) -> Tensor:
    """Return the rule's ``x`` for L = 1, zero where the model is not live: (..., 2r)."""
    alive = _live(model).unsqueeze(-1)
    lam = torch.where(alive, model.lam, torch.zeros_like(model.lam))
    identity = torch.eye(lam.shape[-1], dtype=lam.dtype, device=lam.device)
    H = torch.where(alive.unsqueeze(-1), model.H, identity)
    return SOLVERS[rule](model._replace(H=H, lam=lam))


def _live(model: QuadraticModel) -> Tensor:
    """Return where there is something to scale: (...,), bool.

    False for a non-finite gradient and for a factor that is still zero, as PEFT's ``lora_B`` is at
    first (H is singular then).
    """
    finite = torch.isfinite(model.H).all(-1).all(-1) & torch.isfinite(model.lam).all(-1)
    moving = (model.H.diagonal(dim1=-2, dim2=-1) > 0).unflatten(-1, (2, model.rank)).any(-1).all(-1)
    return finite & moving


def _plain_weights(model: QuadraticModel, lr: tuple[LearningRate, LearningRate]) -> Tensor:
    """Return the ``x`` of plain LoRA, ``alpha = beta = 1``: ``[lr_Q; lr_P]``, (..., 2r)."""
    ones = torch.ones_like(model.lam)
    return torch.cat([ones[..., : model.rank] * lr[1], ones[..., model.rank :] * lr[0]], dim=-1)


def _matching_lipschitz_lr(
    model: QuadraticModel,
    x: Tensor,
    step: QuadraticModel,
    rates: tuple[LearningRate, LearningRate],
) -> Tensor:
    """Return the L times learning rate that makes the coming step as long as plain LoRA's: (...,).

    A rule whose directions have degree d scales by ``f = (x / (L lr))^(1/(1+d))``.  The inner
    optimizer, whose own directions have degree e, then moves the weight by
    ``|[lr_Q alpha^(1+e); lr_P beta^(1+e)]|_H``, and plain LoRA's by the same with ``f = 1``.

    Args:
        model: of the rule's directions.
        x: (..., 2r), the rule's weights for L = 1.
        step: the model of the inner optimizer's directions.
        rates: of P and Q over their geometric mean.

    Returns:
        NaN where there is nothing to match yet.
    """
    plain = _plain_weights(model, rates)
    factors = (x / plain).pow(1 / (1 + model.degree))
    ratio = step.step_size(plain * factors.pow(1 + step.degree)) / step.step_size(plain)
    matching = ratio.pow((1 + model.degree) / (1 + step.degree))
    usable = _live(step) & torch.isfinite(matching) & (matching > 0)
    return torch.where(usable, matching, torch.nan)


def _scaling_from_weights(
    model: QuadraticModel, x: Tensor, lr: tuple[LearningRate, LearningRate], bound: float
) -> tuple[Tensor, Tensor]:
    """Return ``alpha = (x_P / lr_Q)^(1/(1+degree))`` and ``beta`` likewise, kept within bounds.

    A layer that is not live, a column with a zero row in H and a non-finite result are scaled
    by 1.  All others stay within ``[1/bound, bound]``: a column whose two factors both vanished
    could never come back.
    """
    factors = (x / _plain_weights(model, lr)).pow(1 / (1 + model.degree))
    column = model.H.diagonal(dim1=-2, dim2=-1) > 0
    keep = _live(model).unsqueeze(-1) & column & torch.isfinite(factors)
    factors = torch.where(keep, factors.clamp(1 / bound, bound), torch.ones_like(factors))
    alpha, beta = factors.split(model.rank, dim=-1)
    return alpha, beta
