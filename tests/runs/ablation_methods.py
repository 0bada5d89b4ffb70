"""Tiny tasks for the methods of an ablation, and a run without its measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from models import VOCABULARY, bert, llama
from torch import Tensor, nn

from scalora.ablation.methods import Setup, Training, method_of
from scalora.ablation.task import Batch, Split, Task


class Tokens(Task):
    """A tiny Llama learns to count: the next token is the last one's successor."""

    name = "tokens"
    steps = 12
    short_steps = 4
    learning_rates = (1e-2,)
    rank = 4

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(1)
        return llama().train()

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            first = torch.randint(VOCABULARY, (8, 1), generator=generator)
            yield (first + torch.arange(10)) % VOCABULARY

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch, labels=batch).loss

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split, *, quick: bool = False) -> dict[str, float]:
        return {"loss": self.loss(model, next(self.batches(99, 1))).item()}

    def probes(self) -> list[Batch]:
        return list(self.batches(98, 2))


class Sentences(Tokens):
    """A tiny BERT with a new head."""

    name = "sentences"
    task_type = "SEQ_CLS"

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return bert().train()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch, labels=batch[:, 0] % 3).loss


def setup_of(task: Task, seed: int = 0, **changes: Any) -> Setup:
    model = changes.pop("model", None) or task.model(seed)
    own = Setup(
        task=task,
        model=model,
        rank=task.rank,
        learning_rate=task.learning_rates[0],
        steps=task.steps,
        warmup=2,
        seed=seed,
    )
    return dataclasses.replace(own, **changes)


def started(spec: str, task: Task, seed: int = 0, **changes: Any) -> Training:
    return method_of(spec).start(setup_of(task, seed, **changes))


def train(training: Training, task: Task, seed: int = 0, steps: int | None = None) -> list[float]:
    """Train as a run does; the loss of every step."""
    losses = []
    for done, batch in enumerate(task.batches(seed, steps or task.steps), start=1):
        loss = task.loss(training.model, batch)
        loss.backward()
        training.optimizer.step()
        training.schedule.step()
        training.optimizer.zero_grad()
        if training.after_step is not None:
            training.after_step(done)
        losses.append(loss.item())
    return losses
