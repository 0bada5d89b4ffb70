"""The GPU's table: every section tries out on a CPU, and one that fails leaves the others' rows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from examples.benchmark.gpu import __main__ as command
from examples.benchmark.gpu import sections
from examples.benchmark.gpu.sections import Row, launched, monitor
from examples.benchmark.launches import Launches, launches_among

CPU = torch.device("cpu")


def event(name: str, start: float, device_type: DeviceType = DeviceType.CPU) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=start + 10)
    return SimpleNamespace(name=name, time_range=span, device_type=device_type)


def test_kernels_copies_and_waits_are_those_that_began_within_the_call() -> None:
    found = launches_among(
        [
            event("measured call", 10),
            event("measured call", 10, DeviceType.CUDA),
            event("aten::add", 11),
            event("cudaLaunchKernel", 12),
            event("cuLaunchKernelEx", 13),  # Triton's
            event("vectorized_add_kernel", 13, DeviceType.CUDA),
            event("cudaMemcpyAsync", 14),
            event("cudaMemsetAsync", 15),
            event("cudaStreamSynchronize", 16),
            event("cudaDeviceSynchronize", 21),
            event("cudaLaunchKernel", 9),
        ]
    )
    assert found == Launches(kernels=2, copies=2, waits=1)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("section", [launched, monitor])
def test_a_section_prints_whole_rows(section, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {name: sections._LAUNCHED[name] for name in ("AdamW", "default")}
    monkeypatch.setattr(sections, "_LAUNCHED", cases)
    rows = section(CPU, True)
    assert len(rows) >= 3
    assert all(row.measured and row.value and row.beside for row in rows)
    assert [Row(*row) for row in json.loads(json.dumps(rows))] == rows


def test_a_section_that_fails_or_takes_too_long_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = json.dumps([["fold", "1 ms", "of a copy"]])
    scripts = {
        "folds": f"print('chatter'); print({good!r})",
        "steps": "raise MemoryError('no memory left')",
        "tests": "import time; time.sleep(60)",
    }
    clock = iter([0.0, 0.0, 0.0, 460.0])  # at the beginning, then before each section
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(
        command, "_section_command", lambda name, *_: [sys.executable, "-c", scripts[name]]
    )
    rows = command.all_rows(list(scripts), CPU, True, dict(os.environ))
    assert rows[0] == ("fold", "1 ms", "of a copy")
    assert rows[1] == ("steps", "failed", "MemoryError: no memory left")
    assert rows[2][:2] == ("tests", "not finished")


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "wheels"
    empty.mkdir()
    with pytest.raises(SystemExit, match="no wheels"):
        command.environment(empty, str(tmp_path))
