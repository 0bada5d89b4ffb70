"""Training that looks at the base of its adapter, as at the reference model of DPO.

Held by tests/integrations/test_stack_trl_references.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scalora.peft_layers import LoRAPair


class ReferenceWatch:
    """Notes forward passes in training mode that leave an adapter out.

    One look may have any reason; the reference model of DPO is looked at before every step.

    Args:
        pair: a layer of the adapter, which is switched off where all are.
    """

    def __init__(self, pair: LoRAPair) -> None:
        self.pair = pair
        self._seen = self._seen_before = False

    def __call__(self, layer: nn.Module, args: Any) -> None:
        """Note one forward pass; a forward pre-hook of the layer."""
        if not layer.training or not self.pair.exists or self.pair.runs:
            return
        # With another adapter in its place, and gradients, that one is being trained.
        if self.pair.is_switched_off or not torch.is_grad_enabled():
            self._seen = True

    def check(self) -> None:
        """Raise a ValueError if there were such passes before this step and the one before it."""
        repeated = self._seen and self._seen_before
        self._seen, self._seen_before = False, self._seen and not repeated
        if repeated:
            raise ValueError(
                f"before this step and the one before it the model computed in training mode "
                f"without its adapter {self.pair.adapter!r}, as for the reference model of DPO. "
                "ScaLoRA folds increments into the base weights, so that reference would move. Use "
                "accumulator='carry', which is switched off with the adapter (in TRL's trainers "
                "ScaLoRACallback takes it by itself). To look at the base for another purpose, "
                "call model.eval() before. Nothing was changed in this step."
            )


def watch_reference(pair: LoRAPair) -> ReferenceWatch:
    """Watch an adapter at one of its layers; all optimizers of that adapter share one watch."""
    for hook in pair.module._forward_pre_hooks.values():
        if isinstance(hook, ReferenceWatch) and hook.pair.adapter == pair.adapter:
            return hook
    watch = ReferenceWatch(pair)
    pair.module.register_forward_pre_hook(watch)
    return watch
