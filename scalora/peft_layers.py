"""The one place that knows PEFT's internals: LoRA layers as pairs of matrices.

PEFT's ``lora_B`` is the derivation's P and ``lora_A`` is Q transposed.  This module translates;
nothing else in the package says "A" or "B".
"""

from __future__ import annotations

import types
import warnings
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora import layer as lora_layers
from peft.tuners.lora import variants as lora_variants
from torch import Tensor, nn

_CONVOLUTIONS = (lora_layers.Conv1d, lora_layers.Conv2d, lora_layers.Conv3d)
_SUPPORTED = (lora_layers.Linear, lora_layers.Embedding, *_CONVOLUTIONS)
_PRESERVED_VARIANTS = (
    lora_variants.DoraLinearVariant,
    lora_variants.DoraEmbeddingVariant,
    lora_variants.DoraConv1dVariant,
    lora_variants.DoraConv2dVariant,
    lora_variants.DoraConv3dVariant,
)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRAPair:
    """One adapter of one LoRA layer.  It holds the module and looks tensors up when asked.

    Attributes:
        name: the module's name in the model that the adapter was put on.
        module: PEFT's layer.
        adapter: the adapter's name.
    """

    name: str
    module: Any
    adapter: str

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.module, lora_layers.Embedding)

    @property
    def P_parameter(self) -> nn.Parameter:
        """``lora_B``: (m, r) followed by ones (convolutions); axis 1 is the rank's."""
        if self.is_embedding:
            return self.module.lora_embedding_B[self.adapter]
        return self.module.lora_B[self.adapter].weight

    @property
    def Q_parameter(self) -> nn.Parameter:
        """``lora_A``: (r, n), or (r, in, *kernel) for convolutions; axis 0 is the rank's."""
        if self.is_embedding:
            return self.module.lora_embedding_A[self.adapter]
        return self.module.lora_A[self.adapter].weight

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight as its layer stores it."""
        return self.module.get_base_layer().weight

    @property
    def base_is_transposed(self) -> bool:
        """Whether the frozen weight is stored (n, m): GPT-2's Conv1D, and embeddings."""
        return self.is_embedding or bool(getattr(self.module, "fan_in_fan_out", False))

    @property
    def scaling(self) -> float:
        """PEFT's ``s``."""
        return float(self.module.scaling[self.adapter])

    @property
    def rank(self) -> int:
        return int(self.module.r[self.adapter])

    @property
    def is_merged(self) -> bool:
        """Whether an adapter is merged into the base, which then is not W0."""
        return bool(self.module.merged)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The weight the layer computes with, as stored, float32 at least, by PEFT's own merging."""
        base = self.base_weight.detach().to(torch.promote_types(self.base_weight.dtype, torch.float32))
        variant = self.module.lora_variant.get(self.adapter)
        if self.is_merged:
            return base.clone()
        if variant is None:
            return base + self.module.get_delta_weight(self.adapter).to(base.dtype)
        merged = variant.merge_safe(self.module, self.adapter, base.clone())
        self.module._caches.clear()
        return merged

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A stored base weight as (m, n)."""
        return weight.T if self.base_is_transposed else weight.flatten(1)

    def mark_rebased(self) -> None:
        """Note on the layer itself that its base has taken in increments."""
        self.module.scalora_rebased = True

    @property
    def was_rebased(self) -> bool:
        return bool(getattr(self.module, "scalora_rebased", False))


def lora_pairs(model: nn.Module, adapter: str) -> list[LoRAPair]:
    """All LoRA layers of ``model`` that hold ``adapter``, whether they can be re-based or not."""
    return [
        LoRAPair(_layer_name(name), module, adapter)
        for name, module in model.named_modules()
        if isinstance(module, lora_layers.LoraLayer) and adapter in module.r
    ]


def _layer_name(module_name: str) -> str:
    """The name in the model under PEFT's and any other wrapper's."""
    return module_name.partition(_PREFIX)[2] or module_name


def adapter_names(model: nn.Module) -> set[str]:
    """Names of every LoRA adapter in ``model``."""
    return {
        name
        for module in model.modules()
        if isinstance(module, lora_layers.LoraLayer)
        for name in module.r
    }


def why_not_rebased(pair: LoRAPair) -> str | None:
    """Why this layer must stay plain LoRA, or None: re-basing it would not preserve its function."""
    module = pair.module
    if type(module) not in _SUPPORTED:
        return f"{type(module).__name__} layers are not supported"
    variant = module.lora_variant.get(pair.adapter)
    if variant is not None and not isinstance(variant, _PRESERVED_VARIANTS):
        return f"{type(variant).__name__} is more than a weight plus a low-rank product"
    base = module.get_base_layer()
    weight = base._parameters.get("weight")
    if weight is None:
        return "its base weight is computed from others (a parametrization)"
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in _FLOATS:
        return "its base weight is quantized or sharded"
    if weight.device.type == "meta":
        return "its base weight is offloaded"
    if isinstance(module, _CONVOLUTIONS):
        return _why_not_convolution(base)
    if isinstance(module, lora_layers.Embedding) and base.max_norm is not None:
        return "max_norm renormalises its base weight"
    if isinstance(module, lora_layers.Embedding) and base.sparse:
        return "its gradients are sparse"
    return None


def _why_not_convolution(base: Any) -> str | None:
    if base.groups != 1:
        return "grouped convolutions are not one matrix"
    if base.padding_mode != "zeros":
        return f"PEFT's adapter ignores padding_mode={base.padding_mode!r}"
    if any(step != 1 for step in base.dilation):
        return "PEFT's adapter ignores dilation"
    return None


def sharing_modules(model: nn.Module) -> dict[int, list[str]]:
    """Address of each parameter's storage -> names of the modules that use it."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.device.type != "meta":
                users.setdefault(storage_address(parameter), []).append(_layer_name(name))
    return users


def storage_address(tensor: Tensor) -> int:
    """Where the tensor's memory begins: equal for tied weights."""
    return tensor.untyped_storage().data_ptr()


def peft_model(model: nn.Module) -> peft.PeftModel | None:
    """The PeftModel in ``model`` (itself, or inside a wrapper such as DDP), if there is one."""
    return next((module for module in model.modules() if isinstance(module, peft.PeftModel)), None)


def warn_when_saved_alone(model: nn.Module) -> None:
    """Make ``save_pretrained`` of a re-based PeftModel say what it leaves out."""
    wrapped = peft_model(model)
    if wrapped is None or "save_pretrained" in vars(wrapped):
        return
    wrapped.save_pretrained = types.MethodType(save_pretrained, wrapped)  # type: ignore[method-assign]


def save_pretrained(self: peft.PeftModel, *args: Any, **kwargs: Any) -> Any:
    """``PeftModel.save_pretrained`` with a warning.

    Its name is its method's: a bound function so named survives copying and pickling.
    """
    warnings.warn(
        "save_pretrained writes the adapter alone, but ScaLoRA has folded part of what was learned "
        "into the base weights: loaded on the original base, this adapter is not your model. Call "
        "scalora.save_merged(model, path) or scalora.save_adapter(model, path, base=...) instead. "
        "(Checkpoints that a Trainer writes with ScaLoRACallback are complete.)",
        UserWarning,
        stacklevel=2,
    )
    return type(self).save_pretrained(self, *args, **kwargs)
