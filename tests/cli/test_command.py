"""``scalora`` itself: what it says of itself, at once, and its exit status."""

from __future__ import annotations

import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import miub
import scalora
from scalora.cli import main

# A command line that is answered without one of these libraries takes no time.
ANSWERED = """
import runpy, sys
try:
    runpy.run_module("scalora", run_name="__main__")
except SystemExit as stopped:
    assert stopped.code == 0
heavy = {"torch", "transformers", "peft", "accelerate", "numpy"} & sys.modules.keys()
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--help"], "commands:"),
        (["--version"], scalora.__version__),
        (["export", "--help"], "--full-precision-base"),
        (["ablate", "--help"], "--learning-rates"),
    ],
    ids=["help", "version", "help of export", "help of ablate"],
)
def test_first_questions_are_answered_at_once_and_without_other_libraries(
    arguments: list[str], said: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", ANSWERED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == ""
    assert said in done.stdout
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1  # seconds


def test_commands_are_listed_where_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "export" in out and "ablate" in out


def test_export_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for option in ("--base", "--rank", "--merged", "--full-precision-base", "--dtype"):
        assert option in out


def test_module_exits_with_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scalora", "export", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("scalora", run_name="__main__")
    assert stopped.value.code == 2


def test_public_names_are_there_before_they_are_imported() -> None:
    assert set(scalora.__all__) <= set(dir(scalora))
    for name in scalora.__all__:
        assert getattr(scalora, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        scalora.nothing  # noqa: B018
    for package in (scalora, miub):
        assert not hasattr(package, "nothing.there")


ROOMS = """
import sys
import miub, scalora
assert scalora.warning.warn is sys.modules["scalora.warning"].warn
assert miub.report.rows and not hasattr(miub, "mask") and not hasattr(scalora, "warnings")
assert not hasattr(scalora, "__main__")  # which would run the command
"""


def test_rooms_are_attributes_of_a_package_that_imported_none_of_them() -> None:
    subprocess.run([sys.executable, "-c", ROOMS], check=True, timeout=120)
