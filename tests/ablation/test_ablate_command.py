"""``scalora ablate`` as a user calls it."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ablation_stand_ins import FILE, Tiny

from scalora.ablation import command
from scalora.cli import main
from scalora.plotting import figures

VOLATILE = {"seconds_a_step", "peak_bytes", "wall_seconds", "threads"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALORA_CACHE", str(tmp_path / "cache"))


@contextmanager
def without_rendering() -> Iterator[None]:
    """Make every picture but write its format's name alone: rendering takes a report's time."""
    with mock.patch.object(figures, "encoded", lambda figure, kind: kind.encode()):
        yield


@pytest.fixture
def _unrendered() -> Iterator[None]:
    with without_rendering():
        yield


unrendered = pytest.mark.usefixtures("_unrendered")


def ablate(task: str, output: Path, *arguments: str, engine: str = "inline") -> int:
    common = ["--output", str(output), "--engine", engine, "--device", "cpu"]
    return main(["ablate", "--task", f"{FILE}:{task}", *common, *arguments])


def records_in(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text("utf-8")) for path in sorted(output.glob("runs/*.json"))]


def lasting(output: Path) -> list[dict[str, Any]]:
    """The records without what is not the same twice."""
    kept = [{k: v for k, v in record.items() if k not in VOLATILE} for record in records_in(output)]
    for record in kept:
        record["job"].pop("options")
    return sorted(kept, key=lambda record: json.dumps(record["job"], sort_keys=True))


def results_in(output: Path) -> dict[str, Any]:
    (task,) = json.loads((output / "results.json").read_text("utf-8"))["tasks"]
    return {row["method"]: row for row in task["methods"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    options = ["--methods", "lora,scalora,full-adapted", "--seeds", "2"]
    assert ablate("Tiny", output, *options, "--cache", str(output / "cache")) == 0
    return output


def test_output_has_a_record_a_run_tables_json_and_pictures(finished: Path) -> None:
    assert len(records_in(finished)) == 3 * 2 * 2
    results = results_in(finished)
    assert list(results) == ["lora", "scalora", "full-adapted"]
    for row in results.values():
        assert row["test"]["loss"]["n"] == row["test"]["accuracy"]["n"] == 2
        assert len(row["by_rate"]) == 2 and row["best"] in [
            r["learning_rate"] for r in row["by_rate"]
        ]
        assert row["forgetting"]["mean"] > 0 and row["robustness"] > 0
    assert results["scalora"]["difference"]["n"] == 2 and results["lora"]["difference"] is None
    text = (finished / "results.md").read_text("utf-8")
    for expected in ("test loss", "test accuracy", "forgetting", "MIUB by layer", "ms per step"):
        assert expected in text
    pictures = {"learning-curves", "learning-rates", "learning-and-forgetting", "spectra"}
    pictures |= {"trainable-parameters", "training-state"}
    assert {path.stem for path in finished.glob("tiny/*.png")} == pictures
    assert {path.stem for path in finished.glob("tiny/*.svg")} == pictures
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in finished.glob("tiny/*.png"))


@unrendered
def test_what_is_done_is_not_run_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("runs/*")}
    # Other methods in another order, and a seed more: only what is new is run.
    options = ["--methods", "dora,scalora,lora", "--seeds", "2", "--learning-rates", "1e-2"]
    assert ablate("Tiny", finished, *options) == 0
    printed = capsys.readouterr().out
    assert "4 runs were done before" in printed and printed.count(" dora lr=") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(results_in(finished)) == ["dora", "scalora", "lora"]


@unrendered
def test_short_takes_fewer_steps_and_every_other_learning_rate(tmp_path: Path) -> None:
    assert ablate("Tiny", tmp_path, "--methods", "lora", "--seeds", "1", "--short") == 0
    jobs = [record["job"] for record in records_in(tmp_path)]
    assert sorted(job["learning_rate"] for job in jobs) == sorted(Tiny.learning_rates)[::2]
    assert {job["steps"] for job in jobs} == {Tiny.short_steps}


def test_report_only_makes_everything_again_and_runs_nothing(tmp_path: Path) -> None:
    assert ablate("Tiny", tmp_path, "--methods", "lora,full", "--seeds", "1") == 0
    kinds = (".png", ".svg", ".md", ".html")
    made = [path for path in tmp_path.rglob("*") if path.suffix in kinds]
    made.append(tmp_path / "results.json")
    contents = {path: path.read_bytes() for path in made}
    assert len(made) == 2 * 6 + 3
    for path in made:
        path.unlink()
    gone = next(tmp_path.glob("runs/*full*lr0.001*"))
    kept = gone.read_bytes()
    gone.unlink()
    with without_rendering():
        assert main(["ablate", "--report-only", "--output", str(tmp_path)]) == 0
    assert not gone.exists() and results_in(tmp_path)["full"]["missing"] == 1
    assert "not run" in (tmp_path / "results.md").read_text("utf-8")
    gone.write_bytes(kept)
    assert main(["ablate", "--report-only", "--output", str(tmp_path)]) == 0
    assert {path: path.read_bytes() for path in made} == contents


@unrendered
def test_report_of_the_methods_that_are_asked_for_is_of_any_commands_runs(tmp_path: Path) -> None:
    assert ablate("Tiny", tmp_path, "--methods", "lora", "--seeds", "1") == 0
    assert ablate("Tiny", tmp_path, "--methods", "full", "--seeds", "1") == 0
    plan = (tmp_path / "plan.json").read_bytes()
    assert list(results_in(tmp_path)) == ["full"]
    both = ["--report-only", "--methods", "lora,full", "--seeds", "1"]
    assert ablate("Tiny", tmp_path, *both) == 0
    assert [row["missing"] for row in results_in(tmp_path).values()] == [0, 0]
    assert (tmp_path / "plan.json").read_bytes() == plan
    assert len(records_in(tmp_path)) == 4


@unrendered
def test_learning_rate_is_chosen_on_validation_alone(tmp_path: Path) -> None:
    assert ablate("Contrary", tmp_path, "--methods", "lora", "--seeds", "1", "--steps", "12") == 0
    by_rate = {
        record["job"]["learning_rate"]: (record["validation"]["loss"], record["test"]["loss"])
        for record in records_in(tmp_path)
    }
    best = min(by_rate, key=lambda rate: by_rate[rate][0])
    assert best != min(by_rate, key=lambda rate: by_rate[rate][1])
    row = results_in(tmp_path)["lora"]
    assert row["best"] == best and row["test"]["loss"]["mean"] == by_rate[best][1]


@unrendered
def test_learning_rate_is_chosen_by_the_tasks_own_metric(tmp_path: Path) -> None:
    options = ["--methods", "lora,scalora", "--seeds", "2", "--search-seeds", "1"]
    assert ablate("ByAccuracy", tmp_path, *options) == 0
    assert len(records_in(tmp_path)) == 2 * (2 + 1)
    for method, row in results_in(tmp_path).items():
        found = {
            record["job"]["learning_rate"]: record["validation"]["accuracy"]
            for record in records_in(tmp_path)
            if record["job"]["method"] == method and record["job"]["seed"] == 0
        }
        assert row["best"] == max(found, key=lambda rate: found[rate])
        assert row["test"]["accuracy"]["n"] == 2


def test_divergent_runs_are_shown_and_are_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--methods", "lora,scalora", "--learning-rates", "1e-2,1e30", "--seeds", "1"]
    assert ablate("Tiny", tmp_path, *options) == 0
    printed = capsys.readouterr().out
    assert "diverged by step" in printed and "│ diverged │" in printed.replace("  ", "")
    row = results_in(tmp_path)["lora"]
    assert row["best"] == 1e-2 and row["by_rate"][1]["validation_loss"]["diverged"] == 1
    assert row["robustness"] is None  # not finite
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*")}
    assert ablate("Tiny", tmp_path, *options) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@unrendered
def test_failed_runs_are_told_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "gone"
    data.touch()
    options = ["--data", str(data), "--methods", "lora", "--seeds", "2", "--learning-rates", "1e-2"]
    output = tmp_path / "out"
    assert ablate("Broken", output, *options) == 1
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: the data are gone" in printed
    assert "of 2 runs 1 failed" in printed
    assert "RuntimeError: the data are gone" in (output / "results.md").read_text("utf-8")
    assert results_in(output)["lora"]["test"]["loss"]["n"] == 1
    assert main(["ablate", "--report-only", "--output", str(output)]) == 1
    data.unlink()
    assert ablate("Broken", output, *options) == 0
    assert [record["status"] for record in records_in(output)] == ["ok", "ok"]
    assert results_in(output)["lora"]["test"]["loss"]["n"] == 2


@unrendered
def test_task_that_cannot_be_prepared_is_tried_once(tmp_path: Path) -> None:
    assert ablate("Unprepared", tmp_path, "--methods", "lora,dora", "--seeds", "2") == 1
    assert (tmp_path / "cache" / "tries").read_text() == "once\n"
    assert len(records_in(tmp_path)) == 8
    assert all(record["error"].startswith("OSError: no disk") for record in records_in(tmp_path))


@unrendered
def test_process_that_dies_is_a_failed_run_and_others_give_the_same_numbers(
    tmp_path: Path,
) -> None:
    options = ["--methods", "lora", "--learning-rates", "1e-2", "--seeds", "2"]
    assert ablate("Fatal", tmp_path / "pool", *options, engine="local") == 1
    by_status = {
        status: [r["job"]["seed"] for r in records_in(tmp_path / "pool") if r["status"] == status]
        for status in ("ok", "failed")
    }
    assert by_status == {"ok": [1], "failed": [0]}
    assert "process died" in (tmp_path / "pool" / "results.md").read_text("utf-8")
    # In this process, after runs of another method.
    options[1] = "scalora,lora"
    assert ablate("Tiny", tmp_path / "here", *options) == 0

    def of_seed_one(output: Path) -> list[dict[str, Any]]:
        records = [
            record
            for record in lasting(output)
            if record["job"]["seed"] == 1 and record["job"]["method"] == "lora"
        ]
        for record in records:
            del record["job"]["task"]
        return records

    assert of_seed_one(tmp_path / "pool") == of_seed_one(tmp_path / "here")


@pytest.mark.slow
def test_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    output, data = tmp_path / "out", tmp_path / "data"
    data.mkdir()
    options = ["--data", str(data), "--methods", "lora,scalora", "--seeds", "2"]
    options += ["--learning-rates", "1e-2", "--output", str(output), "--device", "cpu"]
    command = [sys.executable, "-m", "scalora", "ablate", "--task", f"{FILE}:Slow", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: len(list(output.glob("runs/*.json"))) == 2 or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in output.glob("runs/*.json")}
    assert {json.loads(path.read_text())["job"]["seed"] for path in done} == {0}
    # What it had started does not train on beside the next command.
    (worker,) = [int(path.name) for path in data.iterdir()]
    wait_for(lambda: not is_alive(worker))
    (data / "fast").touch()
    assert ablate("Slow", output, *options) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert [record["status"] for record in records_in(output)] == ["ok"] * 4


def wait_for(condition: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    if Path("/proc/self").exists():
        # One that nobody waits for stays as a zombie.
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@unrendered
def test_several_tasks_have_a_section_and_a_folder_each(tmp_path: Path) -> None:
    tasks = f"{FILE}:Tiny,{FILE}:Contrary"
    options = ["--methods", "lora", "--smoke", "--engine", "inline", "--output", str(tmp_path)]
    assert main(["ablate", "--task", tasks, *options]) == 0
    assert {record["job"]["steps"] for record in records_in(tmp_path)} == {4}
    assert len(records_in(tmp_path)) == 4
    text = (tmp_path / "results.md").read_text("utf-8")
    assert "## tiny" in text and "## contrary" in text
    assert (tmp_path / "contrary" / "learning-curves.png").is_file()


@unrendered
def test_edited_task_is_another_task(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(Path(FILE).read_text("utf-8"), "utf-8")
    arguments = ["ablate", "--task", f"{file}:Tiny", "--methods", "lora", "--smoke"]
    arguments += ["--engine", "inline", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    file.write_text(file.read_text("utf-8") + "\n# edited\n", "utf-8")
    assert main(arguments) == 0
    assert len(records_in(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--task", "nonsense"], "nonsense"),
        (["--task", f"{FILE}:Nothing"], "Nothing"),
        (["--task", f"{FILE}:Tiny", "--data", "x"], "data"),
        (["--methods", "lora,nonsense"], "no method 'nonsense'"),
        (["--methods", "scalora:interval=soon"], "interval"),
        (["--suite", "nonsense"], "no suite 'nonsense'"),
        (["--learning-rates", "1e-3,fast"], "not a list of numbers"),
        (["--learning-rates", "0"], "have to be positive"),
        (["--seeds", "0"], "'0' is not a positive whole number"),
        (["--steps", "-1"], "'-1' is not a positive whole number"),
        (["--methods", ","], "names nothing"),
        (["--slurm", "timeout_min=1"], "--slurm goes with --engine slurm"),
        (["--slurm", "timeout"], "not key=value"),
        (["--report-only"], "plan.json cannot be read"),
        (["--task", f"{FILE}:Tiny,{FILE}:Tiny2"], "Tiny2"),
    ],
)
def test_bad_input_is_said_in_one_line(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "out")]
    try:
        status: Any = main(["ablate", *output, *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_engine_slurm_without_a_cluster_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert ablate("Tiny", tmp_path, "--methods", "lora", engine="slurm") == 2
    assert "pip install scalora[cluster]" in capsys.readouterr().err


@unrendered
def test_log_has_a_line_a_run_with_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("Tiny", tmp_path, "--methods", "lora", "--smoke") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert re.fullmatch(
        r"\[1/2\] Tiny lora lr=0\.001 seed=0: validation loss [\d.]+, accuracy [\d.]+, "
        r"[\d.]+ s, [\d.]+ s left",
        lines[0],
    )
    assert lines[1].startswith("[2/2]") and "left" not in lines[1]


def test_help_imports_the_standard_library_alone() -> None:
    room = Path(command.__file__).parent
    for file in ("__init__.py", "command.py", "defaults.py"):
        tree = ast.parse((room / file).read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported = {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                continue
            for name in imported:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or name == "scalora.ablation.defaults"
