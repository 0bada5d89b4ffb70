"""Results of every method: statistics over the seeds at its best learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scalora.ablation.job import Job
from scalora.ablation.plan import TaskPlan, scaled
from scalora.ablation.record import Record
from scalora.ablation.statistics import (
    Statistic,
    mean,
    mean_curve,
    paired_difference,
    score_of,
    statistic,
    steps_to,
)

BASELINE = "lora"
"""The method that the others are compared with, where it is among them."""

Measure = Callable[[Record], float | None]


@dataclass(frozen=True)
class MethodResult:
    """One method on one task.

    Attributes:
        method: its name.
        rate: its factor of the learning rates.
        best: its best learning rate, its own factor applied; None if no run ended.
        by_rate: learning rate, factor applied -> validation loss over the seeds of the search.
        runs, missing, failed: number of runs in the plan, of those without a record, and of those
            that raised.
        test: score -> statistic over seeds, on the test split.
        difference: test score, the task's metric, minus plain LoRA's of the same seed.
        robustness: the highest mean validation loss over the learning rates, divided by LoRA's
            lowest.
        steps_to_baseline: steps along the learning curve to LoRA's final loss of the same seed.
        not_reached: number of seeds whose curve does not reach that loss.
        forgetting: source loss after minus before.
        effective_rank, stable_rank, energy_top_r, miub: means over the layers.
        miub_of_layers: layer -> statistic over seeds.
        seconds_a_step, peak_bytes, state_bytes, trainable_parameters: as in the record.
        curve: (step, validation loss, its standard error) over seeds.
        curve_difference: (step, validation loss minus plain LoRA's of the same seed, its standard
            error); empty for plain LoRA.
        spectrum: singular values over the largest, mean over layers and seeds.
    """

    method: str
    rate: float
    best: float | None
    by_rate: dict[float, Statistic | None]
    runs: int
    missing: int
    failed: int
    test: dict[str, Statistic | None]
    difference: Statistic | None
    robustness: float | None
    steps_to_baseline: Statistic | None
    not_reached: int
    forgetting: Statistic | None
    effective_rank: Statistic | None
    stable_rank: Statistic | None
    energy_top_r: Statistic | None
    miub: Statistic | None
    miub_of_layers: dict[str, Statistic]
    seconds_a_step: Statistic | None
    peak_bytes: Statistic | None
    state_bytes: Statistic | None
    trainable_parameters: Statistic | None
    curve: list[tuple[int, float, float | None]]
    curve_difference: list[tuple[int, float, float | None]]
    spectrum: list[float]


def results_of(plan: TaskPlan, records: Mapping[Job, Record]) -> list[MethodResult]:
    """Return one result per method, in the plan's order."""
    best = plan.best_rates(records)
    grids = {method: _by_rate(plan, method, records) for method in plan.methods}
    finals = {
        method: {} if rate is None else _ended(grids[method][rate]) for method, rate in best.items()
    }
    baseline = finals.get(BASELINE, {})
    floor = _floor(plan, grids.get(BASELINE, {}))
    return [
        _result(plan, method, best[method], grids[method], finals[method], baseline, floor)
        for method in plan.methods
    ]


Grid = dict[float, dict[int, Record]]
"""Learning rate, factor not applied -> seed -> record; missing runs are left out."""


def _by_rate(plan: TaskPlan, method: str, records: Mapping[Job, Record]) -> Grid:
    return {
        learning_rate: {
            seed: records[job]
            for seed in plan.seeds
            if (job := plan.job(method, learning_rate, seed)) in records
        }
        for learning_rate in plan.learning_rates
    }


