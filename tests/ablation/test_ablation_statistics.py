"""Statistics of an ablation, on numbers worked out by hand."""

import math

import pytest

from scalora.ablation.job import Job
from scalora.ablation.record import Record
from scalora.ablation.statistics import (
    Statistic,
    best_rate,
    mean_curve,
    paired_difference,
    score_of,
    statistic,
    steps_to,
)

JOB = Job("tiny", "lora", 1e-3, 0, 10, 2)


def ended(validation: float, test: float = 0.0) -> Record:
    return Record(JOB, "ok", validation={"loss": validation}, test={"loss": test})


DIVERGED, FAILED = Record(JOB, "diverged"), Record(JOB, "failed")


def test_mean_and_standard_error() -> None:
    # deviations -2, 0, 2: variance 8 / 2 = 4, standard error sqrt(4 / 3)
    assert statistic([1.0, 3.0, 5.0]) == Statistic(3.0, pytest.approx(math.sqrt(4 / 3)), 3)
    assert statistic([2.5]) == Statistic(2.5, None, 1)
    assert statistic([]) is None


def test_what_diverged_is_not_left_out_of_the_mean() -> None:
    assert statistic([1.0, math.inf, 3.0]) == Statistic(math.inf, None, 3, diverged=1)


def test_differences_are_of_the_same_seed() -> None:
    # 1 - 0.5 and 5 - 5.5; seeds 2 and 3 are in one of them only
    found = paired_difference({0: 1.0, 1: 5.0, 2: 9.0}, {1: 5.5, 0: 0.5, 3: 7.0})
    assert found == Statistic(0.0, pytest.approx(0.5), 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(("one", "other"), [(math.inf, 1.0), (1.0, math.inf), (math.inf, math.inf)])
def test_difference_from_what_diverged_is_diverged(one: float, other: float) -> None:
    found = paired_difference({0: one, 1: 1.0}, {0: other, 1: 1.0})
    assert found is not None and found.diverged == 1 and not math.isfinite(found.mean)


def test_pairing_takes_out_what_seeds_share() -> None:
    baseline = {0: 1.0, 1: 11.0, 2: 5.0}
    found = paired_difference({seed: loss - 0.25 for seed, loss in baseline.items()}, baseline)
    assert found == Statistic(-0.25, 0.0, 3)


def test_best_rate_is_that_of_the_mean_on_validation() -> None:
    runs = {
        1e-3: [ended(1.0, test=0.0), ended(4.0, test=0.0)],
        1e-2: [ended(2.0, test=9.0), ended(2.0, test=9.0)],
        1e-1: [ended(0.1), DIVERGED],
    }
    assert best_rate(runs, "loss", lower_is_better=True) == 1e-2
    assert best_rate({1e-2: [ended(1.0)], 1e-3: [ended(1.0)]}, "loss", True) == 1e-3


def test_best_rate_of_a_score_that_is_to_be_high() -> None:
    def scored(accuracy: float) -> Record:
        return Record(JOB, "ok", validation={"accuracy": accuracy})

    runs = {1e-3: [scored(0.7)], 1e-2: [scored(0.8)], 1e-1: [DIVERGED]}
    assert best_rate(runs, "accuracy", lower_is_better=False) == 1e-2


def test_best_rate_where_runs_are_missing_failed_or_diverged() -> None:
    whole = {1e-3: [ended(3.0), ended(3.0)], 1e-2: [ended(1.0), FAILED], 1e-1: [ended(1.0), None]}
    assert best_rate(whole, "loss", True) == 1e-3
    assert best_rate({1e-3: [FAILED, ended(3.0)], 1e-2: [None, ended(1.0)]}, "loss", True) == 1e-2
    lost = {1e-3: [DIVERGED, DIVERGED], 1e-2: [DIVERGED, ended(1.0)]}
    assert best_rate(lost, "loss", True) == 1e-2
    assert best_rate({1e-3: [FAILED], 1e-2: [None]}, "loss", True) is None


def test_score_of_a_run_that_did_not_end_well() -> None:
    assert score_of(DIVERGED, "test", "loss", True) == math.inf
    assert score_of(DIVERGED, "test", "accuracy", False) == -math.inf
    assert score_of(FAILED, "test", "loss", True) is None
    assert score_of(ended(1.0, test=2.0), "test", "loss", True) == 2.0
    assert score_of(ended(1.0), "test", "accuracy", False) is None


def test_steps_to_a_loss_are_read_off_the_curve() -> None:
    curve = [(0, 4.0), (10, 2.0), (20, 3.0), (30, 1.0)]
    assert steps_to(curve, 3.0) == 5.0  # half-way from 4 to 2
    assert steps_to(curve, 2.0) == 10.0
    assert steps_to(curve, 1.5) == 27.5  # from 3 to 1, three quarters
    assert steps_to(curve, 5.0) == 0.0
    assert steps_to(curve, 0.5) is None
    assert steps_to([(0, math.nan), (10, 1.0)], 2.0) == 10.0


def test_mean_curve_ends_where_the_first_run_diverges() -> None:
    curves = [[(0, 4.0), (5, 2.0), (10, 1.0)], [(0, 4.0), (5, 4.0), (10, math.inf)]]
    assert mean_curve(curves) == [(0, 4.0, 0.0), (5, 3.0, pytest.approx(1.0))]
    assert mean_curve([]) == []
