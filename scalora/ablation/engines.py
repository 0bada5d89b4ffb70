"""Engines that run jobs: this process, local processes, or a cluster.

Held by tests/ablation/test_ablation_runs.py and test_ablation_runs_cluster.py.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from scalora.ablation.job import Job
from scalora.ablation.record import Record
from scalora.ablation.run import describe

Work = Callable[[Job], Record]

_POLL_CLUSTER = 2.0  # submitit itself asks the cluster less often


class Engine(ABC):
    """Runs independent jobs; a context manager that keeps its processes."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *raised: object) -> None:  # noqa: B027 -- most keep nothing
        """End what is kept."""

    @abstractmethod
    def run(self, work: Work, jobs: Sequence[Job]) -> Iterator[tuple[Job, Record]]:
        """Yield each job with its record, as jobs end.

        ``work`` records what a job raises. A job whose process dies gets a failed record here.
        """


class Inline(Engine):
    """One job after another in this process, for a debugger."""

    def run(self, work: Work, jobs: Sequence[Job]) -> Iterator[tuple[Job, Record]]:
        """Yield each job with its record."""
        for job in jobs:
            yield job, work(job)


class LocalProcesses(Engine):
    """Jobs in parallel, each in a process with its share of the cores.

    Args:
        processes: jobs at a time.
        log: file that everything they print is appended to, a crash's last words included.
    """

    def __init__(self, processes: int, log: Path) -> None:
        self.processes = processes
        self.log = log
        self._pool: ProcessPoolExecutor | None = None

    def __exit__(self, *raised: object) -> None:
        """End the processes; running jobs are waited for unless something was raised."""
        if self._pool is None:
            return
        if raised[0] is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def run(self, work: Work, jobs: Sequence[Job]) -> Iterator[tuple[Job, Record]]:
        """Yield each job with its record, as jobs end.

        No more jobs are handed over than there are processes. So if a process dies (killed for its
        memory, say), the jobs that were running are known: they fail, and new processes go on.
        """
        waiting = deque(jobs)
        running: dict[Future[Record], Job] = {}
        while waiting or running:
            while waiting and len(running) < self.processes:
                job = waiting.popleft()
                running[self._submit(work, job)] = job
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                yield job, _result_of(future, job)

    def _submit(self, work: Work, job: Job) -> Future[Record]:
        if self._pool is not None:
            try:
                with _errors_to(self.log):
                    return self._pool.submit(work, job)
            except BrokenProcessPool:
                self._pool.shutdown()
        self._pool = ProcessPoolExecutor(
            max_workers=self.processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin_process,
            initargs=(max(1, torch.get_num_threads() // self.processes),),
        )
        with _errors_to(self.log):  # processes inherit it where they are started
            return self._pool.submit(work, job)


@contextmanager
def _errors_to(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = os.dup(2)
    with path.open("ab") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _begin_process(threads: int) -> None:
    os.dup2(2, 1)  # the terminal is the progress bar's
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with its parent, so that a killed command leaves none that trains on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Cluster(Engine):
    """Jobs of a cluster's own queue, through submitit.

    Args:
        folder: folder of the jobs' scripts and logs, which every machine of the cluster sees.
        parameters: submitit's executor's: ``timeout_min``, ``mem_gb``, ``cpus_per_task``,
            ``gpus_per_node``, ``slurm_partition``, ...
        cluster: "slurm"; submitit's "local" and "debug" are for tests.

    Raises:
        ValueError: submitit is missing, or does not know a parameter or the cluster.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any], cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError as error:
            raise ValueError(
                "--engine slurm needs submitit: pip install scalora[cluster]"
            ) from error
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(name="scalora-ablate", **parameters)
        except (NameError, AssertionError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"submitit: {' '.join(str(error).split())}") from error

    def run(self, work: Work, jobs: Sequence[Job]) -> Iterator[tuple[Job, Record]]:
        """Yield each job with its record, as jobs end; they are submitted as one array."""
        with self._executor.batch():
            submitted = [self._executor.submit(work, job) for job in jobs]
        running = dict(zip(jobs, submitted, strict=True))
        try:
            while running:
                ended = [job for job, future in running.items() if future.done()]
                for job in ended:
                    yield job, _result_of(running.pop(job), job)
                if running and not ended:
                    time.sleep(_POLL_CLUSTER)
        finally:
            for future in running.values():
                future.cancel(check=False)


def _result_of(future: Any, job: Job) -> Record:
    """Return a job's record; a failed one if its process died before it wrote one."""
    error = future.exception()
    if error is None:
        record: Record = future.result()
        return record
    if isinstance(error, BrokenProcessPool):
        return Record(job, "failed", error="the process died (was there enough memory?)")
    return Record(job, "failed", error=describe(error))
