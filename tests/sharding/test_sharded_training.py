"""FSDP2: a model sharded over two processes trains as in one, and resumes in any number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_bits, bits
from processes import run_processes
from sharded_runs import (
    Run,
    assert_as_in_one_process,
    begin,
    resumed_run,
    saved_run,
    sharded_run,
    train,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import scalora
from scalora.fold import fold

RUNS = {
    "default": Run(),
    "default, a batch of NaN": Run(spoiled=9),
    "default, carry": Run(options={"accumulator": "carry", "carry_rank": 8}),
    "default, rank 1": Run(rank=1),
    "exact": Run(options={"rule": "exact"}),
    "exact, carry": Run(options={"rule": "exact", "accumulator": "carry", "carry_rank": 9}),
    "compensated, nothing to round": Run(options={"rounding": "compensated"}),
    "paper": Run(options={"rule": "paper"}),
    "scalar": Run(options={"rule": "scalar"}),
    "direction": Run(options={"rule": "direction"}),
    "expected": Run(options={"rule": "expected"}),
    "SGD": Run(optimizer=torch.optim.SGD, options={"rule": "exact"}),
    "Adagrad": Run(optimizer=torch.optim.Adagrad),
}
HALF = {
    "bfloat16": Run(dtype=torch.bfloat16),
    "bfloat16, exact": Run(dtype=torch.bfloat16, options={"rule": "exact"}),
}
REFUSED = {
    "compensated": (
        Run(dtype=torch.bfloat16, options={"rounding": "compensated"}),
        "rounding='stochastic'",
    ),
    "Adafactor": (Run(optimizer=torch.optim.Adafactor), "other than Adafactor"),
}
SAVED = {name: RUNS[name] for name in ("default", "exact", "expected", "default, carry")}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    runs = {**RUNS, **HALF, **{name: run for name, (run, _) in REFUSED.items()}}
    return run_processes(sharded_run, tmp_path_factory.mktemp("runs"), 2, runs)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(sharded: list[dict[str, Any]], name: str) -> None:
    assert_as_in_one_process(sharded[0][name], RUNS[name])


@pytest.mark.parametrize("name", [*RUNS, *HALF])
def test_processes_agree_to_the_bit(sharded: list[dict[str, Any]], name: str) -> None:
    first, second = (found[name] for found in sharded)
    assert first["checksums"] == second["checksums"]
    assert first["losses"] == pytest.approx(second["losses"], rel=0, abs=0, nan_ok=True)
    for layer, value in first["carries"].items():
        assert torch.equal(value, second["carries"][layer])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_refused_on_every_process(
    sharded: list[dict[str, Any]], name: str
) -> None:
    for found in sharded:
        assert isinstance(found[name], ValueError)
        assert REFUSED[name][1] in str(found[name])


@pytest.mark.parametrize(
    ("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.distributed)]
)
def test_a_run_resumes_in_another_number_of_processes(
    tmp_path: Path, before: int, after: int
) -> None:
    expected = run_processes(saved_run, tmp_path, before, SAVED, tmp_path)[0]
    found = run_processes(resumed_run, tmp_path, after, SAVED, tmp_path)[0]
    for name in SAVED:
        assert found[name] == pytest.approx(expected[name], rel=1e-8), name


@pytest.mark.distributed
def test_resuming_without_the_base_weights_is_refused(tmp_path: Path) -> None:
    runs = {"default": RUNS["default"]}
    run_processes(saved_run, tmp_path, 2, runs, tmp_path)
    for found in run_processes(resumed_run, tmp_path, 2, runs, tmp_path, False):
        assert "base weight" in str(found["default"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_rounded_as_they_are_in_the_whole(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 5).to(dtype)
    left, right = 1e-3 * torch.randn(1, 9, 2), torch.randn(1, 5, 2)
    parts = [weight[:4].clone(), weight[4:].clone()]
    fold([weight], left, right, seeds=[7])
    for part, rows in zip(parts, (slice(0, 4), slice(4, 9)), strict=True):
        fold([part], left[:, rows], right, seeds=[7], first_row=rows.start)
    assert torch.equal(torch.cat(parts), weight)


def test_factors_that_were_replaced_in_the_optimizer_are_refused() -> None:
    """DeepSpeed's ZeRO-1 and ZeRO-2 put one flat partition in place of a group's parameters."""
    model, optimizer = begin(Run(), sharded=False)
    before = bits(model)
    group = optimizer.param_groups[0]
    flat = torch.cat([p.detach().flatten() for p in group["params"]])
    group["params"] = [torch.nn.Parameter(flat)]
    with pytest.raises(ValueError, match=r"DeepSpeed replaces them under ZeRO.*FSDP2"):
        train(Run(), model, optimizer, range(1))
    assert_same_bits(model, before)


def refused_runs(rank: int) -> dict[str, str]:
    """What is said to FSDP1, to saving in one file, and to parameters sharded too late."""
    said = {}
    model, _ = begin(Run(), sharded=False)
    hidden = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError) as error:
        scalora.ScaLoRA(torch.optim.AdamW(hidden.parameters()), hidden)
    said["FSDP1"] = str(error.value)
    model, optimizer = begin(Run(), sharded=True)
    train(Run(), model, optimizer, range(8), rank, 2)
    for name, save in {
        "save_adapter": lambda: scalora.save_adapter(model, "nowhere"),
        "save_training_state": lambda: scalora.save_training_state(optimizer, "nowhere"),
        "effective_rank": lambda: scalora.effective_rank(model),
    }.items():
        with pytest.raises(ValueError) as error:
            save()
        said[name] = str(error.value)
    model, optimizer = begin(Run(), sharded=False)
    fully_shard(model)
    with pytest.raises(ValueError) as error:
        train(Run(), model, optimizer, range(1), rank, 2)
    said["late"] = str(error.value)
    return said


@pytest.mark.distributed
def test_what_is_refused_says_what_to_do(tmp_path: Path) -> None:
    for said in run_processes(refused_runs, tmp_path, 2):
        assert "fully_shard" in said.pop("FSDP1")
        assert "call fully_shard before it is made" in said.pop("late")
        assert all("torch.distributed.checkpoint" in text for text in said.values())
