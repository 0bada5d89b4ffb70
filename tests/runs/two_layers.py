"""A model of two LoRA layers and a head, its gradients and optimizers."""

from __future__ import annotations

import copy
import functools

import models
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import scalora
from scalora.peft_layers import lora_pairs


def make_model(dtype: torch.dtype = torch.float32, *, from_zero: bool = False) -> nn.Module:
    """Return two LoRA layers and a trained head; both factors random unless ``from_zero``."""
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 6)
    )
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["0", "2"],
        modules_to_save=["4"],
        init_lora_weights=from_zero,
    )
    return get_peft_model(base.to(dtype), config)


def adamw(model: nn.Module, lr: float = 1e-2, **arguments) -> torch.optim.AdamW:
    return torch.optim.AdamW(models.trainable(model), lr=lr, **arguments)


def rebasing(inner: torch.optim.Optimizer, model: nn.Module, **options) -> scalora.ScaLoRA:
    """Return a ScaLoRA with a rule that re-bases every layer at every step."""
    return scalora.ScaLoRA(inner, model, **{"rule": "exact", **options})


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 12, generator=generator).to(dtype)
    y = torch.randn(32, 6, generator=generator).to(dtype)
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    return loss.detach()


train = functools.partial(models.train_by, backward)


def effective(model: nn.Module) -> dict[str, torch.Tensor]:
    return {pair.name: pair.effective_weight().double() for pair in lora_pairs(model, "default")}


def copy_with_gradients(
    model: nn.Module, optimizer: scalora.ScaLoRA
) -> tuple[nn.Module, scalora.ScaLoRA]:
    """Return a copy of both with the gradients, which `copy.deepcopy` leaves out."""
    gradients = [p.grad for p in model.parameters()]
    model, optimizer = copy.deepcopy((model, optimizer))
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = None if gradient is None else gradient.clone()
    return model, optimizer
