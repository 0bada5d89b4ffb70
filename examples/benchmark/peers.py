"""What ScaLoRA's cost is compared with: other optimizers of LoRA, and a second adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

import scalora
from scalora.ablation.methods.reflora import Precondition

_SECOND = "second"
_RATE = 1e-3  # learning rate; it costs nothing

MakeOptimizer = Callable[[PeftModel, bool | None], torch.optim.Optimizer]
"""Returns an optimizer of a model's adapter, given ``foreach`` of AdamW; may change the model."""


def adamw(model: PeftModel, foreach: bool | None = None) -> torch.optim.Optimizer:
    """Return torch's AdamW over the trainable parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=_RATE, foreach=foreach)


def rebasing(**options: Any) -> MakeOptimizer:
    """Return a maker of ScaLoRA around `adamw`, with these options."""
    return lambda model, foreach: scalora.ScaLoRA(adamw(model, foreach), model, **options)


def riemannian(model: PeftModel, foreach: bool | None = None) -> torch.optim.Optimizer:
    """Return PEFT's Riemannian preconditioning (arXiv 2402.02347) of AdamW.

    Raises:
        ImportError: the installed PEFT has none.
    """
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=_RATE, foreach=foreach)


def lora_fa(model: PeftModel, foreach: bool | None = None) -> torch.optim.Optimizer:
    """Return PEFT's LoRA-FA (arXiv 2308.03303): it freezes ``lora_A``, and loops over layers.

    Raises:
        ImportError: the installed PEFT has none.
    """
    from peft.optimizers import create_lorafa_optimizer

    config = model.peft_config["default"]
    return create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=_RATE)


def reflora(model: PeftModel, foreach: bool | None = None) -> torch.optim.Optimizer:
    """Return AdamW of RefLoRA's gradients (arXiv 2505.18877); its first step is plain LoRA's."""
    optimizer = adamw(model, foreach)
    optimizer.register_step_pre_hook(Precondition(model, after=1))
    return optimizer


def second_adapter(model: PeftModel, foreach: bool | None = None) -> torch.optim.Optimizer:
    """Add another adapter of the same rank, and return AdamW over both."""
    first = model.peft_config["default"]
    second = LoraConfig(r=first.r, lora_alpha=first.lora_alpha, target_modules=first.target_modules)
    model.add_adapter(_SECOND, second)
    for module in model.modules():  # of a head that is trained whole, one copy alone can be active
        if isinstance(module, LoraLayer):
            module.set_adapter(["default", _SECOND])
    return adamw(model, foreach)


PEERS: dict[str, MakeOptimizer] = {
    "Riemannian (PEFT)": riemannian,
    "LoRA-FA (PEFT)": lora_fa,
    "RefLoRA": reflora,
    "second adapter": second_adapter,
}
