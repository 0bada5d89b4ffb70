"""LoRA with other initial factors: from the base weight, or from its gradient."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga

from scalora.ablation.methods.full import adapted_layers
from scalora.ablation.methods.lora import LoRA
from scalora.ablation.methods.method import Setup, Training


@dataclass(frozen=True)
class PiSSA(LoRA):
    """PiSSA (arXiv 2404.02948), PEFT's: the adapter begins as the weight's principal part.

    The adapter's first product is subtracted from the base weight.

    Attributes:
        niter: subspace iterations of a fast SVD; an exact SVD unless given.
    """

    name: ClassVar[str] = "pissa"
    title: ClassVar[str] = "PiSSA"

    niter: int | None = None

    def variant(self) -> dict[str, Any]:
        """Return the arguments that this method's config has beside LoRA's."""
        exact = self.niter is None
        return {"init_lora_weights": "pissa" if exact else f"pissa_niter_{self.niter}"}


@dataclass(frozen=True)
class LoRAGA(LoRA):
    """LoRA-GA (arXiv 2407.05000), PEFT's: the adapter begins along the gradient's singular vectors.

    The adapter's first product is subtracted from the base weight. The gradient is that of the
    run's first training batches. PEFT's scaling differs from the paper's, where both factors are
    singular vectors times one number: ``lora_B`` also has the gradient's singular values in it, and
    ``lora_A`` has unit rows.

    Attributes:
        batches: number of training batches that the gradient is averaged over.
        gamma: PEFT's ``stable_gamma``.
    """

    name: ClassVar[str] = "lora-ga"
    title: ClassVar[str] = "LoRA-GA"

    batches: int = 8
    gamma: int = 16

    def variant(self) -> dict[str, Any]:
        """Return the arguments that this method's config has beside LoRA's."""
        own = LoraGAConfig(stable_gamma=self.gamma)
        return {"init_lora_weights": "lora_ga", "lora_ga_config": own}

    def training(self, setup: Setup) -> Training:
        """Make the model ready, in place, and return what trains it."""
        shapes = adapted_layers(setup.model, setup.task).shapes
        self._check_rank(self.rank_in(setup.rank), shapes)
        config = self.config(setup)
        config.target_modules = set(shapes)  # preprocess_loraga does not know "all-linear"

        def backward() -> None:
            for batch in setup.task.batches(setup.seed, self.batches):
                setup.task.loss(setup.model, batch).backward()

        with warnings.catch_warnings():
            # Its hooks count calls, which is right for a layer whose inputs need no gradient too.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            preprocess_loraga(setup.model, config, backward)
        return super().training(setup)

    @staticmethod
    def _check_rank(r: int, shapes: dict[str, tuple[int, int]]) -> None:
        for layer, shape in shapes.items():
            if min(shape) < 2 * r:
                raise ValueError(
                    f"lora-ga takes 2 r = {2 * r} singular vectors, and layer {layer!r}, {shape}, "
                    "does not have as many: choose a lower rank."
                )
