"""A long run, re-based at every step: does memory grow, do weights drift, do columns die?"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import scalora
from examples.benchmark.table import markdown
from scalora.peft_layers import LoRAPair

STEPS = 20_000
_WIDTH, _RANK, _BATCH, _RATE = 32, 4, 32, 1e-3
_LOOK, _LOOKS = 5, 40  # a column is dead if it was so whenever it was looked at in the end
_DEAD = 1e-6  # of the layer's longest column
_COMPENSATED = {"rounding": "compensated"}
_CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    (name, dtype, options)
    for dtype in (torch.float32, torch.bfloat16)
    for name, options in [
        ("rule='none'", {"rule": "none"}),
        ("default, dense", {"accumulator": "dense"}),
        ("default, carry", {"accumulator": "carry"}),
        ("exact, dense", {"rule": "exact", "accumulator": "dense"}),
        ("exact, carry", {"rule": "exact", "accumulator": "carry"}),
    ]
]
_CASES.append(("exact, compensated", torch.bfloat16, {"rule": "exact", **_COMPENSATED}))


def run(device: torch.device, steps: int = STEPS) -> str:
    """Two layers of 32 x 32, r = 4, learn a full-rank change of both; AdamW at 1e-3, batch 32."""
    rows = [_measure(name, dtype, options, device, steps) for name, dtype, options in _CASES]
    header = ["base", "optimizer", "re-based", "loss", "drift", "dead", "live KiB", "RSS MiB"]
    note = (
        f"{steps:,} steps, interval=1. loss: of a held-out batch at the end.\n"
        "drift: norm of the sum of all that re-basing changed in the effective weights, over "
        "theirs.\n"
        "dead: columns of P or Q below 1e-6 of the layer's longest, of 16, all through the last "
        "200 steps.\n"
        "live: of all tensors after a tenth of the steps and at the end; RSS: growth of the "
        "process between."
    )
    return markdown(header, rows) + "\n\n" + note


@dataclass
class _Drift:
    """Adds up what re-basing, which should change nothing, changes in the effective weights."""

    pairs: list[LoRAPair]
    total: list[Tensor] = field(default_factory=list)

    def watched(self, rebasing: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its change of the weights added to the total."""

        def call(*args: Any) -> Any:
            before = [_exact_weight(pair) for pair in self.pairs]
            result = rebasing(*args)
            moved = [_exact_weight(p) - old for p, old in zip(self.pairs, before, strict=True)]
            self.total = (
                [t + m for t, m in zip(self.total, moved, strict=True)] if self.total else moved
            )
            return result

        return call

    def relative(self) -> float:
        """Over the norm of the weights."""
        if not self.total:
            return 0.0
        norm = torch.stack([_exact_weight(pair) for pair in self.pairs]).norm()
        return float(torch.stack(self.total).norm() / norm)


@torch.no_grad()
def _exact_weight(pair: LoRAPair) -> Tensor:
    """Return the weight that the layer stands for, (m, n), float64."""
    weight = pair.base_weight.double()
    weight = weight + pair.scaling * pair.P_parameter.double() @ pair.Q_parameter.double()
    carry = pair.carry
    if carry is not None:
        weight = weight + pair.scaling * carry.up.double() @ carry.down.double()
    return weight


def _measure(
    name: str, dtype: torch.dtype, options: dict[str, Any], device: torch.device, steps: int
) -> list[str]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH))
    teacher = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH))
    teacher.to(device)
    config = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=["0", "2"])
    model = get_peft_model(base.to(dtype), config).to(device)
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_RATE)
    optimizer = scalora.ScaLoRA(inner, model, **options)
    pairs = scalora.peft_layers.lora_pairs(model, "default")
    drift = _Drift(pairs)
    rebaser: Any = optimizer._rebaser
    rebaser.rebase = drift.watched(rebaser.rebase)

    def loss(inputs: Tensor) -> Tensor:
        found = model(inputs.to(dtype)).float()
        with torch.no_grad():
            wanted = teacher(inputs)
        return (found - wanted).square().mean()

    generator = torch.Generator().manual_seed(1)
    held_out = torch.randn(1024, _WIDTH, generator=generator).to(device)
    alive: list[Tensor] = []
    live, resident = 0, 0.0
    for step in range(1, steps + 1):
        inputs = torch.randn(_BATCH, _WIDTH, generator=generator).to(device)
        optimizer.zero_grad()
        loss(inputs).backward()
        optimizer.step()
        if step == steps // 10:
            live, resident = _live_bytes(), _resident_mib()
        if step > steps - _LOOK * _LOOKS and step % _LOOK == 0:
            alive.append(_alive(pairs))
    live_now, resident_now = _live_bytes(), _resident_mib()
    dead = int((~torch.stack(alive).any(0)).sum())
    return [
        str(dtype).removeprefix("torch."),
        name,
        f"{optimizer.rebase_count:,}",
        f"{loss(held_out).item():.4f}",
        f"{drift.relative():.1e}" if optimizer.rebase_count else "",
        str(dead),
        f"{live / 1024:.0f} -> {live_now / 1024:.0f}",
        f"{resident_now - resident:+.1f}",
    ]


@torch.no_grad()
def _alive(pairs: list[LoRAPair]) -> Tensor:
    """Return whether each column of P and of Q is longer than nothing, (layers, 2, r)."""
    lengths = torch.stack(
        [torch.stack([p.P_parameter.norm(dim=0), p.Q_parameter.norm(dim=1)]) for p in pairs]
    )
    return lengths > _DEAD * lengths.amax(-1, keepdim=True)


def _live_bytes() -> int:
    """Return the bytes of all tensors that Python holds."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _resident_mib() -> float:
    """The process's resident memory; NaN where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return float("nan")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
