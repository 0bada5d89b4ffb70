import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("miub_scaling")


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("miub_scaling_report")


@pytest.mark.filterwarnings("ignore")
def test_every_run_is_measured_and_every_trend_reported(scaling, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "WIDTHS", (16, 32))
    monkeypatch.setattr(scaling, "RANKS", (2, 3, 4))
    monkeypatch.setattr(scaling, "NOISES", (0.01,))
    monkeypatch.setattr(scaling, "RANK", 4)
    monkeypatch.setattr(scaling.data, "TEXTS", ("table", "Python"))
    arguments = ["--short", "--seeds", "2", "--steps", "2", "--pretraining", "2"]
    assert scaling.main([*arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Spearman" in printed and "gaussian, 0.01, per rank" in printed
    saved = json.loads((tmp_path / "results.json").read_text())
    # r = 2 and 4 on Python, the other width, the other text: two seeds each.
    assert len(saved["runs"]) == 8
    assert all(math.isfinite(v) for run in saved["runs"] for v in run["information"].values())
    assert all(run["cross_entropy"] > 0 for run in saved["runs"])
    assert set(saved["trends"]["cross-entropy"]) == {
        "variation",
        "rank",
        "model size",
        "complexity",
    }
    assert (tmp_path / "scaling.png").stat().st_size > 0


def test_a_table_is_the_simplest_text_and_shuffled_words_the_most_complex(scaling):
    levels = {name: scaling.data.complexity(name) for name in scaling.data.TEXTS}
    assert min(levels, key=levels.get) == "table"
    assert max(levels, key=levels.get) == "shuffled Python"
    assert levels["shuffled Python"] > 1.5 * levels["table"]


def test_held_out_bytes_are_not_trained_on(scaling):
    training, held_out = scaling.data.load("Python")
    assert len(training) + len(held_out) == scaling.data.SIZE
    assert training.untyped_storage().data_ptr() == held_out.untyped_storage().data_ptr()
    assert held_out.storage_offset() == len(training)


def test_rank_correlation_is_scipys_also_with_ties(report):
    generator = np.random.default_rng(0)
    x = generator.integers(0, 5, 30).astype(float)
    y = x + generator.normal(size=30)
    rho, p = report.spearman(list(x), list(y))
    expected = scipy.stats.spearmanr(x, y)
    assert rho == pytest.approx(expected.statistic)
    assert p < 0.01
    unrelated = report.spearman(list(x), list(generator.normal(size=30)))
    assert unrelated[1] > 0.05


def test_a_power_law_is_found_exactly(report):
    fit = report.power_law([1, 2, 4, 8], [3 * x**-0.5 for x in (1, 2, 4, 8)])
    assert fit["b"] == pytest.approx(-0.5)
    assert fit["stderr"] == pytest.approx(0, abs=1e-9)
    assert fit["r2"] == pytest.approx(1)
    assert math.isnan(report.power_law([1, 2, 4], [-1, -1, 1])["b"])
