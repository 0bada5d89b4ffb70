"""RefLoRA: at every step, the factorisation with the lowest upper bound on the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor

from scalora import peft_layers
from scalora.ablation.methods.lora import LoRA
from scalora.ablation.methods.method import Setup
from scalora.ablation.methods.schedule import adamw

_CONDITION = 1e6


@dataclass(frozen=True)
class RefLoRA(LoRA):
    """RefLoRA (arXiv 2505.18877): gradients as of the balanced factorisation, then AdamW.

    Write a layer's product as ``P R (Q R^-T)^T``. The upper bound on the loss after one step of
    gradient descent is lowest for the R that gives both factors one Gramian; `balancing` returns
    its ``S = R R^T`` in closed form. In the coordinates of P and Q that step goes along
    ``g_P S^-1`` and ``g_Q S``. AdamW is given those as gradients: the factors are not rewritten, so
    the function stays, and the moments are those of the preconditioned gradients in coordinates
    that stay. The authors' published code treats Adam like this (it was read, not copied). Their
    scalar variant, RefLoRA-S, is not here.

    While ``lora_B`` is zero, S is infinite: the first steps are plain LoRA's.

    Attributes:
        after: number of those steps; the warm-up's, and one at least, unless given.
    """

    name: ClassVar[str] = "reflora"
    title: ClassVar[str] = "RefLoRA"

    after: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after is not None and self.after < 1:
            raise ValueError(f"after={self.after} must be at least 1: lora_B begins at zero.")

    def optimizer(self, model: PeftModel, setup: Setup) -> torch.optim.Optimizer:
        """Return the optimizer of the adapter's parameters and the head's."""
        optimizer = adamw(model, setup)
        after = max(1, setup.warmup) if self.after is None else self.after
        optimizer.register_step_pre_hook(Precondition(model, after))
        return optimizer


def balancing(gramian_P: Tensor, gramian_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return S and its inverse: the positive definite S with ``S P^T P S = Q^T Q``.

    S is the geometric mean of ``(P^T P)^-1`` and ``Q^T Q``. Eigenvalues below a millionth of the
    largest are raised to that, so that directions which a factor lacks are not divided by zero.
    Where a factor is zero, S is the identity.

    Args:
        gramian_P, gramian_Q: ``P^T P`` and ``Q^T Q``, (..., r, r).

    Returns:
        S and its inverse, (..., r, r), float64.
    """
    gramian_P, gramian_Q = gramian_P.double(), gramian_Q.double()
    root, inverse = _roots(gramian_P)
    middle, inverse_middle = _roots(root @ gramian_Q @ root)
    S, S_inverse = inverse @ middle @ inverse, root @ inverse_middle @ root
    defined = (S.isfinite() & S_inverse.isfinite()).all(-1).all(-1)[..., None, None]
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return torch.where(defined, S, identity), torch.where(defined, S_inverse, identity)


def _roots(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of positive semidefinite matrices, and that root's inverse."""
    values, vectors = torch.linalg.eigh(gramian)
    roots = values.clamp_min(values[..., -1:] / _CONDITION).sqrt().unsqueeze(-2)
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


class Precondition:
    """Hook before an optimizer's step; all layers at once, since the matrices are tiny."""

    def __init__(self, model: PeftModel, after: int) -> None:
        self.pairs = peft_layers.lora_pairs(model, "default")
        self.left = after

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Replace every layer's gradients, once ``after`` steps were plain LoRA's."""
        if self.left > 0:
            self.left -= 1
            return
        factors = [(pair.P_parameter, pair.Q_parameter) for pair in self.pairs]
        factors = [(P, Q) for P, Q in factors if P.grad is not None and Q.grad is not None]
        S, inverse = balancing(
            torch.stack([P.flatten(1).T @ P.flatten(1) for P, _ in factors]),
            torch.stack([Q.flatten(1) @ Q.flatten(1).T for _, Q in factors]),
        )
        for (P, Q), own, own_inverse in zip(factors, S, inverse, strict=True):
            assert P.grad is not None and Q.grad is not None
            P.grad.copy_((P.grad.flatten(1).double() @ own_inverse).view_as(P.grad))
            Q.grad.copy_((own @ Q.grad.flatten(1).double()).view_as(Q.grad))
