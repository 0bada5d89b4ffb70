"""Optimizer steps over many layers of tiny matrices: their cost besides arithmetic."""

from __future__ import annotations

import statistics
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from examples.benchmark.peers import PEERS, MakeOptimizer, adamw, rebasing
from examples.benchmark.table import markdown
from scalora.options import RebasingOptions

_BLOCKS, _RANK = 80, 2
_WARM_UP, _ROUNDS = 3, 30
# (out, in) of a decoder block's linear layers, a few hundred times too small to cost anything.
_SHAPES = {
    "q_proj": (16, 16),
    "k_proj": (8, 16),
    "v_proj": (8, 16),
    "o_proj": (16, 16),
    "gate_proj": (32, 16),
    "up_proj": (32, 16),
    "down_proj": (16, 32),
}
_FOR_GOOD = 10**9  # steps
_AFTERWARDS, _REBASING = "default, afterwards", "default, afterwards, re-basing"
_MAKERS: dict[str, MakeOptimizer] = {
    "AdamW alone": adamw,
    "rule='none'": rebasing(rule="none"),
    "default, while it calibrates": rebasing(calibration=_FOR_GOOD, interval=_FOR_GOOD),
    _AFTERWARDS: rebasing(calibration=1, interval=_FOR_GOOD),
    _REBASING: rebasing(calibration=1, interval=1),
    "exact": rebasing(rule="exact"),
    **PEERS,
}


@dataclass
class _Contestant:
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    seconds: list[float] = field(default_factory=list)


def run(device: torch.device) -> str:
    """Return a table of optimizer steps: LoRA of r = 2 on 560 linear layers, random gradients.

    The matrices are 32 x 32 at most.  The contestants take their steps in turn, in one process.
    """
    contestants = {}
    for name, make in _MAKERS.items():
        with suppress(ImportError):  # an older PEFT
            contestants[name] = _contestant(make, device)
    generator = torch.Generator(device).manual_seed(0)
    for turn in range(_WARM_UP + _ROUNDS):
        names = list(contestants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = _timed_step(contestants[name], generator)
            if turn >= _WARM_UP:
                contestants[name].seconds.append(taken)
    seconds = {name: contestant.seconds for name, contestant in contestants.items()}
    interval = RebasingOptions().interval_steps
    seconds[f"{_AFTERWARDS}, one in {interval} re-bases"] = [
        ((interval - 1) * plain + rebased) / interval
        for plain, rebased in zip(
            sorted(seconds[_AFTERWARDS]), sorted(seconds[_REBASING]), strict=True
        )
    ]
    rows = [
        [
            name,
            f"{1e3 * min(times):.1f}",
            f"{1e3 * statistics.median(times):.1f}",
            f"{min(times) / min(seconds['AdamW alone']):.2f}",
        ]
        for name, times in sorted(seconds.items(), key=lambda item: min(item[1]))
    ]
    note = (
        f"{_BLOCKS * len(_SHAPES)} layers, {2 * _BLOCKS * len(_SHAPES)} factors.\n"
        f"ms: processor time of optimizer.step() in {_ROUNDS} steps; ratio: of the least."
    )
    return markdown(["optimizer", "least ms", "median ms", "ratio"], rows) + "\n\n" + note


def _contestant(make: MakeOptimizer, device: torch.device) -> _Contestant:
    torch.manual_seed(0)
    base = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(n, m, bias=False) for name, (m, n) in _SHAPES.items()})
        for _ in range(_BLOCKS)
    )
    model = get_peft_model(base, LoraConfig(r=_RANK, target_modules=list(_SHAPES))).to(device)
    optimizer = make(model, True)
    return _Contestant(optimizer, [p for p in model.parameters() if p.requires_grad])


def _timed_step(contestant: _Contestant, generator: torch.Generator) -> float:
    for parameter in contestant.parameters:
        device = parameter.device
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=device)
    if contestant.parameters[0].device.type == "cuda":
        torch.cuda.synchronize()  # what the step waits for is not what was asked before it
    start = time.thread_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="save_pretrained writes the adapter alone")
        contestant.optimizer.step()
    return time.thread_time() - start
