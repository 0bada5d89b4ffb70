"""One run, its record, and which runs a plan is made of."""

import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from ablation_methods import Tokens
from ablation_stand_ins import FILE, Tiny

from scalora.ablation.change import mean_spectrum, spectra_of_change, summary_of
from scalora.ablation.job import Job
from scalora.ablation.methods import method_of
from scalora.ablation.methods.method import Setup
from scalora.ablation.plan import TaskPlan, scaled
from scalora.ablation.record import Record, read_record, write_record
from scalora.ablation.report.results import results_of
from scalora.ablation.run import run, run_and_record, warm_up_steps
from scalora.ablation.training import curve_points, train

JOB = Job(f"{FILE}:Tiny", "lora", 1e-2, 0, 12, 2)
SCALORA = "scalora:rule=exact"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    cache = tmp_path_factory.mktemp("cache")
    # In so few steps the default re-bases nothing.
    specs = {"lora": "lora", "scalora": SCALORA, "full-adapted": "full-adapted"}
    return {name: run(dataclasses.replace(JOB, method=spec), cache) for name, spec in specs.items()}


def test_run_tells_all_that_is_reported(records: dict[str, Record]) -> None:
    for record in records.values():
        assert record.status == "ok" and record.done and record.error is None
        assert set(record.validation) == set(record.test) == {"loss", "accuracy"}
        assert record.source_before == 0.0 and record.source_after is not None
        assert record.source_after > 0
        assert [step for step, _ in record.curve] == [0, *range(1, 13)]
        assert record.curve[-1][1] == record.validation["loss"] < record.curve[0][1]
        assert len(record.training_losses) == 12
        assert record.seconds_a_step is not None and record.seconds_a_step > 0
        assert record.peak_bytes is not None and record.peak_bytes > 0
        assert set(record.spectra) == {"first", "head"}
        assert record.spectrum[0] == 1.0 and len(record.spectrum) == 4
        assert set(record.versions) == {"python", "torch", "transformers", "peft", "scalora"}
    assert records["lora"].trainable_parameters == 2 * (8 + 8) + 2 * (8 + 4)
    assert records["full-adapted"].peak_bytes != records["lora"].peak_bytes


def test_methods_begin_alike(records: dict[str, Record]) -> None:
    assert len({record.curve[0] for record in records.values()}) == 1


def test_rank_of_the_change_is_the_methods(records: dict[str, Record]) -> None:
    lora, full = records["lora"], records["full-adapted"]
    for layer in lora.spectra.values():
        assert layer.energy_top_r == pytest.approx(1.0, abs=1e-6)
        assert layer.stable_rank <= layer.effective_rank <= 2.001
    assert all(layer.energy_top_r < 0.999 for layer in full.spectra.values())
    assert max(layer.effective_rank for layer in records["scalora"].spectra.values()) > 2.1


def test_miub_is_of_the_layers_that_have_two_paths(records: dict[str, Record]) -> None:
    assert records["full-adapted"].miub is None
    for method in ("lora", "scalora"):
        miub = records[method].miub
        assert miub is not None and set(miub) == {"first", "head"}
        assert all(math.isfinite(value) for value in miub.values())


def test_same_job_gives_the_same_numbers(records: dict[str, Record], tmp_path: Path) -> None:
    torch.manual_seed(99)
    torch.rand(7)
    again = run(dataclasses.replace(JOB, method=SCALORA), tmp_path)
    for name in ("curve", "training_losses", "validation", "test", "spectra", "miub"):
        assert getattr(again, name) == getattr(records["scalora"], name)


def test_base_in_half_precision_is_trained_on_and_is_not_training_state(tmp_path: Path) -> None:
    task = f"{inspect.getfile(Tokens)}:Tokens"
    whole, half = (
        run(Job(task, method, 1e-2, 0, 4, 2), tmp_path) for method in ("lora", "lora:base=bfloat16")
    )
    assert half.status == "ok" and half.state_bytes == whole.state_bytes
    assert half.peak_bytes is not None and whole.peak_bytes is not None
    assert half.peak_bytes < whole.peak_bytes
    assert half.test["loss"] != whole.test["loss"]
    assert half.test["loss"] == pytest.approx(whole.test["loss"], rel=1e-2)
    # Rounding the base is no part of the change: that has the adapter's rank.
    assert all(layer.energy_top_r > 0.999 for layer in half.spectra.values())


def test_other_seed_gives_other_numbers(records: dict[str, Record], tmp_path: Path) -> None:
    assert run(dataclasses.replace(JOB, seed=1), tmp_path).test != records["lora"].test


@pytest.mark.parametrize("method", ["lora", "scalora", "full-adapted"])
def test_divergence_is_a_result(method: str, tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, method=method, learning_rate=1e30)
    record = run_and_record(job, tmp_path, tmp_path)
    assert record.status == "diverged" and record.done and record.error is None
    assert record.diverged_at is not None and record.test == {} and record.trainable_parameters
    again = read_record(record.job, tmp_path)
    assert again is not None and again.status == "diverged"


