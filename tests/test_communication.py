"""Bytes moved between processes are those of the formula, and none are of a weight's size."""

from __future__ import annotations

from pathlib import Path

from processes import run_processes

from scalora.benchmark.communication import measured, planned, small_plan

PROCESSES = 2


def received(rank: int) -> tuple[dict[str, float], int]:
    return measured(PROCESSES)


def test_two_processes_receive_what_the_formula_says(tmp_path: Path) -> None:
    plan = small_plan(PROCESSES)
    for found, largest in run_processes(received, tmp_path, PROCESSES):
        assert found == planned(plan)
        # All layers of one shape travel together, so compare with what those would weigh.
        assert largest < min(m * n for m, n in plan.adapted)
