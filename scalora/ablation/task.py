"""What an ablation runs on: one small class a task."""

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

    A task is made anew in every process that runs it, so it holds nothing but what its
    constructor and its files say. Batches and scores depend on the seed and nothing else: two
    methods with the same seed see the same batches in the same order.
    """

    name: ClassVar[str]
    """As ``--task`` spells it, and as its results' folder is called."""

    metric: ClassVar[str] = "loss"
    """The score that a learning rate is chosen by, a key of :meth:`score`."""

    lower_is_better: ClassVar[bool] = True
    """Whether the metric is a loss (or an accuracy)."""

    steps: ClassVar[int]
    """Training steps of a full run."""

    short_steps: ClassVar[int]
    """Training steps of ``--short``, which takes every other learning rate as well."""

    learning_rates: ClassVar[tuple[float, ...]]
    """What every adapter method is tried at; full fine-tuning is tried at as many, scaled."""

    rank: ClassVar[int]
    """r of the adapters, unless ``--rank`` says otherwise."""

    weight_decay: ClassVar[float] = 0.0
    """AdamW's."""

    targets: ClassVar[str | list[str]] = "all-linear"
    """The layers with an adapter, as PEFT's ``target_modules`` takes them."""

    task_type: ClassVar[str | None] = None
    """PEFT's ``task_type``: what is trained in full beside the adapters (a new head)."""

    def prepare(self, cache: Path) -> None:  # noqa: B027 -- most have nothing that takes long
        """Do once, before the first run, whatever takes long, and keep it in a folder.

        cache: a folder of this task's own, kept between commands. Called in every process before
        :meth:`model`; whatever is found there already is not made again.
        """

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """Return a new copy of the pretrained model; the seed draws what is not pretrained."""

    @abstractmethod
    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Yield as many training batches, the same for every method."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss, () nats, of a batch."""

    @abstractmethod
    def score(self, model: nn.Module, split: Split, *, quick: bool = False) -> dict[str, float]:
        """Return what a model in evaluation mode reaches on held-out data, without gradients.

        quick: on a small part of the split and by the loss alone, for a point of a learning curve.
        """

    def source_loss(self, model: nn.Module) -> float | None:
        """Return what tells of forgetting what was pretrained; ``None`` if nothing can.

        A loss, nats, on what the model was pretrained for, or where it has none any more a drift
        that is 0 before training. More is worse.
        """
        return None

    @abstractmethod
    def probes(self) -> list[Batch]:
        """Return a few validation batches, for MIUB and for initialisations that need data."""
