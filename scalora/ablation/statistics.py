"""Statistics of runs, as pure functions of numbers and records.

Held by tests/ablation/test_ablation_statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scalora.ablation.record import Record


@dataclass(frozen=True)
class Statistic:
    """A mean over seeds.

    Attributes:
        mean: not finite if a run diverged, as its loss has no bound.
        stderr: standard error of the mean; None: fewer than two seeds, or one diverged.
        n: number of seeds, divergent ones included.
        diverged: number of seeds that diverged.
    """

    mean: float
    stderr: float | None
    n: int
    diverged: int = 0


def statistic(values: Sequence[float]) -> Statistic | None:
    """Return mean and standard error of values; one that is not finite counts as diverged.

    None if there are no values. The standard error is s / sqrt(n), with s^2 the sum of squared
    deviations over n - 1.
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
    """Return the statistic of values minus baseline, seed by seed; None: no seed in common.

    A seed at which either diverged counts as diverged.

    Args:
        values, baseline: seed -> score.
    """
    seeds = sorted(set(values) & set(baseline))
    return statistic([values[seed] - baseline[seed] for seed in seeds])


def score_of(record: Record, split: str, name: str, lower_is_better: bool) -> float | None:
    """Return a score of a run: infinitely bad if it diverged, None if it failed or lacks it."""
    if record.status == "failed":
        return None
    if record.status == "diverged":
        return math.inf if lower_is_better else -math.inf
    scores = record.validation if split == "validation" else record.test
    return scores.get(name)


def best_rate(
    runs: Mapping[float, Sequence[Record | None]], metric: str, lower_is_better: bool
) -> float | None:
    """Return the learning rate with the best mean score on the validation split; None: no run.

    Rates that lack a run are compared only if all do. Of equal rates the lowest is taken; if all
    diverged, the one where fewest runs did.

    Args:
        runs: learning rate -> its runs, one per seed; None for one that is missing.
        metric: name of the score.
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
    """Return the steps after which a learning curve first reaches a loss; None: it never does.

    Between two points of the curve it is a straight line.
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
    """Return (step, mean, standard error) of curves with the same steps.

    The mean ends where the first curve ends or diverges: without it the others' would look better.
    """
    means = []
    for points in zip(*curves, strict=False):
        found = statistic([loss for _, loss in points])
        if found is None or found.diverged:
            break
        means.append((points[0][0], found.mean, found.stderr))
    return means


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean of at least one number."""
    return math.fsum(values) / len(values)
