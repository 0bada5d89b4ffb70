"""The task of an ablation: one small class.

Held by tests/ablation/test_ablation_tasks.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

Split = Literal["validation", "test"]
Batch = Any


class Task(ABC):
    """A pretrained model, batches to train it on, and what is measured on held-out data.

    Every process makes the task anew, from its constructor and its files alone. Batches and scores
    depend on the seed and nothing else: two methods with the same seed see the same batches in the
    same order.
    """

    name: ClassVar[str]
    """The name for ``--task`` and of the results' folder."""

    metric: ClassVar[str] = "loss"
    """Score that a learning rate is chosen by, a key of :meth:`score`."""

    lower_is_better: ClassVar[bool] = True
    """True where the metric is a loss, False where it is an accuracy."""

    steps: ClassVar[int]
    """Training steps of a full run."""

    short_steps: ClassVar[int]
    """Training steps of ``--short``, which takes every other learning rate as well."""

    learning_rates: ClassVar[tuple[float, ...]]
    """Rates that adapter methods are tried at; full fine-tuning is tried at as many, scaled."""

    rank: ClassVar[int]
    """r of the adapters, unless ``--rank`` says otherwise."""

    weight_decay: ClassVar[float] = 0.0
    """AdamW's weight decay."""

    targets: ClassVar[str | list[str]] = "all-linear"
    """The layers with an adapter, as PEFT's ``target_modules`` takes them."""

    task_type: ClassVar[str | None] = None
    """PEFT's ``task_type``, which names what is trained in full beside adapters (a new head)."""

    def prepare(self, cache: Path) -> None:  # noqa: B027 -- most have nothing that takes long
        """Do what takes long, before the first run, and keep it in a folder.

        Called in every process before :meth:`model`; what the folder has is not made again.

        Args:
            cache: a folder of this task's own, kept between commands.
        """

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """Return a new copy of the pretrained model; the seed draws what is not pretrained."""

    @abstractmethod
    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Yield ``steps`` training batches, the same for every method."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss, () nats, of a batch."""

    @abstractmethod
    def score(self, model: nn.Module, split: Split, *, quick: bool = False) -> dict[str, float]:
        """Return the scores of a model in evaluation mode on held-out data, without gradients.

        Args:
            model: the model or a ``PeftModel`` around it.
            split: "validation" or "test".
            quick: a small part of the split and the loss alone, for a point of a learning curve.
        """

    def source_loss(self, model: nn.Module) -> float | None:
        """Return a measure of forgetting, where more is worse; ``None`` if the task has none.

        It is a loss in nats on data like those of pretraining; or, where the model has no such loss
        any more, a drift that is 0 before training.
        """
        return None

    @abstractmethod
    def probes(self) -> list[Batch]:
        """Return a few validation batches, for MIUB and for initialisations that need data."""
