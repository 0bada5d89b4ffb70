"""Statistics of runs: pure functions of numbers and records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scalora.ablation.record import Record


@dataclass(frozen=True)
class Statistic:
    """A mean over seeds.

    Attributes:
        mean: not finite if a run diverged: what it lost has no bound.
        stderr: standard error of the mean; None of fewer than two, or where one diverged.
        n: how many seeds, divergent ones included.
        diverged: how many of them diverged.
    """

    mean: float
    stderr: float | None
    n: int
    diverged: int = 0


def statistic(values: Sequence[float]) -> Statistic | None:
    """Mean and standard error of values, of which those that are not finite count as diverged.

    None of no values.  The standard error is s / sqrt(n), with s^2 the sum of squared deviations
    over n - 1.
    """
    n = len(values)
    if not n:
        return None
    diverged = sum(not math.isfinite(value) for value in values)
    if diverged:
        infinite = [value for value in values if not math.isfinite(value)]
        return Statistic(infinite[0], None, n, diverged)
    mean = math.fsum(values) / n
    if n == 1:
        return Statistic(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Statistic(mean, math.sqrt(variance / n), n)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> Statistic | None:
    """Seed by seed, values minus baseline; None if they have no seed in common.

    A seed at which either diverged counts as diverged.
    """
    seeds = sorted(set(values) & set(baseline))
    return statistic([values[seed] - baseline[seed] for seed in seeds])


def score_of(record: Record, split: str, name: str, lower_is_better: bool) -> float | None:
    """A score of a run; the worst there is if it diverged, None if it failed or has no such."""
    if record.status == "failed":
        return None
    if record.status == "diverged":
        return math.inf if lower_is_better else -math.inf
    scores = record.validation if split == "validation" else record.test
    return scores.get(name)


def best_rate(
    runs: Mapping[float, Sequence[Record | None]], metric: str, lower_is_better: bool
) -> float | None:
    """The learning rate with the best mean score on the validation split.

    Only rates of which every run is done are compared, unless there is none; then those with any.
    Of equal ones the lowest; if all diverged, the one where fewest did.

    Args:
        runs: learning rate -> its runs, one a seed; None for one that is missing.
        metric: the score.
        lower_is_better: whether it is a loss.
    """
    scores = {
        rate: [
            score
            for record in records
            if record is not None
            and (score := score_of(record, "validation", metric, lower_is_better)) is not None
        ]
        for rate, records in runs.items()
    }
    whole = {rate: values for rate, values in scores.items() if len(values) == len(runs[rate]) > 0}
    candidates = whole or {rate: values for rate, values in scores.items() if values}
    sign = 1.0 if lower_is_better else -1.0

    def badness(rate: float) -> tuple[float, float, float]:
        values = [sign * value for value in candidates[rate]]
        diverged = sum(not math.isfinite(value) for value in values) / len(values)
        return (diverged, math.fsum(values) / len(values) if not diverged else 0.0, rate)

    return min(candidates, key=badness, default=None)


def steps_to(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Steps after which a learning curve first reaches a loss, between its points on a line.

    None if it never does.
    """
    for i, (step, loss) in enumerate(curve):
        if not loss <= target:
            continue
        if i == 0:
            return float(step)
        before, higher = curve[i - 1]
        if not math.isfinite(higher):
            return float(step)
        return before + (step - before) * (higher - target) / (higher - loss)
    return None


def mean_curve(
    curves: Sequence[Sequence[tuple[int, float]]],
) -> list[tuple[int, float, float | None]]:
    """(step, mean, standard error) of curves with the same steps, as far as all go and are finite.

    Where one diverged the mean ends: that of the others would look better for it.
    """
    means = []
    for points in zip(*curves, strict=False):
        found = statistic([loss for _, loss in points])
        if found is None or found.diverged:
            break
        means.append((points[0][0], found.mean, found.stderr))
    return means


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one number."""
    return math.fsum(values) / len(values)
