"""Reasons why a layer cannot be re-based, folded into, carried or measured.

Held by tests/peft_layers/test_layers.py and tests/rebasing/test_quantized_backends.py.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as lora_layers
from peft.tuners.lora import variants as lora_variants
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from scalora import sharding
from scalora.peft_layers.pair import CONVOLUTIONS, LoRAPair

_PLAIN = (lora_layers.Linear, lora_layers.Embedding, *CONVOLUTIONS)
# Modules of PEFT's layers over quantized bases; most can be imported only with their library.
_QUANTIZED = ("bnb", "gptq", "awq", "hqq", "eetq", "aqlm", "torchao")
_PRESERVED_VARIANTS = (
    lora_variants.DoraLinearVariant,
    lora_variants.DoraEmbeddingVariant,
    lora_variants.DoraConv1dVariant,
    lora_variants.DoraConv2dVariant,
    lora_variants.DoraConv3dVariant,
)
# These call the adapter's modules, and so see what a carry adds to their output.
_CARRIED_VARIANTS = (lora_variants.DoraLinearVariant,)
# One class for both where they have no memory, to plan a run or to count what it launches.
_PARAMETERS = (nn.Parameter, FakeTensor)
_TENSORS = (Tensor, FakeTensor)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_quantized(pair: LoRAPair) -> bool:
    """Return whether PEFT's layer is one over a quantized base."""
    return _class_of(pair).__module__.rpartition(".")[2] in _QUANTIZED


def why_not_dense(pair: LoRAPair) -> str | None:
    """Return why increments cannot be folded into this layer's base weight, or None."""
    if is_quantized(pair):
        return "its base weight is quantized"
    if _class_of(pair) not in _PLAIN:
        return f"{type(pair.module).__name__} layers are not supported"
    reason = _why_not_rebased(pair, _PRESERVED_VARIANTS)
    if reason is not None:
        return reason
    weight = pair.base_layer._parameters.get("weight")
    if weight is None:
        return "its base weight is computed from others (a parametrization)"
    plain = type(weight) in (*_PARAMETERS, *_TENSORS)
    if sharding.is_sharded(weight):
        reason = sharding.why_layout_unsupported(weight)
        if reason is not None:
            return f"of its base weight, {reason}"
        plain = type(sharding.local(weight)) in _TENSORS
    if not plain or weight.dtype not in _FLOATS:
        return "its base weight is quantized or sharded"
    if weight.numel() == 0:
        return "its base weight is sharded"
    if weight.device.type == "meta":
        return "its base weight is offloaded"
    return None


def why_no_carry(pair: LoRAPair) -> str | None:
    """Return why increments cannot be carried beside this layer's base weight, or None."""
    module = pair.module
    if _class_of(pair) not in _PLAIN and not is_quantized(pair):
        return f"{type(module).__name__} layers are not supported"
    if any(map(sharding.is_sharded_alone, pair.factor_modules)):
        return "fully_shard was called on its factors' own modules: call it on the layer or block"
    return _why_not_rebased(pair, _CARRIED_VARIANTS)


def _why_not_rebased(pair: LoRAPair, variants: tuple[type, ...]) -> str | None:
    """Return why re-basing this layer would not preserve its function, or None."""
    module = pair.module
    variant = module.lora_variant.get(pair.adapter)
    # No subclasses: PEFT's variant of an embedding is a subclass of that of a linear layer.
    if variant is not None and type(variant) not in variants:
        return f"{type(variant).__name__} is more than a weight plus a low-rank product"
    for factor in (pair.P_parameter, pair.Q_parameter):
        reason = sharding.why_layout_unsupported(factor)
        if reason is not None:
            return f"of its factors, {reason}"
        plain = type(factor) in _PARAMETERS or sharding.is_sharded(factor)
        if not plain or factor.numel() == 0:
            return "its factors are sharded"
    if sharding.layout(pair.P_parameter) != sharding.layout(pair.Q_parameter):
        return "its factors are sharded differently"
    base = pair.base_layer
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return "PEFT adds the adapter of a MultiheadAttention's out_proj twice"
    if isinstance(module, CONVOLUTIONS):
        return _why_not_convolution(base)
    if isinstance(module, lora_layers.Embedding) and base.max_norm is not None:
        return "max_norm renormalises its base weight"
    if isinstance(module, lora_layers.Embedding) and base.sparse:
        return "its gradients are sparse"
    return None


def _class_of(pair: LoRAPair) -> type[nn.Module]:
    """Return PEFT's class of a layer, sharded or not."""
    return sharding.class_under_sharding(pair.module)


def why_not_measured(pair: LoRAPair) -> str | None:
    """Return why the base's and the adapter's output cannot be told apart by hooks, or None."""
    module = pair.module
    factors = module.lora_embedding_A if pair.is_embedding else module.lora_A
    if pair.adapter not in factors or not hasattr(module, "get_base_layer"):
        return f"{type(module).__name__} layers are not supported"
    base = module.get_base_layer()
    if isinstance(base, (NonDynamicallyQuantizableLinear, nn.MultiheadAttention)):
        return "a MultiheadAttention computes without calling its layers"
    if isinstance(module, ParamWrapper):
        return "target_parameters have no output of their own"
    return None


def _why_not_convolution(base: Any) -> str | None:
    """Return why PEFT's adapter of a convolution is not one matrix beside its weight, or None."""
    if base.groups != 1:
        return "grouped convolutions are not one matrix"
    if base.padding_mode != "zeros":
        return f"PEFT's adapter ignores padding_mode={base.padding_mode!r}"
    if any(step != 1 for step in base.dilation):
        return "PEFT's adapter ignores dilation"
    return None
