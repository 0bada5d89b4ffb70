"""Tasks that take milliseconds; named on a command line as this file and a class."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from scalora.ablation.task import Split, Task

FILE = __file__
SIZE = 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.first(x))))


class Tiny(Task):
    """A net that moves towards another; its source is to stay as it was."""

    name = "tiny"
    steps = 6
    short_steps = 3
    learning_rates = (1e-3, 1e-2)
    rank = 2
    targets = ["first", "head"]  # noqa: RUF012

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.pretrained, self.target = Net().eval(), Net().eval()

    def model(self, seed: int) -> nn.Module:
        model = Net()
        model.load_state_dict(self.pretrained.state_dict())
        return model

    def batches(self, seed: int, steps: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield torch.randn(16, SIZE, generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - self.target(batch)).square().mean()

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split, *, quick: bool = False) -> dict[str, float]:
        assert not model.training
        loss = self.loss(model, self.held_out(split)).item()
        return {"loss": loss} if quick else {"loss": loss, "accuracy": 1 / (1 + loss)}

    @torch.no_grad()
    def source_loss(self, model: nn.Module) -> float:
        batch = self.held_out("test")
        return (model(batch) - self.pretrained(batch)).square().mean().item()

    def probes(self) -> list[Tensor]:
        return [self.held_out("validation")]

    def held_out(self, split: Split) -> Tensor:
        seed = 100 if split == "validation" else 200
        return torch.randn(64, SIZE, generator=torch.Generator().manual_seed(seed))


class Contrary(Tiny):
    """Its test split likes best what its validation split likes least."""

    name = "contrary"

    def score(self, model: nn.Module, split: Split, *, quick: bool = False) -> dict[str, float]:
        scores = super().score(model, split, quick=quick)
        return scores if split == "validation" else {"loss": 1 / scores["loss"]}


class ByAccuracy(Tiny):
    name = "by-accuracy"
    metric = "accuracy"
    lower_is_better = False


class Broken(Tiny):
    """Raises at its second batch while there is a file."""

    name = "broken"

    def __init__(self, data: str) -> None:
        super().__init__()
        self.file = Path(data)

    def batches(self, seed: int, steps: int) -> Iterator[Tensor]:
        for number, batch in enumerate(super().batches(seed, steps)):
            if number and seed == 1 and self.file.exists():
                raise RuntimeError("the data\nare gone")
            yield batch


class Unprepared(Tiny):
    """Counts in a file how often it tries to prepare, and never can."""

    name = "unprepared"

    def prepare(self, cache: Path) -> None:
        with (cache.parent / "tries").open("a") as file:
            file.write("once\n")
        raise OSError("no disk")


class Fatal(Tiny):
    """Ends its process at seed 0."""

    name = "fatal"

    def batches(self, seed: int, steps: int) -> Iterator[Tensor]:
        if seed == 0:
            os._exit(3)
        return super().batches(seed, steps)


class Slow(Tiny):
    """Tells which processes train, and takes its time from the second seed on."""

    name = "slow"

    def __init__(self, data: str) -> None:
        super().__init__()
        self.folder = Path(data)

    def batches(self, seed: int, steps: int) -> Iterator[Tensor]:
        (self.folder / str(os.getpid())).touch()
        for batch in super().batches(seed, steps):
            if seed and not (self.folder / "fast").exists():
                time.sleep(60)
            yield batch
