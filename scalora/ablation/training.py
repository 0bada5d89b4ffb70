"""The training loop, the same for every method."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator
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


def train(task: Task, training: Training, seed: int, steps: int) -> Progress:
    """Train for so many steps, or until a loss is not finite at a point of the curve.

    The device is waited for at the curve's points and in the steps whose memory is measured, and
    nowhere else.

    Raises:
        Exception: what the task or the method raise, but for what they raise at numbers that are
            not finite: that is divergence.
    """
    seen = Progress()
    batches = task.batches(seed, steps)
    _evaluate(task, training, 0, seen)
    for before, point in itertools.pairwise([0, *curve_points(steps)]):
        losses: list[Tensor] = []
        try:
            _train_stretch(task, training, batches, range(before + 1, point + 1), losses, seen)
        except Exception:
            if not _has_diverged(training, losses):
                raise
            seen.diverged_at = point
            break
        seen.training_losses.append((point, torch.stack(losses).mean().item()))
        _evaluate(task, training, point, seen)
        if not all(math.isfinite(x[-1][1]) for x in (seen.training_losses, seen.curve)):
            seen.diverged_at = point
            break
    return seen


def _train_stretch(
    task: Task,
    training: Training,
    batches: Iterator[object],
    stretch: range,
    losses: list[Tensor],
    seen: Progress,
) -> None:
    """Train from one point of the curve to the next; the losses, (), stay on the device."""
    device = next(training.model.parameters()).device
    begun = _now(device)
    for number in stretch:

        def step() -> None:
            losses.append(_step(task, training, next(batches)))

        if number in MEMORY_STEPS:
            peak = peak_of(step, training.model, training.optimizer, device)
            seen.peak_bytes = max(peak, seen.peak_bytes or 0)
        else:
            step()
        if training.after_step is not None:
            training.after_step(number)
    if not set(stretch) & set(MEMORY_STEPS):
        seen.seconds.append((_now(device) - begun) / len(stretch))


def _has_diverged(training: Training, losses: list[Tensor]) -> bool:
    trained = [p for p in training.model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained if p.grad is not None]
    return not all(bool(x.isfinite().all()) for x in (*losses, *trained, *gradients))


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
