"""A transformers Trainer under FSDP2: the callback completes its checkpoints, and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerated_runs import best_run, exported_run, logged, make_trainer, trainer_run
from processes import run_processes

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


def test_checkpoint_of_another_rule_is_refused(tmp_path: Path) -> None:
    run_processes(trainer_run, tmp_path, 1, tmp_path, {}, SHARDED, False)
    [found] = run_processes(trainer_run, tmp_path, 1, tmp_path, {"rule": "exact"}, SHARDED, True)
    assert "rule='auto'" in found["error"]
