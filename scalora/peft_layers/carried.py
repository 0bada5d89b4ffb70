"""Carries in PEFT's layers: in the forward pass and in PEFT's own merging.

Held by tests/carry/test_carry.py.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as lora_layers
from torch import Tensor

from scalora.carry import Carry, put_carry


def attached_carry(module: Any, adapter: str) -> Carry | None:
    """Return the carry of one adapter of PEFT's layer, or None."""
    if isinstance(module, lora_layers.Embedding):
        return getattr(module, "scalora_carries", {}).get(adapter)
    return getattr(module.lora_A[adapter], "carry", None) if adapter in module.lora_A else None


def attach_carry(module: Any, adapter: str, carry: Carry) -> None:
    """Let the layer compute with the carry wherever it computes with the adapter.

    The carry is switched on, scaled, dropped out, merged and deleted with the adapter.
    """
    if not isinstance(module, lora_layers.Embedding):
        put_carry(module.lora_A[adapter], module.lora_B[adapter], carry)
    else:
        if attached_carry(module, adapter) is None:
            module.register_forward_hook(_EmbeddingCarry(adapter), with_kwargs=True)
        module.scalora_carries = {**getattr(module, "scalora_carries", {}), adapter: carry}
        module.delete_adapter = _DeleteAdapter(module)
    # PEFT merges and unmerges adapters by this method alone, where it can merge them.
    if hasattr(type(module), "get_delta_weight"):
        module.get_delta_weight = _DeltaWeight(module)


class _DeltaWeight:
    """``layer.get_delta_weight`` with the carry added; an object, so that it can be pickled."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, adapter: str) -> Tensor:
        module = self.module
        delta = type(module).get_delta_weight(module, adapter)
        carry = attached_carry(module, adapter)
        if carry is None or adapter not in module.scaling:
            return delta
        carry = carry.on(delta.device)
        product = module.scaling[adapter] * (carry.whole_up() @ carry.whole_down())
        transposed = delta.ndim == 2 and (
            isinstance(module, lora_layers.Embedding) or getattr(module, "fan_in_fan_out", False)
        )
        product = product.T if transposed else product.view(delta.shape)
        return (delta + product).to(delta.dtype)


class _DeleteAdapter:
    """``layer.delete_adapter`` of an embedding, which also deletes the carry."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, adapter_name: str) -> None:
        type(self.module).delete_adapter(self.module, adapter_name)
        self.module.scalora_carries.pop(adapter_name, None)


class _EmbeddingCarry:
    """A forward hook of an embedding, whose factors are parameters and not modules."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        carry = attached_carry(module, self.adapter)
        rows = kwargs.get("adapter_names")  # one per row of a batch that mixes adapters
        runs = self.adapter in (module.active_adapters if rows is None else rows)
        if carry is None or module.merged or module.disable_adapters or not runs:
            return output
        down, up = (x.to(output.device) for x in (carry.whole_down(), carry.whole_up()))
        codes = torch.nn.functional.embedding(args[0], down.T)
        added = module.scaling[self.adapter] * (codes @ up.T)
        if rows is not None:
            own = torch.tensor([name == self.adapter for name in rows], device=output.device)
            added = added * own.view(-1, *(1,) * (added.ndim - 1))
        scale = module._get_embed_scale()  # Gemma scales its embeddings
        added = added if scale is None else added * scale.to(added.dtype)
        return output + added.to(output.dtype)
