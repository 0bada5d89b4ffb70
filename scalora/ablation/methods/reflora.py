"""RefLoRA: at every step, the factorisation that the loss's upper bound is least at."""

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

    Of all factorisations ``P R (Q R^-T)^T`` of a layer's product, one step of gradient descent has
    the least upper bound on the loss where both factors have one Gramian; `balancing` is its
    ``S = R R^T`` in closed form.  A step there is, back in the coordinates of P and Q, a step along
    ``g_P S^-1`` and ``g_Q S``.  Those are what AdamW is given: the factors are not rewritten, so
    the function is not either, and the moments are those of the preconditioned gradients, in
    coordinates that stay. This is how the authors' published code treats Adam (read, not copied);
    their scalar variant, RefLoRA-S, is not here.

    While ``lora_B`` is zero, S is infinite: the first steps are plain LoRA's.

    after: how many; as many as the warm-up's, and one at least, unless given.
    """

    name: ClassVar[str] = "reflora"

    after: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after is not None and self.after < 1:
            raise ValueError(f"after={self.after} must be at least 1: lora_B begins at zero.")

    def optimizer(self, model: PeftModel, setup: Setup) -> torch.optim.Optimizer:
        """What steps the adapter's parameters, and the head's."""
        optimizer = adamw(model, setup)
        after = max(1, setup.warmup) if self.after is None else self.after
        optimizer.register_step_pre_hook(Precondition(model, after))
        return optimizer


def balancing(gramian_P: Tensor, gramian_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return S and its inverse: the positive definite S with ``S P^T P S = Q^T Q``.

    That is the geometric mean of ``(P^T P)^-1`` and ``Q^T Q``, the minimum over S of
    ``|P S P^T|_F^2 + |Q S^-1 Q^T|_F^2``.  Eigenvalues below a millionth of the largest are raised
    to that, so that directions which a factor does not have are not divided by zero.  The identity
    where a factor is zero.

    gramian_P, gramian_Q: ``P^T P`` and ``Q^T Q``, (..., r, r); float64 inside.
    """
    gramian_P, gramian_Q = gramian_P.double(), gramian_Q.double()
    root, inverse = _roots(gramian_P)
    middle, inverse_middle = _roots(root @ gramian_Q @ root)
    S, S_inverse = inverse @ middle @ inverse, root @ inverse_middle @ root
    defined = (S.isfinite() & S_inverse.isfinite()).all(-1).all(-1)[..., None, None]
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return torch.where(defined, S, identity), torch.where(defined, S_inverse, identity)


def _roots(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of symmetric positive semidefinite matrices, and that root's inverse."""
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
