"""ReLoRA: merge the adapter from time to time and begin another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from scalora import peft_layers
from scalora.ablation.methods.adapter import put_adapter
from scalora.ablation.methods.lora import LoRA
from scalora.ablation.methods.method import Setup, Training
from scalora.ablation.methods.schedule import linear_schedule
from scalora.peft_layers import LoRAPair


@dataclass(frozen=True)
class ReLoRA(LoRA):
    """ReLoRA (arXiv 2307.05695): merge, restart the factors, prune the moments, warm up again.

    Once every ``every`` steps the adapter is added to the base weights, ``lora_A`` is drawn anew
    and ``lora_B`` set to zero. Both moments of AdamW are set to zero; its step count stays. The
    learning rate rises again from near 0 to the schedule's. A merge into a base weight in half
    precision loses what is below its unit in the last place.

    Attributes:
        every: steps between two merges; a quarter of the run unless given.
        rewarm: steps of the new rise; a tenth of ``every`` unless given.
        prune: share of the moments' entries that are set to zero, the smallest first moments first.
    """

    name: ClassVar[str] = "relora"
    title: ClassVar[str] = "ReLoRA"

    every: int | None = None
    rewarm: int | None = None
    prune: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prune <= 1:
            raise ValueError(f"prune={self.prune} must be within [0, 1].")
        for name, value in (("every", self.every), ("rewarm", self.rewarm)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")

    def training(self, setup: Setup) -> Training:
        """Make the model ready, in place, and return what trains it."""
        every = self.every or max(1, setup.steps // 4)
        rewarm = self.rewarm or max(1, every // 10)
        model = put_adapter(setup.model, self.config(setup), setup.seed)
        peft_layers.untie_adapted_weights(model)
        optimizer = self.optimizer(model, setup)
        pairs = peft_layers.lora_pairs(model, "default")
        # Another stream than the first draw's, or the second would repeat it.
        generator = torch.Generator().manual_seed(setup.seed + 1_000_003)

        def restart(done: int) -> None:
            if done % every or done >= setup.steps:
                return
            for pair in pairs:
                merge(pair)
                restart_factors(pair, generator)
            factors = [p for pair in pairs for p in (pair.P_parameter, pair.Q_parameter)]
            prune_moments(optimizer, factors, self.prune)

        def rise(step: int) -> float:
            return 1.0 if step < every else min(1.0, (step % every + 1) / rewarm)

        return Training(model, optimizer, linear_schedule(optimizer, setup, rise), restart)


@torch.no_grad()
def merge(pair: LoRAPair) -> None:
    """Add the adapter to the base weight; the factors keep their values."""
    weight = pair.base_weight
    weight.copy_(weight + pair.learned_change())


@torch.no_grad()
def restart_factors(pair: LoRAPair, generator: torch.Generator) -> None:
    """Set the factors as PEFT initialises them: one random, the other zero."""
    zero, random = pair.P_parameter, pair.Q_parameter
    if pair.is_embedding:
        zero, random = random, zero
    zero.zero_()
    # On the CPU, so that a run on another device draws the same.
    fresh = torch.empty(random.shape)
    if pair.is_embedding:
        nn.init.normal_(fresh, generator=generator)
    else:
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
    random.copy_(fresh)


@torch.no_grad()
def prune_moments(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], share: float
) -> None:
    """Set both of AdamW's moments of these parameters to zero where the first is smallest.

    The same entries of both: a first moment without its second would be divided by epsilon.
    """
    for parameter in parameters:
        state = optimizer.state[parameter]
        if "exp_avg" not in state:
            continue
        size = parameter.numel()
        least = state["exp_avg"].abs().flatten().argsort()[: math.ceil(share * size)]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].view(-1)[least] = 0
