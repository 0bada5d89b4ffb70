"""FSDP2 through accelerate: its own preparing, saving and loading; and through its launcher."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerated_runs import STACKS, accelerated_run, script, script_run
from processes import run_processes
from sharded_runs import Run, plain_run

SHARDED = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False}
FULL = {**SHARDED, "state_dict_type": "FULL_STATE_DICT"}
CARRY = Run(options={"accumulator": "carry"})
RUNS = {
    "default": (Run(), SHARDED),
    "default, carry": (CARRY, SHARDED),
    "exact": (Run(options={"rule": "exact"}), SHARDED),
    "default, saved in one file": (Run(), FULL),
    "carry, saved in one file": (CARRY, FULL),
    "default, loaded by one process": (Run(), {**SHARDED, "cpu_ram_efficient_loading": True}),
}


@pytest.mark.distributed
def test_accelerate_shards_saves_and_resumes(tmp_path: Path) -> None:
    first, second = run_processes(accelerated_run, tmp_path, 2, RUNS, tmp_path)
    assert first == second
    for name, (run, _) in RUNS.items():
        losses, resumed = first[name]
        assert losses == pytest.approx(plain_run(run)["losses"], rel=1e-8), name
        assert resumed == losses[run.steps // 2 :], name


@pytest.mark.distributed
def test_script_in_two_processes_is_that_in_one(tmp_path: Path) -> None:
    (losses, resumed, rebased), other = run_processes(
        script_run, tmp_path, 2, tmp_path / "sharded", 40
    )
    assert (losses, resumed, rebased) == other
    assert resumed == losses[20:]
    module = script()
    one = module.main(40, str(tmp_path / "one"), module.make_accelerator(cpu=True))
    assert rebased == one.optimizer.rebase_count > 0
    assert losses == pytest.approx(one.losses, rel=1e-5)


def launched(*arguments: str) -> tuple[float, ...]:
    """First and last loss of the script under `accelerate launch`, and how resuming differed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    command += ["--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(STACKS / "accelerate_fsdp.py"), "--steps", "40"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pattern = r"loss (\S+) -> (\S+), re-based 2 times \(dense\), resumed losses differ by (\S+)"
    match = re.search(pattern, text)
    assert match, text
    return tuple(map(float, match.groups()))


@pytest.mark.slow
def test_launched_without_sharding_the_script_resumes() -> None:
    first, last, apart = launched("--cpu")
    assert last < 0.8 * first
    assert apart == 0


@pytest.mark.gpu
@pytest.mark.slow
def test_gpu_launched_with_the_plugin_trains_as_without() -> None:
    sharded, plain = launched("--use_fsdp", "--fsdp_version", "2"), launched()
    assert sharded[:2] == pytest.approx(plain[:2], rel=1e-2)
    assert sharded[2] < 1e-3


@pytest.fixture
def launcher_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set what `accelerate launch --use_fsdp --fsdp_version 2` does, for a new state alone."""
    _forget_accelerate()
    for name, value in {"USE_FSDP": "true", "MIXED_PRECISION": "no", "USE_CPU": "true"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("FSDP_VERSION", "2")
    yield
    _forget_accelerate()


def _forget_accelerate() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.usefixtures("launcher_environment")
def test_script_trains_nothing_where_accelerate_does_not_shard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerate_fsdp.py", "--steps", "40"])
    monkeypatch.syspath_prepend(str(STACKS))
    with pytest.raises(SystemExit, match="accelerate does not shard on this machine"):
        runpy.run_path(str(STACKS / "accelerate_fsdp.py"), run_name="__main__")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is sharded over")
def test_script_says_so_where_accelerate_does_not_shard() -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        launched("--use_fsdp", "--fsdp_version", "2")
    assert "accelerate does not shard on this machine" in error.value.stderr
