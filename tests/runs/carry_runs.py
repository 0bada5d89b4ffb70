"""Small models in float64 whose increments go into carries, trained with a rule of scaling."""

from __future__ import annotations

from typing import Any

import models
import torch
import training
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
    return training.optimizer_of(model, lr=lr, **{"accumulator": "carry", **options})


INPUTS = models.vectors(64, 24).double()


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(16, 24, generator=generator, dtype=torch.float64) for _ in range(count)]


train = models.train_on


def pairs(model: Any) -> list[LoRAPair]:
    return lora_pairs(model, "default")
