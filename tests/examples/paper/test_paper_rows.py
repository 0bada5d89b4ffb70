"""Rows of the paper's tables, and the results that are collected for them."""

import statistics

import pytest
from paper_inputs import ROWS, row


def test_every_row_is_valid_and_its_scores_have_the_average_that_it_reports(example):
    load = example("paper_configuration").load
    found = {path.stem: load(path) for path in sorted(ROWS.glob("*.json"))}

    assert len(found) == 11
    assert len({(r.benchmark, r.row) for r in found.values()}) == 11
    for name in ("lora", "scalora", "full"):
        reported = dict(found[f"glue-{name}"].reported)
        average = reported.pop("average")
        assert len(reported) == 8
        assert statistics.fmean(reported.values()) == pytest.approx(average, abs=0.0051)
        assert found[f"glue-{name}"].rank == (None if name == "full" else 4)
    assert found["llama3-lora-r32"].rank == 32
    assert found["llama3-scalora-interval10"].rebasing["interval"] == 10
    ranks = {r.rank for name, r in found.items() if "llama" in name and "r32" not in name}
    assert ranks == {8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interval": 0}, "interval"),
        ({"rule": "best"}, "rule"),
        ({"method": "dora"}, "'dora' is not one of lora, scalora, full"),
        ({"method": "lora"}, "'lora' does not re-base: no interval, rule"),
        ({"rank": None}, "needs rank"),
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [-1.0]}, "-1.0 is not a positive"),
        ({"seeds": []}, "seeds"),
        ({"batch": 2.5}, "batch"),
        ({"micro_batch": 5}, "no multiple of micro_batch"),
        ({"base": "int3"}, "'int3' is not one of"),
        ({"ranks": 4}, "'ranks' is not a setting; did you mean 'rank'"),
    ],
)
def test_a_wrong_row_is_refused_by_name(example, tmp_path, capsys, changes, message):
    path = row(tmp_path / "wrong.json", "glue-scalora", **changes)
    with pytest.raises(SystemExit, match="2"):
        example("glue").main([path, "--data", str(tmp_path)])
    printed = " ".join(capsys.readouterr().err.split())
    assert "wrong.json" in printed
    assert message in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "the sections paper, reflora, ours"),
        ('{"ours": {"rank": 4}, "paper": {"rank": 4}}', "'rank' is in two sections"),
        ('{"ours": {"rank": 4}}', "missing: row, benchmark, model"),
    ],
)
def test_a_file_that_is_no_row_is_refused(example, tmp_path, text, message):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        example("paper_configuration").load(path)


def test_rows_of_another_benchmark_and_missing_files_are_refused(example, tmp_path, capsys):
    for path, message in ((ROWS / "llama3-lora.json", "not of glue"), (tmp_path / "no", "No such")):
        with pytest.raises(SystemExit, match="2"):
            example("glue").main([str(path), "--data", str(tmp_path)])
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_holds_no_results_is_not_overwritten(example, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"notes\.json: not a file of results"):
        example("paper_results").Results(path)
    assert path.read_text() == "[1, 2]"


def test_one_learning_rate_is_chosen_for_what_was_trained_together(example):
    best = example("paper_results").best

    def run(task, rate, **scores):
        return {"settings": {"task": task, "learning_rate": rate}, "scores": scores}

    together = [run("mixture", 0.1, a=90.0, b=10.0), run("mixture", 0.2, a=60.0, b=60.0)]
    assert best(together) == {"a": (0.2, [60.0]), "b": (0.2, [60.0])}
    apart = [run("a", 0.1, a=90.0), run("a", 0.2, a=60.0), run("a", 0.1, a=70.0)]
    assert best([*apart, run("b", 0.2, b=5.0)]) == {"a": (0.1, [90.0, 70.0]), "b": (0.2, [5.0])}


def test_the_average_is_of_all_tasks_or_not_given(example):
    average = example("paper_results").average
    found = {"a": (0.1, [90.0, 70.0]), "b": (0.2, [5.0])}
    assert average(found, ["a", "b"]) == ("42.50", "", "1", "")
    assert not any(average(found, ["a", "b", "c"]))


def test_missing_data_end_the_scripts_with_a_message(example, tmp_path):
    for script, name, missing in (
        ("glue", "glue-lora", "CoLA/train.tsv"),
        ("commonsense", "llama3-lora", "boolq/train.jsonl"),
    ):
        command = [str(ROWS / f"{name}.json"), "--data", str(tmp_path)]
        with pytest.raises(SystemExit, match=f"{missing} is not in --data"):
            example(script).main([*command, "--output", str(tmp_path / "results.json")])