def test_what_a_method_raises_at_numbers_that_are_not_finite_is_divergence() -> None:
    task = Tiny()
    training = method_of("lora").start(Setup(task, task.model(0), 2, 1e30, 5, 1, 0))

    def complain(step: int) -> None:
        if step == 3:
            raise ArithmeticError("not finite")

    training.after_step = complain
    assert train(task, training, 0, 5).diverged_at in (2, 3)
    training = method_of("lora").start(Setup(task, task.model(0), 2, 1e-3, 5, 1, 0))
    training.after_step = complain
    with pytest.raises(ArithmeticError):
        train(task, training, 0, 5)


def test_what_a_run_raises_is_recorded(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, method="nonsense")
    record = run_and_record(job, tmp_path, tmp_path)
    assert record.status == "failed" and not record.done
    assert record.error is not None and record.error.startswith("ValueError: no method 'nonsense'")
    assert read_record(job, tmp_path) == record


def test_record_is_read_as_it_was_written(records: dict[str, Record], tmp_path: Path) -> None:
    for record in records.values():
        write_record(record, tmp_path)
        assert read_record(record.job, tmp_path) == record


@pytest.mark.parametrize(
    "change",
    [
        {"task": f"{FILE}:Contrary"},
        {"method": "scalora"},
        {"learning_rate": 0.011},
        {"seed": 1},
        {"steps": 13},
        {"rank": 3},
        {"device": "cuda"},
        {"options": (("data", "x"),)},
        {"source_code": "edited"},
    ],
)
def test_record_of_other_settings_is_not_taken_for_this_one(
    change: dict[str, object], records: dict[str, Record], tmp_path: Path
) -> None:
    write_record(records["lora"], tmp_path)
    other = dataclasses.replace(JOB, **change)  # type: ignore[arg-type]
    assert other.file_name != JOB.file_name
    assert read_record(other, tmp_path) is None
    # Nor one that was given its name.
    (tmp_path / JOB.file_name).rename(tmp_path / other.file_name)
    assert read_record(other, tmp_path) is None


def test_record_that_is_cut_short_is_none(records: dict[str, Record], tmp_path: Path) -> None:
    write_record(records["lora"], tmp_path)
    path = tmp_path / JOB.file_name
    path.write_text(path.read_text()[:100])
    assert read_record(JOB, tmp_path) is None
    path.write_text(json.dumps({"job": []}))
    assert read_record(JOB, tmp_path) is None


def test_name_of_a_record_is_readable_and_a_plain_file_name() -> None:
    name = dataclasses.replace(JOB, method="scalora:interval=10").file_name
    assert "/" not in name and ":" not in name and len(name) < 130
    assert "scalora-interval=10_lr0.01_seed0" in name


def test_warm_up_is_a_twentieth_and_at_least_one_step() -> None:
    assert [warm_up_steps(steps) for steps in (1, 4, 100, 1500)] == [1, 1, 5, 75]


@pytest.mark.parametrize("steps", [1, 4, 15, 16, 100, 1500])
def test_curve_has_about_fifteen_points_and_the_end(steps: int) -> None:
    points = curve_points(steps)
    assert points[-1] == steps and len(points) == min(15, steps)
    assert points == sorted(set(points)) and points[0] >= 1


def test_training_counts_the_steps_for_a_method() -> None:
    task, seen = Tiny(), []
    setup = Setup(task, task.model(0), 2, 1e-2, 5, 1, 0)
    training = method_of("lora").start(setup)
    training.after_step = seen.append
    train(task, training, 0, 5)
    assert seen == [1, 2, 3, 4, 5]


def test_spectrum_of_a_known_change() -> None:
    before = {"layer": torch.eye(3), "other": torch.zeros(2, 2)}
    after = {"layer": torch.eye(3) + torch.diag(torch.tensor([2.0, 0.0, -1.0]))}
    spectra = spectra_of_change(before, after)
    assert torch.allclose(spectra["layer"], torch.tensor([2.0, 1.0, 0.0]))
    layer = summary_of(spectra["layer"], rank=1)
    assert layer.stable_rank == pytest.approx(5 / 4)
    assert layer.energy_top_r == pytest.approx(4 / 5)
    entropy = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    assert layer.effective_rank == pytest.approx(math.exp(entropy))
    unchanged = summary_of(torch.zeros(3), rank=1)
    assert (unchanged.effective_rank, unchanged.stable_rank, unchanged.energy_top_r) == (0, 0, 1)
    spectra |= {"unchanged": torch.zeros(3), "short": torch.tensor([4.0, 4.0])}
    assert mean_spectrum(spectra) == [1.0, 0.75]
    assert mean_spectrum({"unchanged": torch.zeros(3)}) == []


