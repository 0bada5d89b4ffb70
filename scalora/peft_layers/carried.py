"""Putting a carry into PEFT's layers: in the forward pass and in PEFT's own merging."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as lora_layers
from torch import Tensor

from scalora.carry import Carry, put_carry


def carry_of(module: Any, adapter: str) -> Carry | None:
    """The carry of one adapter of PEFT's layer, or None."""
    if isinstance(module, lora_layers.Embedding):
        return getattr(module, "scalora_carries", {}).get(adapter)
    return getattr(module.lora_A[adapter], "carry", None) if adapter in module.lora_A else None


def attach_carry(module: Any, adapter: str, carry: Carry) -> None:
    """Let the layer compute with the carry, wherever it computes with the adapter.

    It is switched on, scaled, dropped out, merged and deleted with the adapter.
    """
    if not isinstance(module, lora_layers.Embedding):
        put_carry(module.lora_A[adapter], module.lora_B[adapter], carry)
    else:
        if carry_of(module, adapter) is None:
            module.register_forward_hook(_EmbeddingCarry(adapter))
        module.scalora_carries = {**getattr(module, "scalora_carries", {}), adapter: carry}
    # PEFT merges, unmerges and weighs adapters by this method alone, where it can at all.
    if hasattr(type(module), "get_delta_weight"):
        module.get_delta_weight = _DeltaWeight(module)


class _DeltaWeight:
    """``layer.get_delta_weight`` with the carry in it; an object, so that it can be pickled."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, adapter: str) -> Tensor:
        module = self.module
        delta = type(module).get_delta_weight(module, adapter)
        carry = carry_of(module, adapter)
        if carry is None or adapter not in module.scaling:
            return delta
        carry = carry.on(delta.device)
        product = module.scaling[adapter] * (carry.up @ carry.down)
        transposed = delta.ndim == 2 and (
            isinstance(module, lora_layers.Embedding) or getattr(module, "fan_in_fan_out", False)
        )
        product = product.T if transposed else product.view(delta.shape)
        return (delta + product).to(delta.dtype)


class _EmbeddingCarry:
    """Forward hook of an embedding, whose factors are no modules that could be replaced."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        carry = carry_of(module, self.adapter)
        runs = not module.disable_adapters and self.adapter in module.active_adapters
        if carry is None or module.merged or not runs or self.adapter not in module.scaling:
            return output
        carry = carry.on(output.device)
        codes = torch.nn.functional.embedding(args[0], carry.down.T)
        added = module.scaling[self.adapter] * (codes @ carry.up.T)
        scale = module._get_embed_scale()  # of Gemma's embeddings
        added = added if scale is None else added * scale.to(added.dtype)
        return output + added.to(output.dtype)
