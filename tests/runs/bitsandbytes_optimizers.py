"""bitsandbytes' optimizers by name, with rates at which they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

bnb = pytest.importorskip("bitsandbytes").optim

BITS_32 = (
    *("Adam", "Adam32bit", "PagedAdam", "PagedAdam32bit"),
    *("AdamW", "AdamW32bit", "PagedAdamW", "PagedAdamW32bit"),
    *("Lion", "Lion32bit", "PagedLion", "PagedLion32bit"),
    *("AdEMAMix", "PagedAdEMAMix"),
    *("SGD", "SGD32bit", "RMSprop", "RMSprop32bit", "Adagrad", "Adagrad32bit"),
)
BITS_8 = (
    *("Adam8bit", "PagedAdam8bit", "AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit"),
    *("AdEMAMix8bit", "PagedAdEMAMix8bit", "SGD8bit", "RMSprop8bit", "Adagrad8bit"),
)
RATES = {
    **{"Adam": 4e-2, "AdamW": 4e-2, "AdEMAMix": 2e-2, "Lion": 2e-2},
    **{"SGD": 6.0, "RMSprop": 1e-2, "Adagrad": 1e-1},
}

P_AXIS, Q_AXIS = 2, 1  # of stacks (layers, m, r) and (layers, r, n)
ROUND_OFF = 8 * 2.0**-24  # of a float32 number, a few operations deep


def create(name: str, parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    family = name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
    options = {"lr": RATES[family], "weight_decay": 0.0, **options}
    if family == "SGD":
        options["momentum"] = 0.9
    return getattr(bnb, name)(parameters, **options)
