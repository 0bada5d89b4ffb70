import importlib
import json
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def reading(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("miub_reading")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_question_is_answered_and_one_report_drawn(reading, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reading, "WIDTH", 16)
    monkeypatch.setattr(reading, "TEXTS", ("table", "Python"))
    monkeypatch.setattr(reading.scaling, "BATCH", 8)
    assert reading.main(["--short", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for title in (
        "A trained adapter",
        "What moves it",
        "Spearman",
        "more rank",
        "Which run",
        "Since",
    ):
        assert title in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["runs"]) == {
        "pretrained, table",
        "pretrained, Python",
        "random, Python",
    }
    assert all(math.isfinite(value) for value in results["scale"]["moved"].values())
    assert all(loss > 0 for losses in results["layers"]["losses"].values() for loss in losses)
    assert sorted(map(int, results["settling"]["loss"])) == [5, 10]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".svg"}


def test_one_half_of_each_kinds_blocks_has_more_rank_and_the_parameters_are_as_many(reading):
    from miub import MIUBReport
    from miub.report.rows import LayerRecord

    def record(block, kind, value):
        name = f"model.layers.{block}.{kind}"
        return LayerRecord(name, "default", 1, 8, value, 0.1, 0.0, 512, False)

    values = {"q_proj": (4.0, 1.0, 3.0, 2.0), "v_proj": (1.0, 2.0, 3.0, 4.0)}
    rows = [record(i, kind, value) for kind in values for i, value in enumerate(values[kind])]
    report = MIUBReport(rows, estimator="tempered", noise=0.01)
    high, low = reading.halved(report, True), reading.halved(report, False)
    assert [high[f"model.layers.{i}.q_proj"] for i in range(4)] == [12, 4, 12, 4]
    assert {layer: 16 - r for layer, r in high.items()} == low
    assert sum(high.values()) == 8 * len(rows)
