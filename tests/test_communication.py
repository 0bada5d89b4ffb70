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
    found = run_processes(received, tmp_path, PROCESSES)
    for name, formula in planned(plan).items():
        assert max(counts[name] for counts, _ in found) == formula, name
    # All layers of one shape travel together, so compare with what those would weigh.
    assert max(largest for _, largest in found) < min(m * n for m, n in plan.adapted)
