"""Small models in float64 whose increments go into carries, trained with a rule of scaling."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import Tensor

import scalora
from scalora.peft_layers import LoRAPair, lora_pairs


def perceptron(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["first", "second"], **config}
    return models.with_lora(
        models.Perceptron(24, 32, 16).to(dtype), autocast_adapter_dtype=False, **options
    )


def optimizer_of(model: Any, lr: float = 1e-2, **options: Any) -> scalora.ScaLoRA:
    inner = torch.optim.AdamW(models.trainable(model), lr=lr)
    return scalora.ScaLoRA(inner, model, **{"rule": "exact", "accumulator": "carry", **options})


INPUTS = models.vectors(64, 24).double()


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(16, 24, generator=generator, dtype=torch.float64) for _ in range(count)]


def train(model: Any, optimizer: scalora.ScaLoRA, inputs: list[Tensor]) -> list[float]:
    return [models.train(model, optimizer, batch, 1)[0] for batch in inputs]


def pairs(model: Any) -> list[LoRAPair]:
    return lora_pairs(model, "default")
