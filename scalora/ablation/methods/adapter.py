"""Adapter methods: put one of PEFT's adapters on the model and train it with AdamW."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from scalora.ablation.methods.method import Recipe, Setup, Training
from scalora.ablation.methods.schedule import adamw, linear_schedule
from scalora.ablation.task import Task


def on_adapted_layers(task: Task) -> dict[str, Any]:
    """Return the arguments of every PEFT config that say which layers it is for."""
    targets = task.targets
    return {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": task.task_type,
    }


def put_adapter(model: nn.Module, config: Any, seed: int) -> PeftModel:
    """Put an adapter on the model; the seed alone decides what is drawn for it."""
    torch.manual_seed(seed)
    return get_peft_model(model, config)


BaseDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Adapter(Recipe):
    """An adapter of PEFT's on the task's layers.

    Attributes:
        r: the rank, in place of the task's.
        ranks: the rank in units of the task's.
        base: dtype of the pretrained model; the adapter trains in float32, as PEFT has it.
    """

    r: int | None = None
    ranks: int = 1
    base: BaseDtype = "float32"

    def __post_init__(self) -> None:
        if self.r is not None and self.ranks != 1:
            raise ValueError("r and ranks both say what the rank is; give one of them.")
        if self.ranks < 1 or (self.r is not None and self.r < 1):
            raise ValueError(f"the rank must be at least 1, not r={self.r}, ranks={self.ranks}.")
        if self.base not in get_args(BaseDtype):
            raise ValueError(f"base must be {', '.join(get_args(BaseDtype))}, not {self.base!r}.")

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the pretrained model is cast to."""
        dtype: torch.dtype = getattr(torch, self.base)
        return dtype

    def rank_in(self, rank: int) -> int:
        """Return the adapter's r where the task's is ``rank``."""
        return self.ranks * rank if self.r is None else self.r

    def label(self, rank: int) -> str:
        """Return the name in a picture, with the adapter's r."""
        return f"{self.title}, r = {self.rank_in(rank)}"

    @abstractmethod
    def config(self, setup: Setup) -> Any:
        """Return PEFT's config of the adapter."""

    def optimizer(self, model: PeftModel, setup: Setup) -> torch.optim.Optimizer:
        """Return the optimizer of the adapter's parameters and the head's."""
        return adamw(model, setup)

    def training(self, setup: Setup) -> Training:
        """Make the model ready, in place, and return what trains it."""
        model = put_adapter(setup.model, self.config(setup), setup.seed)
        optimizer = self.optimizer(model, setup)
        return Training(model, optimizer, linear_schedule(optimizer, setup))
