"""A method before it has a name: its options, and how it starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from scalora.ablation.methods.method import Setup, Training


class Recipe(ABC):
    """One way to train.  Subclasses are frozen dataclasses whose fields are a spec's options."""

    name: ClassVar[str]
    """As a spec spells it."""

    rate: ClassVar[float] = 1.0
    """What the task's learning rates are multiplied with."""

    @abstractmethod
    def start(self, setup: Setup) -> Training:
        """Make the model ready, in place, and return what trains it."""
