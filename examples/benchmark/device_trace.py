"""What a step launches on a GPU, counted without one at a Llama-8B's true shapes.

    make device-trace

The model and its optimizer are on a `fake_device`: every operation on the device is counted, and
whatever would wait for the device raises.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from unittest import mock

import torch
from peft import PeftModel
from torch import nn

import miub.forward_pass
from examples.benchmark.cases import INNER, KINDS, Case, measured_steps
from examples.benchmark.fake_device import FakeDevice, fake_device
from examples.benchmark.llama import LAYERS_PER_BLOCK, llama, with_lora
from examples.benchmark.machine import machine
from examples.benchmark.table import markdown
from miub import MIUBMonitor
from scalora.rebasing.optimal_step import ArrivingFlag

DEPTHS = (1, 8, 32)  # decoder blocks; a Llama-8B has 32
_TOKENS = 1024
# What ScaLoRA may add to the inner optimizer's operations: rule and kind of step.
TARGETS = {("auto", "ordinary"): 12, ("auto", "re-basing"): 80, ("exact", "re-basing"): 400}

Operations = dict[str, Counter[str]]
"""Kind of step -> name of an operation -> how many."""

OTHER_RULES = ("direction", "paper", "scalar", "age", "expected")
CASES = [
    Case(rule="none"),
    *(Case(inner, "auto", "dense", "stochastic") for inner in INNER),
    *(Case(rule="auto", accumulator="dense", rounding=r) for r in ("compensated", "nearest")),
    Case(rule="auto", accumulator="carry"),
    *(Case(inner, "exact", "dense", "stochastic") for inner in INNER),
    Case(rule="exact", accumulator="dense", rounding="compensated"),
    Case(rule="exact", accumulator="carry"),
    *(Case(rule=rule, accumulator="dense") for rule in OTHER_RULES),
]


def step_operations(device: FakeDevice, model: nn.Module, case: Case) -> Operations:
    """Return what the steps of each kind launch.

    Raises:
        DeviceWaitError: a step waits for the device.
    """
    # What the device tells the host of itself has long arrived, in a run.
    with mock.patch.object(ArrivingFlag, "__bool__", lambda flag: True):
        return measured_steps(device.operations, model, case)


def measuring_operations(device: FakeDevice, model: nn.Module) -> Counter[str]:
    """Return what the MIUB monitor launches in a forward pass that it measures in.

    Raises:
        DeviceWaitError: it waits for the device.
    """
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="cuda")
    mask = torch.ones_like(ids)

    def forward() -> None:
        model(input_ids=ids, attention_mask=mask, use_cache=False)

    # It measures outside of the modes that are entered, this one among them.
    stay = mock.patch.object(miub.forward_pass, "_disable_current_modes", nullcontext)
    with stay, torch.no_grad():
        plain = device.operations(forward)
        with MIUBMonitor(model, every=1):
            return device.operations(forward) - plain


def fake_llama(blocks: int) -> PeftModel:
    """Return a Llama-8B of some blocks with LoRA, within `fake_device`."""
    cuda = torch.device("cuda")
    # PEFT moves new factors to the base's device, which torch cannot do with fake ones.
    unmoved = mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self)
    with cuda, unmoved:
        return with_lora(llama(blocks, cuda))


def added(device: FakeDevice, blocks: int, case: Case, alone: Counter[str]) -> Operations:
    """Return what ScaLoRA adds to the operations of its inner optimizer's step.

    Args:
        device: that is traced.
        blocks: of the model.
        case: with a rule.
        alone: what the inner optimizer launches by itself; `step_operations` counts it.
    """
    found = step_operations(device, fake_llama(blocks), case)
    for operations in found.values():
        operations.subtract(alone)
    return found


def run(depths: Sequence[int] = DEPTHS) -> str:
    """Return the tables; a cell has one number if it is the same at every depth."""
    with fake_device() as device:
        alone = {
            (inner, blocks): step_operations(device, fake_llama(blocks), Case(inner))["ordinary"]
            for inner in INNER
            for blocks in depths
        }
        rows = [
            _row(case, [added(device, n, case, alone[case.inner, n]) for n in depths])
            for case in CASES
        ]
        measuring = [
            measuring_operations(device, fake_llama(n)).total() / (LAYERS_PER_BLOCK * n)
            for n in depths
        ]
    counts = {
        inner: _cell([str(alone[inner, blocks].total()) for blocks in depths]) for inner in INNER
    }
    names = " / ".join(map(str, depths))
    header = ["rule", "accumulator", "rounding", "optimizer", *KINDS, "folds"]
    targets = [f"{rule}, {kind}: {most}" for (rule, kind), most in TARGETS.items()]
    each = _cell([f"{n:.0f}" for n in measuring])
    notes = [
        f"Operations that ScaLoRA adds per step, {names} blocks of {LAYERS_PER_BLOCK} LoRA layers;",
        "one number: the same for all.  One on a list of tensors is a kernel for every 30 to 110.",
        f"Targets: {'; '.join(targets)}; folds: one per shape of weight, of which there are 4.",
        f"A pass that the MIUB monitor measures in: {each} operations per LoRA layer.",
    ]
    return "\n\n".join(
        [
            markdown(["optimizer alone", f"operations, {names} blocks"], list(counts.items())),
            markdown(header, rows),
            "\n".join(notes),
        ]
    )


def _row(case: Case, found: Sequence[Operations]) -> list[str]:
    def cell(kind: str, operation: str | None = None) -> str:
        if kind not in case.kinds:
            return ""
        counts = [each[kind] for each in found]
        return _cell([str(c.total() if operation is None else c[operation]) for c in counts])

    names = [str(case.rule), case.accumulator, case.rounding, case.inner]
    return [*names, *map(cell, KINDS), cell("re-basing", "fold_")]


def _cell(values: Sequence[str]) -> str:
    """Return one value if all are alike, else all of them."""
    return " / ".join(values if len(set(values)) > 1 else values[:1])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.device_trace", description=__doc__
    )
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="decoder blocks")
    depths = parser.parse_args().depths
    warnings.simplefilter("ignore", FutureWarning)  # of libraries among themselves
    print(f"{machine(torch.device('cpu'))}\n\n{run(depths)}")


if __name__ == "__main__":
    main()
