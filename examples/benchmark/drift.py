"""How far the effective weight drifts over 10,000 steps, for every base dtype and rounding."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import scalora
from examples.benchmark.table import markdown
from scalora.options import Rounding
from scalora.peft_layers import lora_pairs

_STEPS, _SIZE, _RANK = 10_000, 256, 8
_CASES: list[tuple[torch.dtype, Rounding, int | Literal["auto"]]] = [
    (torch.float32, "stochastic", "auto"),
    (torch.bfloat16, "nearest", "auto"),
    (torch.bfloat16, "stochastic", "auto"),
    (torch.bfloat16, "stochastic", 100),
    (torch.bfloat16, "compensated", "auto"),
    (torch.float16, "stochastic", "auto"),
    (torch.float16, "compensated", "auto"),
]


def run(device: torch.device) -> str:
    """One layer, 256 x 256, r = 8, weights of standard deviation 0.02, AdamW at 1e-4, 10,000 steps.

    ``lora_A`` is as small as in a layer of width 4096.  The weight has to move by 5 % of its norm;
    gradients are mostly noise.  A float64 copy takes every step that the trained factors take.  The
    drift is the distance of the weight that the layer computes with from that copy.
    """
    rows = [_measure(*case, device) for case in _CASES]
    header = ["base", "rounding", "interval", "re-based", "folded", "drift", "one rounding"]
    note = (
        f"{_STEPS:,} steps of the default rule.  folded: norm of everything folded, over the "
        "weight's norm.\ndrift: norm of the effective weight's error over the weight's norm; one "
        "rounding: the same for\nrounding the exact weight once to the base's dtype, the least "
        "that the dtype allows."
    )
    return markdown(header, rows) + "\n\n" + note


@torch.no_grad()
def _measure(
    dtype: torch.dtype, rounding: Rounding, interval: int | Literal["auto"], device: torch.device
) -> list[str]:
    torch.manual_seed(0)
    layer = nn.Linear(_SIZE, _SIZE, bias=False)
    layer.weight.normal_(std=0.02)
    model = get_peft_model(
        nn.Sequential(layer.to(dtype)), LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=["0"])
    ).to(device)
    [pair] = lora_pairs(model, "default")
    pair.Q_parameter.normal_(std=0.009)
    inner = torch.optim.AdamW([pair.P_parameter, pair.Q_parameter], lr=1e-4, weight_decay=0.0)
    optimizer = scalora.ScaLoRA(inner, model, rounding=rounding, interval=interval, calibration=0)
    start = pair.base_weight.double()
    target = start.float() + 0.05 * 0.02 * torch.randn(_SIZE, _SIZE, device=device)
    exact = start + _delta(pair)
    before: list[Tensor] = []
    inner.register_step_pre_hook(lambda *_: before.append(_delta(pair)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="save_pretrained writes the adapter alone")
        for _ in range(_STEPS):
            gradient = pair.effective_weight().float() - target + 0.02 * torch.randn_like(target)
            P, Q = pair.P_parameter, pair.Q_parameter
            P.grad, Q.grad = gradient @ Q.T, P.T @ gradient
            optimizer.step()
            exact += _delta(pair) - before.pop()
    folded = exact - start - _delta(pair)
    norm = exact.norm()
    return [
        str(dtype).removeprefix("torch."),
        rounding if dtype != torch.float32 else "(exact)",
        str(optimizer.options.interval_steps),
        f"{optimizer.rebase_count:,}",
        f"{folded.norm() / norm:.3f}",
        f"{(pair.base_weight.double() + _delta(pair) - exact).norm() / norm:.1e}",
        f"{((exact - _delta(pair)).to(dtype).double() + _delta(pair) - exact).norm() / norm:.1e}",
    ]


def _delta(pair: scalora.peft_layers.LoRAPair) -> Tensor:
    return pair.scaling * pair.P_parameter.double() @ pair.Q_parameter.double()
