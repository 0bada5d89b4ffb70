"""How far the effective weight drifts over 1,000 re-basings, for every base dtype and rounding."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import scalora
from scalora.benchmark.table import markdown
from scalora.options import Rounding
from scalora.peft_layers import lora_pairs

_REBASINGS, _SIZE, _RANK = 1000, 256, 8
_CASES: list[tuple[torch.dtype, Rounding]] = [
    (torch.float32, "stochastic"),
    (torch.bfloat16, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "compensated"),
    (torch.float16, "nearest"),
    (torch.float16, "stochastic"),
    (torch.float16, "compensated"),
]


def run(device: torch.device) -> str:
    """One layer, 256 x 256, r = 8, weights of standard deviation 0.02, AdamW at 1e-4.

    A float64 copy takes every step that the trained factors take.  The drift is the distance of
    the weight that the layer computes with (in its own dtype) from that copy.
    """
    rows = [_measure(dtype, rounding, device) for dtype, rounding in _CASES]
    header = ["base", "rounding", "folded", "lost", "drift", "one rounding"]
    note = (
        "folded: norm of everything folded; lost: how much of it is not in the base, along its own "
        "direction.\ndrift: norm of the effective weight's error over the weight's norm; one "
        "rounding: the same for\nrounding the exact weight once to the base's dtype, the least "
        "that the dtype allows."
    )
    return markdown(header, rows) + "\n\n" + note


@torch.no_grad()
def _measure(dtype: torch.dtype, rounding: Rounding, device: torch.device) -> list[str]:
    torch.manual_seed(0)
    layer = nn.Linear(_SIZE, _SIZE, bias=False)
    layer.weight.normal_(std=0.02)
    model = get_peft_model(
        nn.Sequential(layer.to(dtype)), LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=["0"])
    ).to(device)
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    optimizer = scalora.ScaLoRA(inner, model, rule="exact", rounding=rounding)
    [pair] = lora_pairs(model, "default")
    target = torch.randn(_SIZE, _SIZE, device=device) * 0.02
    start = pair.base_weight.double()
    exact = start + _delta(pair)
    for count in range(_REBASINGS):
        gradient = pair.effective_weight().float() - target + 0.02 * torch.randn_like(target)
        P, Q = pair.P_parameter, pair.Q_parameter
        P.grad, Q.grad = gradient @ Q.T, P.T @ gradient
        optimizer._rebaser.rebase(inner, count)
        before = _delta(pair)
        inner.step()
        exact += _delta(pair) - before
    folded = exact - start - _delta(pair)
    stored = pair.base_weight.double() - start
    norm = exact.norm()
    return [
        str(dtype).removeprefix("torch."),
        rounding if dtype != torch.float32 else "(exact)",
        f"{folded.norm():.2f}",
        f"{100 * (1 - (stored * folded).sum() / folded.square().sum()):.2f} %",
        f"{(pair.base_weight.double() + _delta(pair) - exact).norm() / norm:.1e}",
        f"{((exact - _delta(pair)).to(dtype).double() + _delta(pair) - exact).norm() / norm:.1e}",
    ]


def _delta(pair: scalora.peft_layers.LoRAPair) -> Tensor:
    return pair.scaling * pair.P_parameter.double() @ pair.Q_parameter.double()
