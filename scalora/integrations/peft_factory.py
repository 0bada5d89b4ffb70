"""The optimizer in the spelling of PEFT's own factories.

Held by tests/optimizer/test_optimizer.py.
"""

# Annotations are not strings here: `help` shows the values that an option takes.
import inspect
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from scalora.arguments import described, did_you_mean
from scalora.optimizer import ScaLoRA
from scalora.options import (
    Accumulator,
    RebasingKeywords,
    RebasingOptions,
    Rounding,
    Rule,
    WhenFull,
)


def create_scalora_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    interval: int | Literal["auto"] = "auto",
    rule: Rule = "auto",
    lipschitz: float | Literal["auto"] | None = None,
    accumulator: Accumulator = "auto",
    adapter_name: str = RebasingOptions.adapter_name,
    rounding: Rounding = "stochastic",
    bound: float = RebasingOptions.bound,
    seed: int = RebasingOptions.seed,
    carry_rank: int | Literal["auto"] = "auto",
    when_full: WhenFull = "compress",
    carry_tolerance: float = RebasingOptions.carry_tolerance,
    calibration: int | Literal["auto"] = "auto",
    memory: float | Literal["auto"] = "auto",
    **kwargs: Any,
) -> ScaLoRA:
    """Create a `ScaLoRA` over the trainable parameters of ``model``, in PEFT's spelling.

    The counterpart of ``peft.optimizers.create_loraplus_optimizer``.  To combine the two, wrap what
    that function returns: ``ScaLoRA(create_loraplus_optimizer(...), model)``.

    Args:
        model: the PEFT model.
        optimizer_cls: the inner optimizer's class, for example ``torch.optim.AdamW``.
        lr: learning rate; what is right for plain LoRA is right here.
        interval, rule, ...: as for `scalora.ScaLoRA`.
        kwargs: all others, for ``optimizer_cls``.

    Raises:
        TypeError, ValueError: as `ScaLoRA` does.
    """
    _check_arguments(model, optimizer_cls, kwargs)
    options: RebasingKeywords = {
        "interval": interval,
        "rule": rule,
        "lipschitz": lipschitz,
        "accumulator": accumulator,
        "adapter_name": adapter_name,
        "rounding": rounding,
        "bound": bound,
        "seed": seed,
        "carry_rank": carry_rank,
        "when_full": when_full,
        "carry_tolerance": carry_tolerance,
        "calibration": calibration,
        "memory": memory,
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    inner_cls: Any = optimizer_cls
    return ScaLoRA(inner_cls(trainable, lr=lr, **kwargs), model, **options)


def _check_arguments(model: Any, optimizer_cls: Any, kwargs: Iterable[str]) -> None:
    """Raise a TypeError if they are of another kind, or neither's."""
    if isinstance(model, type) and isinstance(optimizer_cls, nn.Module):
        raise TypeError(
            "model and optimizer_cls are swapped: create_scalora_optimizer(model, optimizer_cls)."
        )
    if isinstance(optimizer_cls, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer_cls is an optimizer, not its class: pass {type(optimizer_cls).__name__}, "
            "or wrap what you have, scalora.ScaLoRA(optimizer, model)."
        )
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise TypeError(
            f"optimizer_cls is {described(optimizer_cls)}, not a torch.optim.Optimizer class."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {described(model)}, not a torch.nn.Module.")
    taken = inspect.signature(optimizer_cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    for name in kwargs:
        if name not in taken:
            known = [*RebasingKeywords.__annotations__, *taken]
            raise TypeError(
                f"{name!r} is an option neither of ScaLoRA nor of {optimizer_cls.__name__}."
                f"{did_you_mean(name, known)}"
            )
