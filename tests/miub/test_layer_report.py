"""What the report makes of measurements: rows, totals, table, files, picture."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import math
import os
import random
import statistics
import sys
from pathlib import Path

import pytest

from miub.report.module_kinds import places
from miub.report.plot import figure, heat_map
from miub.report.report import MIUBReport
from miub.report.rows import LayerRecord

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"

BERT_BLOCK = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention.output.dense",
    "intermediate.dense": "intermediate.dense",
    "output.dense": "output.dense",
}
LLAMA_BLOCK = {
    **{f"self_attn.{x}_proj": f"{x}_proj" for x in "qkvo"},
    **{f"mlp.{x}_proj": f"{x}_proj" for x in ("gate", "up", "down")},
}
GPT2_BLOCK = {
    "attn.c_attn": "c_attn",
    "attn.c_proj": "attn.c_proj",
    "mlp.c_fc": "c_fc",
    "mlp.c_proj": "mlp.c_proj",
}


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def _record(layer: str = Q, **fields: object) -> LayerRecord:
    record = LayerRecord(
        layer, "default", step=1, coordinates=4, value=6.0, stderr=0.5, lower=2.0, tokens=512,
        rebased=False,
    )  # fmt: skip
    return dataclasses.replace(record, **fields)  # type: ignore[arg-type]


def _report(*records: LayerRecord) -> MIUBReport:
    return MIUBReport(records, estimator="gaussian", noise=0.01)


def _training() -> MIUBReport:
    return _report(
        *(
            _record(layer, step=step, value=value + step, coordinates=rank)
            for step in (10, 20, 30)
            for layer, value, rank in ((Q, 1.0, 2), (DOWN, 5.0, 10))
        )
    )


def test_row_is_the_measurement_of_the_newest_step_whatever_the_order() -> None:
    records = [_record(step=step, value=float(step), tokens=step) for step in (20, 30, 10)]
    row = _report(*records)[Q]
    assert (row.step, row.value, row.tokens) == (30, 30.0, 30)
    assert row.per_coordinate == row.per_rank == 30.0 / 4
    assert [row.step for row in _report(*records).history[Q]] == [10, 20, 30]


def test_measurements_of_one_step_are_averaged_by_tokens() -> None:
    report = _report(
        _record(value=4.0, stderr=0.3, lower=1.0, tokens=100),
        _record(value=8.0, stderr=0.1, lower=3.0, tokens=300, rebased=True),
    )
    row = report[Q]
    assert row.value == pytest.approx(7.0)
    assert row.lower == pytest.approx(2.5)
    assert row.stderr == pytest.approx(math.sqrt((0.3 * 100) ** 2 + (0.1 * 300) ** 2) / 400)
    assert (row.tokens, row.steps, row.rebased, len(report)) == (400, 1, True, 1)


def test_standard_error_of_an_average_is_the_spread_of_the_average() -> None:
    # The claim itself: independent estimates with the errors that they state, many times over.
    numbers = random.Random(0)
    errors, tokens = (0.5, 1.0, 0.2), (512, 128, 384)

    def once() -> MIUBReport:
        return _report(
            *(
                _record(value=numbers.gauss(6.0, error), stderr=error, tokens=n)
                for error, n in zip(errors, tokens, strict=True)
            )
        )

    spread = statistics.stdev(once()[Q].value for _ in range(2000))
    # The spread of 2000 averages is known to 1.6 %; three times that.
    assert once()[Q].stderr == pytest.approx(spread, rel=0.05)


def test_average_over_steps_keeps_each_layer_and_says_how_many_steps() -> None:
    report = _report(
        _record(step=1, value=2.0, stderr=0.4, tokens=300),
        _record(step=2, value=6.0, stderr=0.4, tokens=100),
        _record(DOWN, step=2, value=9.0),
    )
    averaged = report.averaged()
    assert averaged[Q].value == pytest.approx(3.0)
    assert averaged[Q].stderr == pytest.approx(0.4 * math.hypot(300, 100) / 400)
    assert (averaged[Q].tokens, averaged[Q].steps) == (400, 2)
    assert (averaged[DOWN].value, averaged[DOWN].steps) == (9.0, 1)
    assert averaged.layers == [Q, DOWN]
    assert "mean over 2 steps" in str(averaged)
    assert report[Q].value == 6.0


def test_nan_measurements_are_left_out_and_counted() -> None:
    report = _report(
        _record(value=math.nan, stderr=math.nan, lower=math.nan, tokens=512),
        _record(value=6.0, lower=math.nan, tokens=256),
        _record(DOWN, value=math.nan),
    )
    assert (report[Q].value, report[Q].stderr, report[Q].tokens) == (6.0, 0.5, 256)
    assert math.isnan(report[Q].lower)
    assert math.isnan(report[DOWN].value)
    assert (report.mean, report.total, report.overall().layers) == (6.0, 6.0, 1)
    assert "2 measurements came out as nan" in str(report)


def test_infinite_values_are_kept() -> None:
    report = _report(_record(value=math.inf, stderr=0.0), _record(DOWN))
    assert report[Q].value == math.inf
    assert report.total == math.inf


def test_totals_are_per_kind_and_overall() -> None:
    report = _report(
        _record("layers.0.q_proj", value=2.0, coordinates=2),
        _record("layers.1.q_proj", value=6.0, coordinates=4),
        _record("layers.1.v_proj", value=1.0, coordinates=1),
    )
    kinds = report.by_kind()
    assert kinds["q_proj"] == (4.0, 8.0, 1.25, 2)
    assert kinds["v_proj"] == (1.0, 1.0, 1.0, 1)
    assert (report.mean, report.total) == (3.0, 9.0)
    assert report.mean_per_coordinate == pytest.approx((1.0 + 1.5 + 1.0) / 3)


@pytest.mark.parametrize(
    "prefix, block",
    [
        ("encoder.layer", BERT_BLOCK),
        ("model.layers", LLAMA_BLOCK),
        ("transformer.h", GPT2_BLOCK),
        # Experts are many layers of one kind, apart from the dense layer of the same name.
        (
            "model.layers",
            {
                "mlp.experts.0.up_proj": "experts.up_proj",
                "mlp.experts.1.up_proj": "experts.up_proj",
                "mlp.shared.up_proj": "shared.up_proj",
            },
        ),
        # A class of module is no kind, even where nothing else has the name.
        ("encoder.layer", {"attention.output.dense": "output.dense"}),
        ("", {"conv1": "conv1", "fc": "fc"}),
    ],
)
def test_kinds_are_the_shortest_names_that_tell_modules_apart(
    prefix: str, block: dict[str, str]
) -> None:
    names = [f"{prefix}.{i}.{tail}" if prefix else tail for i in (0, 11) for tail in block]
    found = places(names)
    assert [found[name].kind for name in names] == 2 * list(block.values())
    assert {place.index for place in found.values()} == ({0, 11} if prefix else {None})


def test_blocks_that_are_layers_have_the_kind_of_their_stack() -> None:
    found = places(["net.0", "net.2", "1"])
    assert {name: (place.index, place.kind) for name, place in found.items()} == {
        "net.0": (0, "net"),
        "net.2": (2, "net"),
        "1": (1, "layer"),
    }


def test_rows_are_found_by_name_and_near_names_are_offered() -> None:
    report = _training()
    assert report.layers == [row.layer for row in report] == [Q, DOWN]
    assert Q in report and (Q, "default") in report and "q_proj" not in report
    assert report[Q, "default"] is report[Q]
    with pytest.raises(KeyError, match=r"q_pro' was not measured.*self_attn\.q_proj"):
        report["model.layers.0.self_attn.q_pro"]
    with pytest.raises(KeyError, match=r"Did you mean one of \['model\.layers\.1\.mlp"):
        report["down_proj"]
    with pytest.raises(KeyError, match=r"2 layers, see report\.layers"):
        report["zzz"]
    with pytest.raises(KeyError, match=r"with \['default'\], not with 'other'"):
        report[Q, "other"]


def test_several_adapters_are_kept_apart() -> None:
    report = _report(
        _record(adapter="a", value=1.0),
        _record(adapter="b", value=5.0, coordinates=8),
        _record(DOWN, adapter="b", value=7.0),
    )
    assert (report[Q, "a"].value, report[Q, "b"].value) == (1.0, 5.0)
    assert report[DOWN].adapter == "b"
    with pytest.raises(KeyError, match=r"several adapters.*\['a', 'b'\]"):
        report[Q]
    assert list(report.history) == [(Q, "a"), (Q, "b"), (DOWN, "b")]
    assert report.by_kind("a") == {"q_proj": (1.0, 1.0, 0.25, 1)}
    assert report.overall("b").total == 12.0
    assert report.layers == [Q, DOWN]
    assert len(figure(report).axes) == 4  # two heat maps and their colour bars


def test_report_of_nothing_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no layer was measured: .*every="):
        _report()


def _line(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return line.split()


def test_table_has_every_row_and_total() -> None:
    report = _report(
        _record(value=1.25, lower=math.nan, stderr=0.125),
        _record(DOWN, coordinates=8, value=123456.0),
    )
    text = str(report)
    assert text.splitlines()[0] == (
        "MIUB: gaussian estimator, noise tau = 0.01, 4 to 8 coordinates and 512 tokens per layer, "
        "step 1"
    )
    header = "layer coordinates MIUB (nats) per coordinate stderr lower bound tokens"
    assert _line(text, "layer") == header.split()
    assert _line(text, Q) == [Q, "4", "1.250", "0.312", "0.125", "-", "512"]
    assert _line(text, DOWN)[2:4] == ["1.235e+05", "15432.000"]
    assert _line(text, "q_proj") == ["q_proj", "1", "1.250", "0.312", "1.250"]
    assert _line(text, "all layers")[2:4] == ["2", "61728.625"]
    assert "*" not in text
    assert text.isascii()


def test_rebased_layers_carry_a_mark_that_is_explained() -> None:
    text = str(_report(_record(rebased=True), _record(DOWN)))
    assert _line(text, Q)[1] == "*"
    assert "*" not in _line(text, DOWN)
    assert "* The frozen path of these layers" in text
    assert "reference=" in text


def test_names_are_printed_as_they_are() -> None:
    text = str(_report(_record(adapter="[bold]"), _record(DOWN, adapter=":smile:")))
    assert _line(text, Q)[1] == "[bold]"
    assert _line(text, DOWN)[1] == ":smile:"


def test_table_fits_a_narrow_terminal_without_losing_a_character(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = _report(_record(f"encoder.layer.0.{'attention.' * 6}query"))
    assert report.layers[0] in str(report)
    monkeypatch.setenv("COLUMNS", "80")
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    row = text.split("\n\n")[1].splitlines()[3:]
    assert "".join(line.split()[0] for line in row) == report.layers[0]
    llama = _report(_record("model.layers.31.self_attn.q_proj", value=123.456, stderr=12.345))
    assert _line(str(llama), llama.layers[0])[1:4] == ["123.456", "30.864", "12.345"]


def test_csv_holds_the_whole_history_and_stands_alone(tmp_path: Path) -> None:
    report = _report(
        _record(step=2, value=1 / 3, lower=math.nan),
        _record(step=1),
        _record(DOWN, step=1, rebased=True),
    )
    report.to_csv(tmp_path / "miub.csv")
    with (tmp_path / "miub.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["step"], line["layer"]) for line in lines] == [("1", Q), ("1", DOWN), ("2", Q)]
    assert {(line["estimator"], line["noise"]) for line in lines} == {("gaussian", "0.01")}
    newest = lines[-1]
    assert (float(newest["value"]), float(newest["per_coordinate"])) == (1 / 3, 1 / 3 / 4)
    assert (newest["lower"], newest["coordinates"], newest["tokens"]) == ("", "4", "512")
    assert [line["rebased"] for line in lines] == ["False", "True", "False"]


def test_json_is_valid_and_comes_back_as_the_same_report(tmp_path: Path) -> None:
    report = _report(
        _record(step=2, value=1 / 3, lower=math.nan),
        _record(step=1, adapter="b", rebased=True),
        _record(DOWN, step=1, value=math.nan),
    )

    def fail(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report.to_json(tmp_path / "miub.json")
    content = json.loads((tmp_path / "miub.json").read_text(), parse_constant=fail)
    assert content["rows"][0]["lower"] is None
    assert content["rows"][0]["per_coordinate"] == 1 / 12
    assert content["total"] == report.total
    again = MIUBReport.from_json(tmp_path / "miub.json")
    assert (again.estimator, again.noise) == ("gaussian", 0.01)
    assert str(again) == str(report)
    assert repr(again.history) == repr(report.history)
    report.averaged().to_json(tmp_path / "mean.json")
    assert str(MIUBReport.from_json(tmp_path / "mean.json")) == str(report.averaged())


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}"]
    + [
        f'{{"estimator": "club", "noise": 0.1, "history": {rows}}}'
        for rows in ("[]", "[{}]", '[{"value": 1, "stderr": 1, "lower": 1, "unknown": 1}]')
    ],
)
def test_file_that_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "miub.json").write_text(content)
    with pytest.raises(ValueError, match=r"miub\.json is not a report"):
        MIUBReport.from_json(tmp_path / "miub.json")


@pytest.mark.parametrize("name", ["to_csv", "to_json", "plot"])
def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "report"
    path.write_text("old")
    os.link(path, tmp_path / "reader")  # who has opened the old file goes on reading that one
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            getattr(_training(), name)(path)
    assert path.read_text() == "old"
    assert set(tmp_path.iterdir()) == {path, tmp_path / "reader"}
    getattr(_training(), name)(path)
    assert path.read_bytes() != b"old"
    assert (tmp_path / "reader").read_text() == "old"
    assert set(tmp_path.iterdir()) == {path, tmp_path / "reader"}


def test_picture_needs_no_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    _training().plot(tmp_path / "miub.png")
    assert (tmp_path / "miub.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_picture_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "scalora\[plot\]"'):
        _training().plot(tmp_path / "miub.png")
    assert not list(tmp_path.iterdir())


def test_heat_map_is_blocks_against_kinds() -> None:
    report = _report(
        _record("lm_head", value=7.0),
        *(
            _record(f"model.layers.{i}.{kind}", value=i + 0.5 * j)
            for i in (10, 2, 11, 1)
            for j, kind in enumerate(("q_proj", "v_proj"))
        ),
    )
    cells = heat_map(list(report), report.places)
    assert cells.blocks == ["1", "2", "10", "11", "other"]
    assert cells.kinds == ["lm_head", "q_proj", "v_proj"]
    blocks = [[math.nan, i, i + 0.5] for i in (1.0, 2.0, 10.0, 11.0)]
    assert repr(cells.cells) == repr([*blocks, [7.0, math.nan, math.nan]])


def test_heat_map_tells_stacks_apart_and_averages_experts() -> None:
    report = _report(
        _record("encoder.block.0.layer.0.q", value=1.0),
        _record("decoder.block.0.layer.0.q", value=2.0),
        _record("decoder.block.0.layer.1.q", value=4.0),
    )
    cells = heat_map(list(report), report.places)
    assert (cells.blocks, cells.kinds) == (["encoder 0", "decoder 0"], ["q"])
    assert cells.cells == [[1.0], [3.0]]


def test_heat_map_of_layers_without_numbers_names_them() -> None:
    report = _report(_record("first", value=1.0), _record("second", value=2.0))
    cells = heat_map(list(report), report.places)
    assert (cells.blocks, cells.cells) == (["first", "second"], [[1.0], [2.0]])


def test_lines_are_drawn_only_over_several_steps() -> None:
    heat, _, lines = sorted(figure(_training()).axes, key=lambda axes: len(axes.lines))
    assert {line.get_label(): line.get_xydata().tolist() for line in lines.lines} == {
        "q_proj": [[10, 11], [20, 21], [30, 31]],
        "down_proj": [[10, 15], [20, 25], [30, 35]],
    }
    assert not heat.lines
    assert len(figure(_training().averaged()).axes) == 2


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -0.1])
def test_picture_of_odd_values(tmp_path: Path, value: float) -> None:
    report = _report(_record(value=value), _record(step=2, value=value))
    report.plot(tmp_path / "miub.svg")
    assert b"<svg" in (tmp_path / "miub.svg").read_bytes()
