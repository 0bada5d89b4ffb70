"""torch's own list of optimizers, and of the arguments that its tests make each with.

Run as a script: importing that list changes torch's flags, hypothesis' profile, the environment and
the filters of warnings of its process.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Optimizer's name -> (name, keyword arguments) of every way to make it.
Inputs = dict[str, list[tuple[str, dict[str, Any]]]]


def torch_optimizer_inputs(folder: Path) -> Inputs:
    """On a CPU, with every implementation there; not ``differentiable``, which steps no leaves."""
    path = folder / "inputs.pt"
    subprocess.run([sys.executable, __file__, str(path)], check=True, capture_output=True)
    return torch.load(path, weights_only=True)


def _write(path: str) -> None:
    if importlib.util.find_spec("expecttest") is None:
        # Only the name is needed of what torch's test cases derive from.
        stand_in: Any = ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    from torch.testing._internal import common_optimizers

    inputs: Inputs = {}
    for info in common_optimizers.optim_db:
        found = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs(
            "cpu", torch.float64, info, skip=("differentiable",)
        )
        inputs[info.optim_cls.__name__] = [(made.desc, made.kwargs) for made in found]
    torch.save(inputs, path)


if __name__ == "__main__":
    _write(sys.argv[1])
