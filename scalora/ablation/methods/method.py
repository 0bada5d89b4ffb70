"""A method: its options, and how it makes a pretrained model ready to train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from scalora.ablation.task import Task


@dataclass(frozen=True)
class Setup:
    """The inputs of a method; nothing in them says which method it is."""

    task: Task
    model: nn.Module
    """The pretrained model, this run's own copy, on the device where it trains."""
    rank: int
    learning_rate: float
    steps: int
    warmup: int
    """Steps over which the learning rate rises to ``learning_rate``."""
    seed: int


@dataclass
class Training:
    """The model, optimizer and schedule of a run."""

    model: nn.Module
    """The module that computes the loss: the model itself, or a ``PeftModel`` around it."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    after_step: Callable[[int], None] | None = None
    """Called with the number of steps done, after the optimizer and the schedule."""


@dataclass(frozen=True)
class Method:
    """A named way to train.

    Attributes:
        name: its one name, a spec.
        start: makes the model ready, in place, and returns what trains it.
        rate: factor that the task's learning rates are multiplied by. Full fine-tuning works at
            smaller ones; every method is tried at equally many.
        dtype: dtype of the pretrained model.
    """

    name: str
    start: Callable[[Setup], Training]
    rate: float = 1.0
    dtype: torch.dtype = torch.float32


class Recipe(ABC):
    """A way to train and its options. Subclasses are frozen dataclasses; fields are the options."""

    name: ClassVar[str]
    """As a spec spells it."""

    title: ClassVar[str]
    """As a picture spells it."""

    rate: ClassVar[float] = 1.0
    """Factor that the task's learning rates are multiplied by."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the pretrained model is cast to."""
        return torch.float32

    def start(self, setup: Setup) -> Training:
        """Make the model ready, in place, and return what trains it.

        Torch's generator is then at the run's seed: dropout is the same whatever was drawn before.
        """
        training = self.training(setup)
        torch.manual_seed(setup.seed)
        return training

    @abstractmethod
    def training(self, setup: Setup) -> Training:
        """Make the model ready, in place, and return what trains it."""

    def label(self, rank: int) -> str:
        """Return the name in a picture, options left out; ``rank`` is the task's."""
        return self.title
