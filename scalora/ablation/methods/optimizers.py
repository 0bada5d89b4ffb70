"""LoRA's own two factors under the optimizers that PEFT makes for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)

from scalora.ablation.methods.lora import LoRA
from scalora.ablation.methods.method import Setup


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA+ (arXiv 2402.12354), PEFT's: a higher learning rate for ``lora_B``.

    Tried at a quarter of the learning rates, so that with the usual ratio plain LoRA's rate is the
    geometric mean of the two factors'.

    Attributes:
        ratio: that learning rate over ``lora_A``'s; the paper recommends about 16.
    """

    name: ClassVar[str] = "lora+"
    title: ClassVar[str] = "LoRA+"
    rate: ClassVar[float] = 0.25

    ratio: float = 16.0

    def optimizer(self, model: PeftModel, setup: Setup) -> torch.optim.Optimizer:
        """Return the optimizer of the adapter's parameters and the head's."""
        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=setup.learning_rate,
            loraplus_lr_ratio=self.ratio,
            loraplus_lr_embedding=setup.learning_rate,
            loraplus_weight_decay=setup.task.weight_decay,
        )


@dataclass(frozen=True)
class Riemannian(LoRA):
    """Riemannian preconditioned LoRA (arXiv 2402.02347), PEFT's.

    Each factor's gradient is multiplied by the inverse Gramian of the other factor before AdamW
    sees it. Weight decay is on every trained parameter, a head's bias included.

    Attributes:
        reg: number added to the Gramians' diagonals.
    """

    name: ClassVar[str] = "riemannian"
    title: ClassVar[str] = "Riemannian LoRA"

    reg: float = 1e-2

    def optimizer(self, model: PeftModel, setup: Setup) -> torch.optim.Optimizer:
        """Return the optimizer of the adapter's parameters and the head's."""
        return create_riemannian_optimizer(
            model,
            torch.optim.AdamW,
            lr=setup.learning_rate,
            reg=self.reg,
            weight_decay=setup.task.weight_decay,
        )


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA-FA (arXiv 2308.03303), PEFT's: ``lora_A`` stays as drawn, half the parameters train.

    PEFT projects the gradient of ``lora_B`` in bfloat16 wherever that is supported, has its own
    AdamW (epsilon 1e-6), and weight decay on every trained parameter.
    """

    name: ClassVar[str] = "lora-fa"
    title: ClassVar[str] = "LoRA-FA"

    def optimizer(self, model: PeftModel, setup: Setup) -> torch.optim.Optimizer:
        """Return the optimizer of ``lora_B`` and the head."""
        config = model.peft_config["default"]
        return create_lorafa_optimizer(
            model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lr=setup.learning_rate,
            weight_decay=setup.task.weight_decay,
        )
