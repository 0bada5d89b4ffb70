"""ScaLoRA, this package's own method."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel

from scalora.ablation.methods.lora import LoRA
from scalora.ablation.methods.method import Setup
from scalora.ablation.methods.schedule import adamw
from scalora.optimizer import ScaLoRA
from scalora.options import RebasingOptions


@dataclass(frozen=True)
class Rebased(LoRA, RebasingOptions):
    """ScaLoRA (arXiv 2510.23818) around AdamW; the options are `scalora.ScaLoRA`'s and LoRA's.

    The option ``seed``, of the stochastic rounding, is added to the run's.
    """

    name: ClassVar[str] = "scalora"
    title: ClassVar[str] = "ScaLoRA"

    def __post_init__(self) -> None:
        LoRA.__post_init__(self)
        RebasingOptions.__post_init__(self)

    def optimizer(self, model: PeftModel, setup: Setup) -> torch.optim.Optimizer:
        """Return the optimizer of the adapter's parameters, which re-bases its layers."""
        names = [option.name for option in dataclasses.fields(RebasingOptions)]
        options = {name: getattr(self, name) for name in names}
        options["seed"] += setup.seed
        return ScaLoRA(adamw(model, setup), model, **options)
