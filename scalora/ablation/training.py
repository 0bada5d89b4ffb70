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

from scalora.ablation.memory import peak_of, state_bytes
from scalora.ablation.methods.method import Training
from scalora.ablation.task import Task

CURVE_POINTS = 15
"""Points of a learning curve, its start not counted; fewer where there are fewer steps."""

MEMORY_STEPS = (1, 2, 10)
"""Steps whose memory is measured. The first makes the optimizer's state; the tenth re-bases, with
the default interval of 10. These steps are not timed."""


@dataclass
class Progress:
    """Measurements of a training loop; as in :class:`scalora.ablation.record.Record`."""

    curve: list[tuple[int, float]] = field(default_factory=list)
    training_losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    state_bytes: int | None = None
    diverged_at: int | None = None

    @property
    def seconds_a_step(self) -> float | None:
        """Return the median over stretches; each has its share of steps that re-base."""
        return statistics.median(self.seconds) if self.seconds else None


def train(
    task: Task, training: Training, seed: int, steps: int, pretrained_bytes: int = 0
) -> Progress:
    """Train for ``steps`` steps, or until a loss is not finite at a point of the curve.

    The host waits for the device at the curve's points and in the steps whose memory is measured,
    and nowhere else.

    Args:
        task, seed: they give the batches.
        training: the model, and what trains it.
        steps: training steps.
        pretrained_bytes: bytes of the model before the method added to it.

    Raises:
        Exception: whatever the task or the method raise, unless the numbers were not finite by
            then: that is divergence.
    """
    seen = Progress()
    batches = task.batches(seed, steps)
    _evaluate(task, training, 0, seen)
    for before, point in itertools.pairwise([0, *curve_points(steps)]):
        losses: list[Tensor] = []
        try:
            _train_stretch(task, training, batches, range(before + 1, point + 1), losses, seen)
            held = state_bytes(training.model, training.optimizer, pretrained_bytes)
            seen.state_bytes = max(held, seen.state_bytes or 0)
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
    """Train from one point of the curve to the next; the losses, () each, stay on the device."""
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
    """Return the steps after which the learning curve has a point; the last is the end."""
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
