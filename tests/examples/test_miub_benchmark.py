"""The benchmark's distributions are what they are called, and its commands print their tables."""

from __future__ import annotations

import math

import pytest
import torch

from examples.benchmark.miub import families
from examples.benchmark.miub.__main__ import main
from examples.benchmark.miub.beyond_normal import additive_noise, dense, paired, tasks
from examples.benchmark.miub.ground_truth import is_covered

TASKS = {f"{pair.family}, {pair.name}": pair for pair in tasks()}


def drawn(pair, n: int = 20_000, seed: int = 0):
    u, v = pair.sample((n,), torch.Generator().manual_seed(seed))
    return u.double(), v.double()


def log_determinants(u, v) -> float:
    """The mutual information of the Gaussian with the samples' correlations."""
    joint = torch.corrcoef(torch.cat([u, v], 1).T)
    d = u.shape[1]
    parts = joint[:d, :d].logdet() + joint[d:, d:].logdet()
    return float((parts - joint.logdet()) / 2)


def test_there_are_forty_tasks_and_none_twice():
    assert len(TASKS) == len(tasks()) == 40


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_finite_of_both_sides_and_repeat(name):
    u, v = drawn(TASKS[name], 200)
    again = drawn(TASKS[name], 200)
    other = drawn(TASKS[name], 200, seed=1)
    assert u.shape[0] == v.shape[0] == 200
    assert u.isfinite().all() and v.isfinite().all()
    assert torch.equal(u, again[0]) and torch.equal(v, again[1])
    assert not torch.equal(u, other[0])


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("normal,")])
def test_the_information_of_a_normal_task_is_that_of_its_correlations(name):
    u, v = drawn(TASKS[name], 100_000)
    assert log_determinants(u, v) == pytest.approx(TASKS[name].truth, abs=0.03)


@pytest.mark.parametrize("name", [n for n in TASKS if n.startswith(("half-cube,", "normal CDF,"))])
def test_the_image_of_a_normal_task_is_undone_by_ranks(name):
    def scores(x):
        ranks = x.argsort(0).argsort(0) + 0.5
        return torch.special.ndtri(ranks / len(x))

    u, v = drawn(TASKS[name], 30_000)
    assert log_determinants(scores(u), scores(v)) == pytest.approx(TASKS[name].truth, abs=0.03)


@pytest.mark.parametrize("width", [0.1, 0.5, 0.75])
def test_the_information_of_additive_noise_is_that_of_its_densities(width):
    truth, _ = additive_noise(width)
    y = torch.linspace(-width, 1 + width, 200_001, dtype=torch.float64)
    density = (torch.minimum(y + width, torch.ones(())) - (y - width).clamp_min(0)) / (2 * width)
    entropy = torch.trapezoid(torch.special.entr(density.clamp_min(0)), y)
    assert truth == pytest.approx(float(entropy) - math.log(2 * width), abs=1e-6)


def test_margins_are_what_the_tasks_say():
    u, v = drawn(TASKS["bimodal, 1 x 1"], 100_000)
    # Means and variances of the two mixtures of normal numbers of variance 1.
    for x, mean, variance in ((u, 3.5, 1 + 0.3 * 0.7 * 25), (v, 1.0, 1 + 0.25 * 16)):
        assert x.mean() == pytest.approx(mean, abs=0.05)
        assert x.var() == pytest.approx(variance, rel=0.02)
    u, v = drawn(TASKS["swiss roll, 2 x 1"])
    radius = 21 * u.norm(dim=1)
    assert radius.min() > 1.49 * math.pi and radius.max() < 4.51 * math.pi
    assert v.min() > 0 and v.max() < 1
    turn = torch.stack([radius.cos(), radius.sin()], 1) * radius[:, None] / 21
    torch.testing.assert_close(turn, u, atol=1e-5, rtol=1e-5)
    for name in ("uniform, additive noise, 0.1, 1 x 1", "normal CDF, 2-pair, 3 x 3"):
        assert drawn(TASKS[name])[0].mean() == pytest.approx(0.5, abs=0.02)


def test_a_spiral_turns_one_plane_by_the_square_of_the_length():
    straight, turned = (drawn(TASKS[f"{family}, 2-pair, 5 x 5"]) for family in ("normal", "spiral"))
    for before, after, plane in zip(straight, turned, ((0, 1), (1, 2)), strict=True):
        others = [i for i in range(5) if i not in plane]
        assert torch.equal(before[:, others], after[:, others])
        a, b = (torch.complex(x[:, plane[0]], x[:, plane[1]]) for x in (before, after))
        angle = before.square().sum(1) / 5
        rotation = torch.polar(torch.ones_like(angle), angle)
        torch.testing.assert_close(a * rotation, b, atol=1e-4, rtol=0)


def test_dense_and_paired_are_the_papers_numbers():
    assert dense(2)[0] == pytest.approx(math.log(1.8) / 2)
    assert dense(25)[0] == pytest.approx(1.29, abs=0.01)
    assert dense(50)[0] == pytest.approx(1.62, abs=0.01)
    assert paired(25)[0] == pytest.approx(1.0217, abs=1e-4)
    found = {round(TASKS[name].truth, 2) for name in TASKS if "Student" in name}
    assert found == {0.22, 0.43, 0.19, 0.29, 0.18, 0.45, 0.30}


def test_covered_is_on_its_side_of_the_truth_or_less_than_a_hundredth_off():
    errors = [0.01, 0.01]
    assert is_covered([1.0, 0.99], errors, 1.0, lower=False)
    assert not is_covered([1.0, 0.95], errors, 1.0, lower=False)
    assert is_covered([0.95, 0.9], errors, 1.0, lower=True)
    assert not is_covered([0.95, 1.05], [0.0, 0.0], 0.99, lower=True)
    assert is_covered([1.009, 0.992], [0.0, 0.0], 1.0, lower=False)


def test_the_table_has_every_task_and_marks_what_is_not_covered():
    chosen = ["swiss roll, 2 x 1", "Student-t, nu=1, 2 x 2", "normal, 2-pair, 3 x 3"]
    pairs = [TASKS[name] for name in chosen]
    table = families.run(torch.device("cpu"), 400, 2, pairs=pairs)
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    by_task = {f"{row[0]}, {row[1]}": row for row in rows if f"{row[0]}, {row[1]}" in TASKS}
    assert list(by_task) == chosen
    assert by_task["swiss roll, 2 x 1"][3].endswith("*")
    assert by_task["Student-t, nu=1, 2 x 2"][3].endswith("~")
    assert not by_task["normal, 2-pair, 3 x 3"][3].endswith(("*", "~"))
    total = next(row for row in rows if row[0] == "all")
    # Of tempered, and of ranked, which has no moments and sees what is shared.
    assert total[1:3] == ["1 of 3", "3 of 3"]


def test_a_benchmark_or_a_device_that_is_not_there_is_refused(monkeypatch, capsys):
    for arguments, message in (
        (["accuracy"], "no benchmark named accuracy"),
        (["--device", "cuda"], "'cuda' is no device of this machine"),
    ):
        monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err
