"""A transformers Trainer under FSDP2: the callback completes its checkpoints, and resumes."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerated_runs import (
    best_run,
    exported_run,
    logged,
    make_accelerator,
    make_trainer,
    trainer_run,
)
from processes import run_processes
from sharded_runs import Run, begin

from scalora import sharding
from scalora.integrations import trainer as transformers_callback
from scalora.saving.sharded_checkpoint import load_sharded, save_sharded

SHARDED = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False}
FULL = {**SHARDED, "state_dict_type": "FULL_STATE_DICT"}

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("options", "plugin"),
    [({}, SHARDED), ({"accumulator": "carry"}, FULL)],
    ids=["dense", "carry, the Trainer's own in one file"],
)
def test_trainer_resumes_in_any_number_of_processes_and_exports(
    tmp_path: Path, options: dict[str, Any], plugin: dict[str, Any]
) -> None:
    whole, other = run_processes(trainer_run, tmp_path, 2, tmp_path, options, plugin, False)
    assert whole == other
    plain = make_trainer(tmp_path / "plain", options, save_strategy="no")
    plain.train()
    assert whole["losses"] == pytest.approx(logged(plain), rel=1e-5)
    [exported] = run_processes(exported_run, tmp_path, 1, tmp_path, options)
    assert exported == pytest.approx(whole["at the end"], rel=1e-5)
    resumed = run_processes(trainer_run, tmp_path, 2, tmp_path, options, plugin, True)[0]
    assert resumed["losses"] == whole["losses"]
    if plugin is SHARDED:
        alone = run_processes(trainer_run, tmp_path, 1, tmp_path, options, plugin, True)[0]
        assert alone["losses"] == pytest.approx(whole["losses"], rel=1e-5)


def test_best_model_comes_back_with_its_base(tmp_path: Path) -> None:
    found = run_processes(best_run, tmp_path, 2, tmp_path, SHARDED)[0]
    assert found["evaluated"][0] > found["evaluated"][-1]
    assert found["at the end"] == pytest.approx(found["evaluated"][0], rel=1e-6)


def test_checkpoint_without_what_the_callback_wrote_is_refused(tmp_path: Path) -> None:
    run_processes(trainer_run, tmp_path, 1, tmp_path, {}, SHARDED, False)
    shutil.rmtree(tmp_path / "checkpoint-10" / "scalora_sharded")
    [found] = run_processes(trainer_run, tmp_path, 1, tmp_path, {}, SHARDED, True)
    assert "is incomplete" in found["error"]


def damaged(folder: Path, how: str) -> None:
    """A checkpoint of which one file is not what was written."""
    [file] = folder.glob("scalora_sharded/__0_0.distcp")
    content = bytearray(file.read_bytes())
    if how == "a bit":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[: -100 if how == "truncated" else None])
    if how == "a file":
        file.unlink()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    run_processes(trainer_run, folder, 2, folder, {}, SHARDED, False)
    return folder


@pytest.mark.parametrize("how", ["a bit", "truncated", "a file"])
def test_damaged_checkpoint_is_refused_by_all_processes(
    tmp_path: Path, trained: Path, how: str
) -> None:
    shutil.copytree(trained / "checkpoint-10", tmp_path / "checkpoint-10")
    damaged(tmp_path / "checkpoint-10", how)
    for found in run_processes(trainer_run, tmp_path, 2, tmp_path, {}, SHARDED, True):
        assert "is damaged: ['__0_0.distcp']" in found["error"]


def other_rank_run(rank: int, folder: Path) -> dict[str, Any]:
    model, optimizer = begin(Run(rank=2), sharded=True)
    before = [sharding.local(p).detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"belongs to another model.*Nothing was loaded") as error:
        load_sharded(optimizer, folder)
    now = [sharding.local(p) for p in model.parameters()]
    return {"error": str(error.value), "same": all(map(torch.equal, before, now))}


def rewritten_run(rank: int, folder: Path) -> str:
    """What loading says of a checkpoint that one process failed to write a second time."""
    _, optimizer = begin(Run(), sharded=True)
    save_sharded(optimizer, folder)
    load_sharded(optimizer, folder)
    failing = mock.patch.object(dcp, "save", side_effect=OSError("no space is left"))
    with failing, pytest.raises(OSError, match="no space"):
        save_sharded(optimizer, folder)
    with pytest.raises(ValueError) as error:
        load_sharded(optimizer, folder)
    save_sharded(optimizer, folder)
    return str(error.value)


def test_checkpoint_of_another_rank_or_half_rewritten_is_refused(tmp_path: Path) -> None:
    for said in run_processes(rewritten_run, tmp_path, 2, tmp_path):
        assert "is incomplete" in said
    for found in run_processes(other_rank_run, tmp_path, 2, tmp_path):
        assert found["same"]
        assert "lora_A" in found["error"] or "lora_B" in found["error"]


def failing_run(rank: int, folder: Path) -> list[str]:
    """Warnings of a Trainer that keeps one checkpoint, re-based by then, and fails at the next."""
    make_accelerator(**FULL)
    trainer = make_trainer(
        folder,
        {},
        accelerator_config={"use_configured_state": True},
        save_strategy="steps",
        save_steps=5,
        save_total_limit=1,
    )
    real, calls = transformers_callback.save_sharded, []

    def save(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError("no space is left")
        real(*args)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failing = mock.patch.object(transformers_callback, "save_sharded", save)
        with failing, pytest.raises(OSError, match="no space"):
            trainer.train()
    return [str(w.message) for w in caught if "ScaLoRA" in str(w.message)]


def test_checkpoint_is_whole_before_an_older_one_is_deleted(tmp_path: Path) -> None:
    for said in run_processes(failing_run, tmp_path, 2, tmp_path):
        assert said == []  # its adapter is not saved alone
    assert (tmp_path / "checkpoint-10" / "scalora_sharded" / "sha256.json").exists()
    assert (tmp_path / "checkpoint-10" / "trainer_state.json").exists()


def test_rate_that_an_evaluation_changed_is_in_the_checkpoint(tmp_path: Path) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    plateau |= {"eval_steps": 5, "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.9}}
    whole, resumed = (
        run_processes(plateau_run, tmp_path, 2, tmp_path, plateau, resume)[0]
        for resume in (False, True)
    )
    assert resumed == whole


def plateau_run(rank: int, folder: Path, plateau: dict[str, Any], resume: bool) -> list[float]:
    """Losses of a run whose rate falls at step 10, between the evaluation and the checkpoint."""
    found = trainer_run(rank, folder, {}, SHARDED, resume, **plateau)
    assert max(found["rates"]) < 1e-3
    return found["losses"]


def evaluating_run(rank: int, folder: Path) -> None:
    """A Trainer that fails in its second evaluation."""
    make_accelerator(**SHARDED)
    often = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6}
    trainer = make_trainer(folder, {}, accelerator_config={"use_configured_state": True}, **often)
    evaluate, calls = trainer.evaluate, []

    def second_fails(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return evaluate(*args, **options)

    failing = mock.patch.object(trainer, "evaluate", second_fails)
    with failing, pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()


def test_evaluation_that_fails_leaves_no_checkpoint_behind(tmp_path: Path) -> None:
    run_processes(evaluating_run, tmp_path, 2, tmp_path)
    assert (tmp_path / "checkpoint-6" / "scalora_sharded" / "sha256.json").exists()
    assert not (tmp_path / "checkpoint-12").exists()


def test_checkpoint_of_another_rule_is_refused(tmp_path: Path) -> None:
    run_processes(trainer_run, tmp_path, 1, tmp_path, {}, SHARDED, False)
    [found] = run_processes(trainer_run, tmp_path, 1, tmp_path, {"rule": "exact"}, SHARDED, True)
    assert "rule='auto'" in found["error"]
