"""LoRA, and DoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import LoraConfig

from scalora.ablation.methods.adapter import Adapter, on_adapted_layers
from scalora.ablation.methods.method import Setup


@dataclass(frozen=True)
class LoRA(Adapter):
    """LoRA (arXiv 2106.09685) with AdamW.

    Attributes:
        alpha: PEFT's ``lora_alpha``; r unless given, which scales by 1.
        rslora: scale by ``alpha / sqrt(r)`` (arXiv 2312.03732).
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"

    alpha: int | None = None
    rslora: bool = False

    def config(self, setup: Setup) -> LoraConfig:
        """Return PEFT's config of the adapter."""
        r = self.rank_in(setup.rank)
        return LoraConfig(
            r=r,
            lora_alpha=r if self.alpha is None else self.alpha,
            lora_dropout=0.0,
            use_rslora=self.rslora,
            **on_adapted_layers(setup.task),
            **self.variant(),
        )

    def variant(self) -> dict[str, Any]:
        """Return the arguments that this method's config has beside LoRA's."""
        return {}


@dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA (arXiv 2402.09353), PEFT's: a trained magnitude per row, LoRA for the direction."""

    name: ClassVar[str] = "dora"
    title: ClassVar[str] = "DoRA"

    def variant(self) -> dict[str, Any]:
        """Return the arguments that this method's config has beside LoRA's."""
        return {"use_dora": True}
