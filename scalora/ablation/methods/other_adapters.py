"""PEFT's adapters that are not a product of two factors.

Each is given about as many trained parameters as LoRA of the task's rank has. MoRA
(arXiv 2405.12130) belongs here; PEFT does not have it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from peft import GraloraConfig, HiraConfig, MissConfig, RandLoraConfig

from scalora.ablation.methods.adapter import Adapter, on_adapted_layers
from scalora.ablation.methods.full import adapted_layers
from scalora.ablation.methods.method import Setup

_Shapes = Collection[tuple[int, int]]


def lora_parameters(shapes: _Shapes, r: int) -> int:
    """Return the number of parameters that LoRA trains in layers of these shapes (m, n)."""
    return sum(r * (m + n) for m, n in shapes)


@dataclass(frozen=True)
class HiRA(Adapter):
    """HiRA (Huang et al., ICLR 2025), PEFT's: ``W0 * (B A)``, entry by entry.

    The rank of the change is up to that of ``W0`` times r. As many parameters as LoRA. Tried at
    ten times the learning rates: a step is smaller than LoRA's by the weight's entries, which are
    far below 1.
    """

    name: ClassVar[str] = "hira"
    title: ClassVar[str] = "HiRA"
    rate: ClassVar[float] = 10.0

    def config(self, setup: Setup) -> HiraConfig:
        """Return PEFT's config of the adapter."""
        return HiraConfig(
            r=self.rank_in(setup.rank), hira_dropout=0.0, **on_adapted_layers(setup.task)
        )


@dataclass(frozen=True)
class GraLoRA(Adapter):
    """GraLoRA (arXiv 2505.20355), PEFT's: a low-rank product for each of k x k blocks of a weight.

    The rank of the change is up to k r, with as many parameters as LoRA.

    Attributes:
        k: blocks per side; r must be a multiple of it.
    """

    name: ClassVar[str] = "gralora"
    title: ClassVar[str] = "GraLoRA"

    k: int = 2

    def config(self, setup: Setup) -> GraloraConfig:
        """Return PEFT's config of the adapter."""
        r = self.rank_in(setup.rank)
        return GraloraConfig(
            r=r, alpha=r, gralora_k=self.k, gralora_dropout=0.0, **on_adapted_layers(setup.task)
        )


@dataclass(frozen=True)
class MiSS(Adapter):
    """MiSS (arXiv 2409.15371), PEFT's: one block (r, m), shared by the inputs r apart.

    The rank of the change is r at most.

    Attributes:
        r: MiSS's own; unless given, the one that trains about as many parameters as LoRA does.
    """

    name: ClassVar[str] = "miss"
    title: ClassVar[str] = "MiSS"

    def label(self, rank: int) -> str:
        """Return the name in a picture; its r is no rank that compares with LoRA's."""
        return self.title

    def config(self, setup: Setup) -> MissConfig:
        """Return PEFT's config of the adapter."""
        r = self.r
        if r is None:
            shapes = adapted_layers(setup.model, setup.task).shapes.values()
            most = min(n for _, n in shapes)
            budget = lora_parameters(shapes, self.rank_in(setup.rank))
            r = max(1, min(most, round(budget / sum(m for m, _ in shapes))))
        return MissConfig(r=r, miss_dropout=0.0, **on_adapted_layers(setup.task))


@dataclass(frozen=True)
class RandLoRA(Adapter):
    """RandLoRA (arXiv 2502.00987), PEFT's: a full-rank sum of fixed random products, scaled.

    Scaled by PEFT's recommended 20. A larger r means fewer products, and fewer parameters.

    Attributes:
        r: rank of each random product; unless given, the one whose number of trained parameters is
            nearest to LoRA's.
    """

    name: ClassVar[str] = "randlora"
    title: ClassVar[str] = "RandLoRA"

    def label(self, rank: int) -> str:
        """Return the name in a picture; its r is no rank that compares with LoRA's."""
        return self.title

    def config(self, setup: Setup) -> RandLoraConfig:
        """Return PEFT's config of the adapter."""
        r = self.r
        if r is None:
            shapes = adapted_layers(setup.model, setup.task).shapes.values()
            r = nearest_basis_rank(shapes, lora_parameters(shapes, self.rank_in(setup.rank)))
        return RandLoraConfig(
            r=r,
            randlora_alpha=20 * r,
            randlora_dropout=0.0,
            projection_prng_key=setup.seed,
            **on_adapted_layers(setup.task),
        )


def nearest_basis_rank(shapes: _Shapes, parameters: int) -> int:
    """Return RandLoRA's r that trains the number of parameters nearest to this one."""

    def trained(r: int) -> int:
        bases = [(math.ceil(min(shape) / r), min(shape)) for shape in shapes]
        return sum(count * (r + least) for count, least in bases)

    largest = max(min(shape) for shape in shapes)
    return min(range(1, largest + 1), key=lambda r: abs(trained(r) - parameters))
