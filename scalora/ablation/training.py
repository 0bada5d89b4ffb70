"""The training loop, the same for every method."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scalora.ablation.memory import peak_of
from scalora.ablation.methods.method import Training
from scalora.ablation.task import Task

CURVE_POINTS = 15
"""About so many points has a learning curve."""

MEMORY_STEPS = (1, 2, 10)
"""Where memory is measured: the first makes the optimizer's state, the tenth re-bases as well
where that is done every 10 steps.  These steps are not timed."""


@dataclass
class Progress:
    """What a training loop saw; as in :class:`scalora.ablation.record.Record`."""

    curve: list[tuple[int, float]] = field(default_factory=list)
    training_losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    diverged_at: int | None = None

    @property
    def seconds_a_step(self) -> float | None:
        """The median over stretches, each of which holds its share of steps that re-base."""
        return statistics.median(self.seconds) if self.seconds else None


def train(task: Task, training: Training, seed: int, steps: int, device: torch.device) -> Progress:
    """Train for so many steps, or until a loss is not finite at a point of the curve.

    The device is waited for at the curve's points and in the steps whose memory is measured, and
    nowhere else.
    """
    seen = Progress()
    batches = task.batches(seed, steps)
    _evaluate(task, training, 0, seen)
    points = curve_points(steps)
    for before, point in itertools.pairwise([0, *points]):
        stretch = range(before + 1, point + 1)
        losses: list[Tensor] = []
        begun = _now(device)
        for number in stretch:
            batch = next(batches)

            def step(batch: object = batch, losses: list[Tensor] = losses) -> None:
                losses.append(_step(task, training, batch))

            if number in MEMORY_STEPS:
                peak = peak_of(step, training.model, training.optimizer, device)
                seen.peak_bytes = max(peak, seen.peak_bytes or 0)
            else:
                step()
            if training.after_step is not None:
                training.after_step(number)
        if not set(stretch) & set(MEMORY_STEPS):
            seen.seconds.append((_now(device) - begun) / len(stretch))
        seen.training_losses.append((point, torch.stack(losses).mean().item()))
        _evaluate(task, training, point, seen)
        if not all(math.isfinite(x[-1][1]) for x in (seen.training_losses, seen.curve)):
            seen.diverged_at = point
            break
    return seen


def curve_points(steps: int) -> list[int]:
    """Steps after which a point of the learning curve is measured; the last is the end."""
    number = min(CURVE_POINTS, steps)
    return [round(steps * (i + 1) / number) for i in range(number)]


def _step(task: Task, training: Training, batch: object) -> Tensor:
    loss = task.loss(training.model, batch)
    loss.backward()
    training.optimizer.step()
    training.schedule.step()
    training.optimizer.zero_grad()
    return loss.detach().float()


def _evaluate(task: Task, training: Training, step: int, seen: Progress) -> None:
    training.model.eval()
    seen.curve.append((step, task.score(training.model, "validation", quick=True)["loss"]))
    training.model.train()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
