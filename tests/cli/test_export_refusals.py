"""What ``scalora export`` refuses: in one line, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from exported_runs import STATE, Runs, export, llama
from safetensors.torch import load_file, save_file

from scalora.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a kind -> its `Run`; each is trained once, when it is first asked for."""
    return Runs(tmp_path_factory.mktemp("runs"))


def _flip_a_bit(folder: Path) -> None:
    whole = bytearray((folder / STATE).read_bytes())
    whole[-8] ^= 1
    (folder / STATE).write_bytes(whole)


def _swap_the_adapter(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def _drop_a_factor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, path, metadata={"format": "pt"})


def _change_the_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))


FAULTS: dict[str, tuple[str, Any, list[str], str]] = {
    "no such folder": ("dense", shutil.rmtree, [], "nothing to export"),
    "adapter alone": ("dense", lambda f: (f / STATE).unlink(), [], STATE),
    "no adapter": ("carry", lambda f: (f / "adapter_config.json").unlink(), [], "no adapter"),
    "no weights of the adapter": (
        "carry",
        lambda f: (f / "adapter_model.safetensors").unlink(),
        [],
        "adapter.*could not be loaded",
    ),
    "config that is not JSON": (
        "carry",
        lambda f: (f / "adapter_config.json").write_text("{"),
        [],
        "adapter.*could not be loaded",
    ),
    "cut short": ("dense", lambda f: (f / STATE).write_bytes(b"x" * 99), [], "cannot be read"),
    "one bit flipped": ("dense", _flip_a_bit, [], "damaged"),
    "one bit of a carry flipped": ("carry", _flip_a_bit, [], "damaged"),
    "another adapter": ("carry", _swap_the_adapter, [], "adapter is not the one"),
    "a factor missing": ("carry", _drop_a_factor, [], "missing adapter keys"),
    "another rank": ("carry", _change_the_rank, [], "could not be loaded.*size mismatch"),
    "rank 0": ("carry", None, ["--rank", "0"], "at least 1"),
    "rank that is no number": ("carry", None, ["--rank", "x"], "invalid int"),
    "rank of a merged model": ("carry", None, ["--rank", "2", "--merged"], "--rank"),
    "dtype of an adapter": ("carry", None, ["--dtype", "bfloat16"], "--merged"),
    "unknown dtype": ("carry", None, ["--merged", "--dtype", "int8"], "invalid choice"),
    "full precision without merging": ("NF4", None, ["--full-precision-base", "x"], "--merged"),
    "no such base": ("dense", None, ["--base", "/nowhere"], "base /nowhere could not be loaded"),
    "no such base to merge": (
        "NF4",
        None,
        ["--merged", "--full-precision-base", "/nowhere"],
        "/nowhere could not be loaded",
    ),
    "unknown option": ("carry", None, ["--best"], "unrecognized"),
}


@pytest.mark.parametrize("name, change, options, message", FAULTS.values(), ids=FAULTS.keys())
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    name: str,
    change: Any,
    options: list[str],
    message: str,
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(runs[name].checkpoint, tmp_path / "checkpoint")
    if change is not None:
        change(tmp_path / "checkpoint")
    before = sorted(tmp_path.rglob("*"))
    _assert_refused([tmp_path / "checkpoint", tmp_path / "new" / "out", *options], message, capsys)
    assert sorted(tmp_path.rglob("*")) == before


def _assert_refused(arguments: list[Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    try:
        status: Any = main(["export", *map(str, arguments)])
    except SystemExit as stopped:  # of argparse
        status = stopped.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("scalora") and err.count("\n") == 1 and err.endswith("\n")
    assert re.search(message, err), err


@pytest.mark.parametrize("base", ["bert", "narrow"])
@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_base_of_another_model_is_refused(
    base: str,
    options: list[str],
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = runs.folder / "bert"
    if base == "narrow":
        folder = tmp_path / "narrow"
        llama(intermediate_size=48).save_pretrained(folder)
    arguments = [runs["dense"].checkpoint, tmp_path / "out", "--base", folder, *options]
    _assert_refused(arguments, "base|no weight|has a weight", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_folder_with_something_in_it_is_left_alone(
    options: list[str], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    _assert_refused([runs["carry"].checkpoint, tmp_path / "out", *options], "empty folder", capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_empty_folder_is_filled(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(runs["carry"].checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_write_that_fails_leaves_nothing(
    options: list[str],
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = runs["carry"].checkpoint

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(
        "scalora.saving.export.shutil.copyfile", fail
    )  # the last thing that is written
    _assert_refused([checkpoint, tmp_path / "out", *options], "disk full", capsys)
    assert not list(tmp_path.iterdir())
