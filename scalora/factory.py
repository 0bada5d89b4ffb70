"""The optimizer in the spelling of PEFT's own factories."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from scalora.optimizer import ScaLoRA
from scalora.options import RebasingOptions


def create_scalora_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    **kwargs: Any,
) -> ScaLoRA:
    """Create a `ScaLoRA` over the trainable parameters of ``model``, in PEFT's spelling.

    The counterpart of ``peft.optimizers.create_loraplus_optimizer``.  To combine the two, wrap what
    that function returns: ``ScaLoRA(create_loraplus_optimizer(...), model)``.

    Args:
        model: the PEFT model.
        optimizer_cls: the inner optimizer's class, for example ``torch.optim.AdamW``.
        lr: learning rate; what is right for plain LoRA is right here.
        kwargs: ScaLoRA's options (``interval``, ``rule``, ...) are its own, all others are passed
            to ``optimizer_cls``.

    Raises:
        TypeError, ValueError: as `ScaLoRA` does.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise TypeError(f"optimizer_cls={optimizer_cls!r} is not a torch.optim.Optimizer class.")
    names = {option.name for option in dataclasses.fields(RebasingOptions)}
    options = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    inner_cls: Any = optimizer_cls
    return ScaLoRA(inner_cls(trainable, lr=lr, **kwargs), model, **options)