def plan(**changes: object) -> TaskPlan:
    settings: dict[str, object] = {
        "task": "tiny",
        "name": "tiny",
        "options": (),
        "source_code": "",
        "metric": "loss",
        "lower_is_better": True,
        "methods": ("lora", "full"),
        "rates": (1.0, 0.1),
        "learning_rates": (1e-3, 1e-2, 1e-1),
        "seeds": (0, 1, 2),
        "search_seeds": (0,),
        "steps": 10,
        "rank": 2,
        "device": "cpu",
    }
    return TaskPlan(**{**settings, **changes})  # type: ignore[arg-type]


def ended(job: Job, validation: float, test: float, last: float | None = None) -> Record:
    curve = [(0, 8.0), (10, validation if last is None else last)]
    scores = {"validation": {"loss": validation}, "test": {"loss": test}}
    return Record(job, "ok", curve=curve, source_before=1.0, source_after=1.5, **scores)  # type: ignore[arg-type]


def test_every_method_has_as_many_learning_rates() -> None:
    jobs = plan().search()
    assert [job.learning_rate for job in jobs if job.method == "lora"] == [1e-3, 1e-2, 1e-1]
    assert [job.learning_rate for job in jobs if job.method == "full"] == [1e-4, 1e-3, 1e-2]
    assert {job.seed for job in jobs} == {0}
    assert plan().number_of_runs == 6 + 4 and scaled(1e-3, 0.1) == 1e-4


def test_seeds_beyond_the_search_run_the_best_rate_alone() -> None:
    records = {
        job: ended(job, abs(math.log10(job.learning_rate) + 2), 0.0) for job in plan().search()
    }
    rest = plan().rest(records)
    assert [(job.method, job.learning_rate, job.seed) for job in rest] == [
        *(("lora", 1e-2, 1), ("full", 1e-2, 1), ("lora", 1e-2, 2), ("full", 1e-2, 2)),
    ]
    assert plan(search_seeds=(0, 1, 2)).rest(records) == []


def whole(losses: dict[str, list[float]], test: dict[str, list[float]]) -> dict[Job, Record]:
    """The middle rate as given; the search three times as bad at the others."""
    found = {}
    for method in plan().methods:
        for learning_rate in plan().learning_rates:
            job = plan().job(method, learning_rate, 0)
            found[job] = ended(job, 3 * losses[method][0], 100.0)
        for seed in plan().seeds:
            job = plan().job(method, 1e-2, seed)
            found[job] = ended(job, losses[method][seed], test[method][seed])
    return found


def test_results_on_numbers_worked_out_by_hand() -> None:
    records = whole(
        {"lora": [4.0, 4.0, 4.0], "full": [2.0, 6.0, 2.0]},
        {"lora": [1.0, 2.0, 3.0], "full": [0.5, 1.0, 3.0]},
    )
    lora, full = results_of(plan(), records)
    assert (lora.best, full.best) == (1e-2, 1e-3)
    assert lora.test["loss"] is not None and lora.test["loss"].mean == pytest.approx(2.0)
    assert lora.test["loss"].stderr == pytest.approx(math.sqrt(1 / 3))
    # differences -0.5, -1, 0: mean -0.5, variance 0.25, standard error 0.5 / sqrt(3)
    assert full.difference is not None and full.difference.mean == pytest.approx(-0.5)
    assert full.difference.stderr == pytest.approx(0.5 / math.sqrt(3))
    assert lora.difference is None
    # validation, seed 0: LoRA 12, 4, 12; full 6, 2, 6
    assert lora.robustness == pytest.approx(12 / 4)
    assert full.robustness == pytest.approx(6 / 4)
    # from 8 to 2 in 10 steps: 4 is reached after 10 * 4 / 6; from 8 to 6 it is not
    assert full.steps_to_baseline is not None and full.not_reached == 1
    assert full.steps_to_baseline.mean == pytest.approx(40 / 6)
    assert full.forgetting is not None and full.forgetting.mean == 0.5
    assert (lora.runs, lora.missing, lora.failed) == (5, 0, 0)


def test_divergent_failed_and_missing_runs_are_in_the_results() -> None:
    records = whole(
        {"lora": [4.0, 4.0, 4.0], "full": [2.0, 2.0, 2.0]},
        {"lora": [1.0, 2.0, 3.0], "full": [0.5, 1.0, 3.0]},
    )
    diverged, failed = plan().job("full", 1e-2, 1), plan().job("full", 1e-2, 2)
    records[diverged] = Record(diverged, "diverged", curve=[(0, 8.0), (5, math.inf)])
    records[failed] = Record(failed, "failed", error="RuntimeError: no")
    del records[plan().job("lora", 1e-2, 2)]
    lora, full = results_of(plan(), records)
    test = full.test["loss"]
    assert test is not None and (test.n, test.diverged) == (2, 1) and test.mean == math.inf
    assert full.difference is not None and (full.difference.n, full.difference.diverged) == (2, 1)
    assert (full.failed, full.missing, lora.missing) == (1, 0, 1)
    assert full.not_reached == 1
