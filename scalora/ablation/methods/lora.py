"""LoRA, and what PEFT computes with the same two factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from scalora.ablation.methods.method import Setup, Training
from scalora.ablation.methods.recipe import Recipe
from scalora.ablation.methods.schedule import adamw, linear_schedule
from scalora.ablation.task import Task


def on_adapted_layers(task: Task) -> dict[str, Any]:
    """What every PEFT config says of the layers that it is for."""
    targets = task.targets
    return {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": task.task_type,
    }


def put_adapter(model: nn.Module, config: Any, seed: int) -> PeftModel:
    """Put an adapter on the model; the seed alone decides what is drawn for it."""
    torch.manual_seed(seed)
    return get_peft_model(model, config)


@dataclass(frozen=True)
class LoRA(Recipe):
    """LoRA (arXiv 2106.09685) with AdamW.

    r: the rank, in place of the task's.
    ranks: the rank in units of the task's.
    alpha: PEFT's ``lora_alpha``; r unless given, which scales by 1.
    rslora: scale by ``alpha / sqrt(r)`` (arXiv 2312.03732).
    """

    name: ClassVar[str] = "lora"

    r: int | None = None
    ranks: int = 1
    alpha: int | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.r is not None and self.ranks != 1:
            raise ValueError("r and ranks both say what the rank is; give one of them.")
        if self.ranks < 1 or (self.r is not None and self.r < 1):
            raise ValueError(f"the rank must be at least 1, not r={self.r}, ranks={self.ranks}.")

    def rank(self, setup: Setup) -> int:
        """The adapter's r."""
        return self.ranks * setup.rank if self.r is None else self.r

    def config(self, setup: Setup, **more: Any) -> LoraConfig:
        """PEFT's config of the adapter."""
        r = self.rank(setup)
        return LoraConfig(
            r=r,
            lora_alpha=r if self.alpha is None else self.alpha,
            lora_dropout=0.0,
            use_rslora=self.rslora,
            **on_adapted_layers(setup.task),
            **more,
        )

    def adapted(self, setup: Setup) -> PeftModel:
        """The model with the adapter on it."""
        return put_adapter(setup.model, self.config(setup), setup.seed)

    def optimizer(self, model: PeftModel, setup: Setup) -> torch.optim.Optimizer:
        """What steps the adapter's parameters, and the head's."""
        return adamw(model, setup)

    def start(self, setup: Setup) -> Training:
        """Make the model ready, in place, and return what trains it."""
        model = self.adapted(setup)
        optimizer = self.optimizer(model, setup)
        return Training(model, optimizer, linear_schedule(optimizer, setup))


@dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA (arXiv 2402.09353), PEFT's: a trained magnitude a row, and LoRA for the direction."""

    name: ClassVar[str] = "dora"

    def config(self, setup: Setup, **more: Any) -> LoraConfig:
        """PEFT's config of the adapter."""
        return super().config(setup, use_dora=True, **more)
