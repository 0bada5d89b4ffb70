"""Whether training itself looks at the base of an adapter, as it does at a reference model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scalora.peft_layers.pair import LoRAPair


class BaseWatch:
    """Notes forward passes in training mode that leave an adapter out.

    One look may have any reason; the reference model of DPO is looked at before every step.

    Args:
        pair: a layer of the adapter, which is switched off where all are.
    """

    def __init__(self, pair: LoRAPair) -> None:
        self.pair = pair
        self._seen = self._seen_before = False

    def __call__(self, layer: nn.Module, args: Any) -> None:
        """Forward pre-hook of the layer."""
        if not layer.training or not self.pair.exists or self.pair.runs:
            return
        # With another adapter in its place, and gradients, that one is being trained.
        if self.pair.module.disable_adapters or not torch.is_grad_enabled():
            self._seen = True

    def refers_to_base(self) -> bool:
        """Whether there were such passes since this was asked last, and before that as well."""
        repeated = self._seen and self._seen_before
        self._seen, self._seen_before = False, self._seen and not repeated
        return repeated


def watch_base(pair: LoRAPair) -> BaseWatch:
    """Watch an adapter from now on, at one of its layers; there is one watch for all who ask."""
    for hook in pair.module._forward_pre_hooks.values():
        if isinstance(hook, BaseWatch) and hook.pair.adapter == pair.adapter:
            return hook
    watch = BaseWatch(pair)
    pair.module.register_forward_pre_hook(watch)
    return watch
