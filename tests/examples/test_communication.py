"""Bytes moved between processes are those of the formula, and none are of a weight's size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from examples.benchmark.communication import ReceivedBytes, measured, planned, small_plan
from scalora import sharding
from scalora.step_length.calibration import StepCalibration

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


def received_with_replicas(rank: int) -> dict[str, float]:
    return measured(PROCESSES, replicas=2)[0]


@pytest.mark.distributed
def test_rebasing_moves_nothing_between_replicas(tmp_path: Path) -> None:
    found = run_processes(received_with_replicas, tmp_path, 2 * PROCESSES)
    formula = planned(small_plan(PROCESSES))
    for name in ("step", "re-basing", "exact", "exact, carry"):
        assert max(counts[name] for counts in found) == formula[name], name


class Factors(nn.Module):
    """Six factors of three shapes, whose rows two processes share unevenly or not at all."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 5), (7, 3), (3, 5), (7, 3), (1, 5), (7, 3)]
        self.all = nn.ParameterList(torch.zeros(shape) for shape in shapes)


def calibrated(model: Factors) -> StepCalibration:
    """Return the calibration after three steps, of which the last is not yet observed."""
    calibration, parameters = StepCalibration(100), list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        calibration.observe(parameters, 1.0)
        with calibration.scaled(parameters), torch.no_grad():
            for p in parameters:
                step = torch.randn(p.shape, generator=generator)
                sharding.local(p).sub_(step[sharding.own_rows(p)])
                p.grad = torch.ones_like(p)
    return calibration


def saved(rank: int) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """Return collectives, and the saved calibration of a sharded model and of one that is not."""
    model, whole = Factors(), Factors()
    expected = calibrated(whole).saved(list(whole.parameters()))
    fully_shard(model)
    calibration = calibrated(model)
    with ReceivedBytes(PROCESSES) as received:
        found = calibration.saved(list(model.parameters()))
    return received.collectives, found, expected


def test_saving_a_calibration_takes_one_collective_for_each_shape(tmp_path: Path) -> None:
    for collectives, found, expected in run_processes(saved, tmp_path, PROCESSES):
        assert collectives == 3
        for name in ("last", "path", "total"):
            torch.testing.assert_close(found[name], expected[name])
            assert expected[name].norm() > 0
