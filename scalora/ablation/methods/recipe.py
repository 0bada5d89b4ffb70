"""A method before it has a name: its options, and how it starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from scalora.ablation.methods.method import Setup, Training


class Recipe(ABC):
    """One way to train.  Subclasses are frozen dataclasses whose fields are a spec's options."""

    name: ClassVar[str]
    """As a spec spells it."""

    rate: ClassVar[float] = 1.0
    """What the task's learning rates are multiplied with."""

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
