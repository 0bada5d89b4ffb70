"""DeepSpeed's engine: stage 0 trains as DDP does, ZeRO is refused before anything is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_processes
from sharded_runs import Run, plain_run

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from deepspeed_runs import (
    accelerated_run,
    engine_run,
    refused_runs,
    replaced_run,
    resumed_engine_run,
    trained_by_trainer,
)

pytestmark = pytest.mark.distributed

RUNS = {
    "auto": Run(dtype=torch.float32),
    "auto, carry": Run(dtype=torch.float32, options={"accumulator": "carry"}),
    "exact": Run(dtype=torch.float32, options={"rule": "exact"}),
}


def test_two_processes_at_stage_0_train_as_one(tmp_path: Path) -> None:
    first, second = run_processes(engine_run, tmp_path, 2, RUNS)
    for name, run in RUNS.items():
        expected = plain_run(run)
        assert first[name]["rebased"] == expected["rebased"] > 0
        assert first[name]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert first[name]["checksums"] == second[name]["checksums"]


def test_accelerate_at_stage_0_trains_as_one_process(tmp_path: Path) -> None:
    run = RUNS["auto"]
    halves = run_processes(accelerated_run, tmp_path, 2, run)
    losses = [(first + second) / 2 for first, second in zip(*halves, strict=True)]
    assert losses == pytest.approx(plain_run(run)["losses"], rel=1e-4)


def test_checkpoint_of_the_engine_resumes_at_stage_0(tmp_path: Path) -> None:
    for went_on, resumed in run_processes(
        resumed_engine_run, tmp_path, 2, RUNS["auto, carry"], tmp_path
    ):
        assert resumed == went_on


def test_zero_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    for said in run_processes(refused_runs, tmp_path, 2):
        assert "in half precision: use FSDP2" in said.pop("stage 0, bfloat16")
        assert "accelerate gives it to DeepSpeed's ZeRO" in said["accelerate"]
        for case, text in said.items():
            assert "DeepSpeed's ZeRO" in text, (case, text)
            assert "fully_shard (accelerate: fsdp_version=2)" in text, (case, text)


def test_optimizer_that_accelerate_would_replace_is_refused(tmp_path: Path) -> None:
    for said in run_processes(replaced_run, tmp_path, 2):
        assert "accelerate gives it to DeepSpeed's ZeRO" in said


def test_callback_refuses_a_trainer_under_deepspeed(tmp_path: Path) -> None:
    for said in run_processes(trained_by_trainer, tmp_path, 2, tmp_path):
        for case, text in said.items():
            assert "use FSDP2 (fsdp_version=2) or DDP instead" in text, (case, text)