def _result(
    plan: TaskPlan,
    method: str,
    best: float | None,
    grid: Grid,
    final: Mapping[int, Record],
    baseline: Mapping[int, Record],
    floor: float | None,
) -> MethodResult:
    rate = plan.rates[plan.methods.index(method)]
    expected = plan.number_of_runs // len(plan.methods)
    every = [record for records in grid.values() for record in records.values()]
    ended = list(final.values())
    layers = dict.fromkeys(layer for record in ended for layer in record.miub or {})
    arrivals = _arrivals(final, baseline)
    losses = {learning_rate: _losses(plan, grid[learning_rate]) for learning_rate in grid}

    def over_seeds(measure: Measure) -> Statistic | None:
        return statistic([x for record in ended if (x := measure(record)) is not None])

    names = dict.fromkeys(name for record in ended for name in record.test)
    return MethodResult(
        method=method,
        rate=rate,
        best=None if best is None else scaled(best, rate),
        by_rate={scaled(lr, rate): statistic(list(losses[lr].values())) for lr in grid},
        runs=expected,
        missing=max(0, expected - len(every)),
        failed=sum(record.status == "failed" for record in every),
        test={
            name: statistic(list(_scores(plan, final, name).values()))
            for name in names or (plan.metric,)
        },
        difference=None
        if method == BASELINE
        else paired_difference(
            _scores(plan, final, plan.metric), _scores(plan, baseline, plan.metric)
        ),
        robustness=_robustness(list(losses.values()), floor),
        steps_to_baseline=statistic([x for x in arrivals if x is not None]),
        not_reached=sum(x is None for x in arrivals),
        forgetting=over_seeds(_forgetting),
        effective_rank=over_seeds(lambda record: _layers(record, "effective_rank")),
        stable_rank=over_seeds(lambda record: _layers(record, "stable_rank")),
        energy_top_r=over_seeds(lambda record: _layers(record, "energy_top_r")),
        miub=over_seeds(lambda record: mean(list(record.miub.values())) if record.miub else None),
        miub_of_layers={
            layer: found
            for layer in layers
            if (found := over_seeds(lambda record, layer=layer: (record.miub or {}).get(layer)))  # type: ignore[misc]
        },
        seconds_a_step=over_seeds(lambda record: record.seconds_a_step),
        peak_bytes=over_seeds(lambda record: record.peak_bytes),
        state_bytes=over_seeds(lambda record: record.state_bytes),
        trainable_parameters=over_seeds(lambda record: record.trainable_parameters),
        curve=mean_curve([record.curve for record in ended]),
        curve_difference=[] if method == BASELINE else _curve_difference(final, baseline),
        spectrum=_mean_spectrum([record.spectrum for record in ended if record.spectrum]),
    )


def _ended(records: Mapping[int, Record]) -> dict[int, Record]:
    return {seed: record for seed, record in records.items() if record.done}


def _scores(plan: TaskPlan, records: Mapping[int, Record], name: str) -> dict[int, float]:
    """Return test scores by seed."""
    scores = {
        seed: score_of(record, "test", name, plan.lower_is_better)
        for seed, record in records.items()
    }
    return {seed: score for seed, score in scores.items() if score is not None}


def _losses(plan: TaskPlan, records: Mapping[int, Record]) -> dict[int, float]:
    """Return validation losses by seed of the search: all learning rates have those seeds."""
    scores = {
        seed: score_of(records[seed], "validation", "loss", True)
        for seed in plan.search_seeds
        if seed in records
    }
    return {seed: score for seed, score in scores.items() if score is not None}


def _floor(plan: TaskPlan, grid: Grid) -> float | None:
    """Return the lowest mean validation loss of the baseline over the learning rates."""
    means = [mean(list(losses.values())) for r in grid.values() if (losses := _losses(plan, r))]
    lowest = min(means, default=math.inf)
    return lowest if math.isfinite(lowest) else None


def _robustness(losses: list[dict[int, float]], floor: float | None) -> float | None:
    if floor is None or not all(losses):
        return None
    return max(mean(list(by_seed.values())) for by_seed in losses) / floor


def _arrivals(final: Mapping[int, Record], baseline: Mapping[int, Record]) -> list[float | None]:
    """Return steps to the baseline's final loss of the same seed; None: it is not reached."""
    return [
        steps_to(record.curve, baseline[seed].curve[-1][1])
        for seed, record in final.items()
        if seed in baseline and baseline[seed].status == "ok"
    ]


def _curve_difference(
    final: Mapping[int, Record], baseline: Mapping[int, Record]
) -> list[tuple[int, float, float | None]]:
    """Return (step, mean, standard error) of curves minus the baseline's, seed by seed."""
    pairs = [(final[seed].curve, baseline[seed].curve) for seed in final if seed in baseline]
    return mean_curve(
        [
            [(step, one - other) for (step, one), (_, other) in zip(ours, theirs, strict=False)]
            for ours, theirs in pairs
        ]
    )


def _forgetting(record: Record) -> float | None:
    if record.source_before is None or record.source_after is None:
        return None
    return record.source_after - record.source_before


def _layers(record: Record, name: str) -> float | None:
    values = [getattr(layer, name) for layer in record.spectra.values()]
    return mean(values) if values else None


def _mean_spectrum(spectra: list[list[float]]) -> list[float]:
    return [mean(values) for values in zip(*spectra, strict=False)]
