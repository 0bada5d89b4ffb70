"""Carries in PEFT's layers: in the forward pass and in PEFT's own merging.

Held by tests/carry/test_carry.py.
"""

from __future__ import annotations

from functools import partial
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
    # Partial functions can be pickled; a bound method would be restored as that of the class.
    if not isinstance(module, lora_layers.Embedding):
        put_carry(module.lora_A[adapter], module.lora_B[adapter], carry)
    else:
        # Once: a hook stays where an adapter is deleted, and made anew by the same name.
        if not hasattr(module, "scalora_carries"):
            module.register_forward_hook(_embed_with_carries, with_kwargs=True)
        module.scalora_carries = {**getattr(module, "scalora_carries", {}), adapter: carry}
        module.delete_adapter = partial(_delete_adapter, module)
    # PEFT merges and unmerges adapters by this method alone, where it can merge them.
    if hasattr(type(module), "get_delta_weight"):
        module.get_delta_weight = partial(_delta_weight, module)


def _delta_weight(module: Any, adapter: str) -> Tensor:
    """Do what ``layer.get_delta_weight`` does, and add the carry."""
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


def _delete_adapter(module: Any, adapter_name: str) -> None:
    """Do what ``layer.delete_adapter`` of an embedding does, and delete the carry."""
    type(module).delete_adapter(module, adapter_name)
    module.scalora_carries.pop(adapter_name, None)


def _embed_with_carries(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Add the carries to an embedding's output: its factors are parameters and not modules."""
    if module.merged or module.disable_adapters:
        return output
    rows = kwargs.get("adapter_names")  # one per row of a batch that mixes adapters
    runs = module.active_adapters if rows is None else rows
    for adapter, carry in module.scalora_carries.items():
        if adapter in runs:
            added = _embedded(module, adapter, carry, args[0], output.device)
            if rows is not None:
                own = torch.tensor([name == adapter for name in rows], device=output.device)
                added = added * own.view(-1, *(1,) * (added.ndim - 1))
            output = output + added.to(output.dtype)
    return output


def _embedded(
    module: Any, adapter: str, carry: Carry, codes: Tensor, device: torch.device
) -> Tensor:
    """Return what a carry adds to the embedding of each code: (*codes, m)."""
    down, up = (x.to(device) for x in (carry.whole_down(), carry.whole_up()))
    columns = torch.nn.functional.embedding(codes, down.T)
    added = module.scaling[adapter] * (columns @ up.T)
    scale = module._get_embed_scale()  # Gemma scales its embeddings
    return added if scale is None else added * scale.to(added.dtype)
