"""HSDP: four processes, two replicas of a model sharded over two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from sharded_runs import Run, assert_as_in_one_process, resumed_run, saved_run, sharded_run

pytestmark = pytest.mark.distributed

RUNS = {
    "default": Run(replicas=2),
    "default, a batch of NaN": Run(replicas=2, spoiled=9),
    "default, carry": Run(replicas=2, options={"accumulator": "carry", "carry_rank": 8}),
    "exact": Run(replicas=2, options={"rule": "exact"}),
    "exact, carry": Run(
        replicas=2, options={"rule": "exact", "accumulator": "carry", "carry_rank": 9}
    ),
}
HALF = {"bfloat16": Run(replicas=2, dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(sharded_run, tmp_path_factory.mktemp("runs"), 4, {**RUNS, **HALF})


@pytest.mark.parametrize("name", RUNS)
def test_replicas_of_shards_train_as_one_process(outcomes: list[dict[str, Any]], name: str) -> None:
    assert_as_in_one_process(outcomes[0][name], RUNS[name])


@pytest.mark.parametrize("name", [*RUNS, *HALF])
def test_all_processes_agree_to_the_bit(outcomes: list[dict[str, Any]], name: str) -> None:
    first, *others = (found[name] for found in outcomes)
    for other in others:
        assert other["checksums"] == first["checksums"]
        assert other["losses"] == pytest.approx(first["losses"], rel=0, abs=0, nan_ok=True)
        for weight, value in first["weights"].items():
            assert torch.equal(other["weights"][weight], value)
        for layer, value in first["carries"].items():
            assert torch.equal(other["carries"][layer], value)


def test_run_resumes_without_replicas(tmp_path: Path) -> None:
    runs = {name: RUNS[name] for name in ("default", "default, carry")}
    expected = run_processes(saved_run, tmp_path, 4, runs, tmp_path)[0]
    alone = {name: replace(run, replicas=1) for name, run in runs.items()}
    found = run_processes(resumed_run, tmp_path, 1, alone, tmp_path)[0]
    for name in runs:
        assert found[name] == pytest.approx(expected[name], rel=1e-8), name
