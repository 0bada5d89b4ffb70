"""What a step launches on a GPU, counted without one at a Llama-8B's true shapes.

    make device-trace

The model and its optimizer are on a `fake_device`: every operation on the device is counted, and
whatever would wait for the device raises.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import miub.monitor
import scalora
from examples.benchmark.fake_device import FakeDevice, fake_device
from examples.benchmark.machine import machine
from examples.benchmark.table import markdown
from miub import MIUBMonitor
from scalora.rebasing.held_lipschitz import ArrivingFlag

DEPTHS = (1, 8, 32)  # decoder blocks of 7 LoRA layers each; Llama-8B has 32
_RANK = 8
_TOKENS = 1024
# The second step calibrates, the fifth does nothing but step, and the sixth re-bases for the second
# time: all that is made only once has been made by then.
_INTERVAL = _CALIBRATION = 3
_STEPS = {5: "ordinary", 2: "calibrating", 6: "re-basing"}
# What ScaLoRA may add to the inner optimizer's operations: rule and kind of step.
TARGETS = {("auto", "ordinary"): 12, ("auto", "re-basing"): 80, ("exact", "re-basing"): 400}

Operations = dict[str, Counter[str]]
"""Kind of step -> name of an operation -> how many."""


@dataclass(frozen=True)
class Case:
    """An inner optimizer and how it is wrapped.

    Attributes:
        inner: a name in `INNER`.
        rule, accumulator, rounding: `scalora.ScaLoRA`'s; without a rule the inner steps alone.
    """

    inner: str = "AdamW foreach"
    rule: str | None = None
    accumulator: str = ""
    rounding: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `scalora.ScaLoRA`."""
        chosen: dict[str, Any] = {
            "rule": self.rule,
            "accumulator": self.accumulator,
            "rounding": self.rounding,
        }
        if self.rule != "none":
            chosen["interval"] = _INTERVAL
        if self.rule == "auto":
            chosen["calibration"] = _CALIBRATION
        return {name: value for name, value in chosen.items() if value}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of step that it takes."""
        if self.rule in (None, "none"):
            return ("ordinary",)
        return ("ordinary", "calibrating", "re-basing")[:: 1 if self.rule == "auto" else 2]


def _adamw_8bit(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-3)


INNER: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "AdamW 8-bit": _adamw_8bit,
}

# These wait for the device themselves: after every parameter.
_OWN_WAITS = {"AdamW 8-bit": "bitsandbytes.optim.optimizer.sync_gpu"}

CASES = [
    Case(rule="none"),
    *(Case(inner, "auto", "dense", "stochastic") for inner in INNER),
    *(Case(rule="auto", accumulator="dense", rounding=r) for r in ("compensated", "nearest")),
    Case(rule="auto", accumulator="carry"),
    *(Case(inner, "exact", "dense", "stochastic") for inner in INNER),
    Case(rule="exact", accumulator="dense", rounding="compensated"),
    Case(rule="exact", accumulator="carry"),
    *(Case(rule=rule, accumulator="dense") for rule in ("direction", "paper", "scalar", "age")),
]


def step_operations(device: FakeDevice, model: nn.Module, case: Case) -> Operations:
    """Return what the steps of each kind launch.

    Raises:
        DeviceWaitError: a step waits for the device; the first may, which allocates.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = INNER[case.inner](parameters)
    if case.rule is not None:
        optimizer = scalora.ScaLoRA(optimizer, model, **case.options)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    found = {}
    own = _OWN_WAITS.get(case.inner)
    # What the device tells the host of itself has long arrived, in a run.
    arrived = mock.patch.object(ArrivingFlag, "__bool__", lambda flag: True)
    with warnings.catch_warnings(), mock.patch(own) if own else nullcontext(), arrived:
        warnings.filterwarnings("ignore", message="save_pretrained writes the adapter alone")
        optimizer.step()
        for step in range(2, max(_STEPS) + 1):
            operations = device.operations(optimizer.step)
            if step in _STEPS:
                found[_STEPS[step]] = operations
    return {kind: found[kind] for kind in case.kinds}


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
    stay = mock.patch.object(miub.monitor, "_disable_current_modes", nullcontext)
    with stay, torch.no_grad():
        plain = device.operations(forward)
        with MIUBMonitor(model, every=1):
            return device.operations(forward) - plain


def llama(blocks: int) -> PeftModel:
    """Return a Llama-8B of some blocks in bfloat16, LoRA of r = 8 on all its linear layers.

    The vocabulary is small: nothing is adapted there.
    """
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype=torch.bfloat16,
    )
    # PEFT moves new factors to where they are already, which torch cannot do with fake ones.
    unmoved = mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"), unmoved:
            base = LlamaForCausalLM(config)
            adapter = LoraConfig(r=_RANK, target_modules="all-linear")
            return get_peft_model(base, adapter, autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(default)


def added(device: FakeDevice, blocks: int, case: Case, alone: Counter[str]) -> Operations:
    """Return what ScaLoRA adds to the operations of its inner optimizer's step.

    Args:
        device: that is traced.
        blocks: of the model.
        case: with a rule.
        alone: what the inner optimizer launches by itself; `step_operations` counts it.
    """
    found = step_operations(device, llama(blocks), case)
    return {kind: operations - alone for kind, operations in found.items()}


def run(depths: Sequence[int] = DEPTHS) -> str:
    """Return the tables; a cell has one number if it is the same at every depth."""
    with fake_device() as device:
        alone = {
            (inner, blocks): step_operations(device, llama(blocks), Case(inner))["ordinary"]
            for inner in INNER
            for blocks in depths
        }
        rows = [
            _row(case, [added(device, n, case, alone[case.inner, n]) for n in depths])
            for case in CASES
        ]
        measuring = [measuring_operations(device, llama(n)).total() / (7 * n) for n in depths]
    counts = {
        inner: _cell([str(alone[inner, blocks].total()) for blocks in depths]) for inner in INNER
    }
    names = " / ".join(map(str, depths))
    header = ["rule", "accumulator", "rounding", "optimizer", *_STEPS.values(), "folds"]
    targets = [f"{rule}, {kind}: {most}" for (rule, kind), most in TARGETS.items()]
    each = _cell([f"{n:.0f}" for n in measuring])
    notes = [
        f"Operations that ScaLoRA adds per step, {names} blocks of 7 LoRA layers; one number: the",
        "same for all.  One on a list of tensors is a kernel for every 30 to 110 of them.",
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
    return [*names, *map(cell, _STEPS.values()), cell("re-basing", "fold_")]


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
