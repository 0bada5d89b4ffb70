"""Runs as jobs of a cluster, by submitit's executors that need none."""

import functools
from pathlib import Path

import pytest
from ablation_stand_ins import FILE

from scalora.ablation.engines import Cluster
from scalora.ablation.job import Job
from scalora.ablation.record import read_record
from scalora.ablation.run import run_and_record

pytest.importorskip("submitit")

JOBS = [Job(f"{FILE}:Tiny", "lora", 1e-2, seed, 3, 2) for seed in (0, 1)]


def run_on(cluster: str, folder: Path, jobs: list[Job]) -> list[Job]:
    work = functools.partial(run_and_record, cache=folder / "cache", records=folder / "runs")
    with Cluster(folder / "slurm", {"timeout_min": 10}, cluster) as engine:
        return [job for job, record in engine.run(work, jobs) if record.status == "ok"]


def test_every_run_is_a_job_of_the_queue(tmp_path: Path) -> None:
    assert run_on("debug", tmp_path, JOBS) == JOBS
    assert all(read_record(job, tmp_path / "runs") is not None for job in JOBS)


@pytest.mark.slow
def test_job_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert run_on("local", tmp_path, JOBS[:1]) == JOBS[:1]
    assert read_record(JOBS[0], tmp_path / "runs") is not None


@pytest.mark.slow
def test_job_that_dies_is_a_failed_run(tmp_path: Path) -> None:
    job = Job(f"{FILE}:Fatal", "lora", 1e-2, 0, 3, 2)
    work = functools.partial(run_and_record, cache=tmp_path / "cache", records=tmp_path / "runs")
    with Cluster(tmp_path / "slurm", {"timeout_min": 10}, "local") as engine:
        ((ended, record),) = engine.run(work, [job])
    assert ended == job and record.status == "failed"


def test_parameter_that_there_is_not_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slurm_nonsense"):
        Cluster(tmp_path, {"slurm_nonsense": 1}, "debug")
