"""The one place that knows PEFT's internals: LoRA layers as pairs of matrices.

PEFT's ``lora_B`` is the derivation's P and ``lora_A`` is Q transposed.  This module translates;
nothing else in the package says "A" or "B".
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import layer as lora_layers
from peft.tuners.lora import variants as lora_variants
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

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
_MOVING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")
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
        """Whether the layer is an embedding, whose factors PEFT keeps elsewhere."""
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
        """The adapter's r."""
        return int(self.module.r[self.adapter])

    @property
    def is_merged(self) -> bool:
        """Whether an adapter is merged into the base, which then is not W0."""
        return bool(self.module.merged)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The weight the layer computes with, as stored, float32 at least."""
        base = self.base_weight.detach().to(
            torch.promote_types(self.base_weight.dtype, torch.float32)
        )
        variant = self.module.lora_variant.get(self.adapter)
        if self.is_merged:
            return base.clone()
        if variant is None:
            # PEFT's own product is rounded to the factors' dtype.
            P = self.P_parameter.to(base.dtype).flatten(1)
            product = self.scaling * (P @ self.Q_parameter.to(base.dtype).flatten(1))
            return base + (product.T if self.base_is_transposed else product.view(base.shape))
        merged = variant.merge_safe(self.module, self.adapter, base.clone())
        self.module._caches.clear()
        return merged

    @property
    def runs(self) -> bool:
        """Whether the layer's output has this adapter's contribution in it now."""
        module = self.module
        return not module.disable_adapters and self.adapter in module.active_adapters

    def rows(self, outputs: Tensor) -> Tensor:
        """The base layer's outputs as (positions, m): a convolution's have the channels inside."""
        if isinstance(self.module, _CONVOLUTIONS):
            outputs = outputs.movedim(1, -1)
        return outputs.flatten(0, -2)

    def code(self, inputs: Tensor, index: Tensor) -> Tensor:
        """(k, r): what ``Q^T`` makes of the inputs at those positions, without dropout, float32."""
        if isinstance(self.module, _CONVOLUTIONS):
            # Not `mapped`: where the base is dilated or grouped, the adapter is not.
            convolution = self.module.lora_A[self.adapter]
            codes = self.rows(convolution(inputs.to(convolution.weight.dtype)))
            return codes.index_select(0, index).float()
        return self.mapped(self.Q_parameter.float(), inputs, index)

    def mapped(self, matrix: Tensor, inputs: Tensor, index: Tensor) -> Tensor:
        """(k, d): a matrix (d, n) times the inputs at those positions, float32.

        A convolution's inputs are the patches that its base layer sees.
        """
        if isinstance(self.module, _CONVOLUTIONS):
            base = self.module.get_base_layer()
            kernel = matrix.reshape(-1, *base.weight.shape[1:])
            images = base._conv_forward(inputs.float(), kernel, None)
            return self.rows(images).index_select(0, index)
        if self.is_embedding:
            return matrix.T[inputs.flatten().index_select(0, index)]
        return inputs.flatten(0, -2).index_select(0, index).float() @ matrix.T

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A stored base weight as (m, n)."""
        return weight.T if self.base_is_transposed else weight.flatten(1)

    def mark_rebased(self) -> None:
        """Note on the layer itself that its base has taken in increments."""
        self.module.scalora_rebased = True

    @property
    def was_rebased(self) -> bool:
        """Whether increments have been folded into the layer's base."""
        return bool(getattr(self.module, "scalora_rebased", False))


def lora_pairs(model: nn.Module, adapter: str) -> list[LoRAPair]:
    """All LoRA layers of ``model`` that hold ``adapter``, whether they can be re-based or not."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, lora_layers.LoraLayer) and adapter in module.r
    ]
    short = [_layer_name(name) for name, _ in found]
    # Two PEFT models in one module may have layers of one name.
    names = short if len(set(short)) == len(short) else [name for name, _ in found]
    return [LoRAPair(name, module, adapter) for name, (_, module) in zip(names, found, strict=True)]


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


def active_adapter(model: nn.Module) -> str:
    """Name of the active LoRA adapter.

    Raises:
        ValueError: none or several are active.
    """
    active = {
        name
        for module in model.modules()
        if isinstance(module, lora_layers.LoraLayer)
        for name in module.active_adapters
        if name in module.r
    }
    if len(active) != 1:
        raise ValueError(
            f"one LoRA adapter must be active, found {sorted(active)}; pass adapter_name."
        )
    return active.pop()


def base_weight_name(name: str) -> str:
    """A weight's name in the model under PEFT's wrapper."""
    return _layer_name(name).replace(".base_layer.", ".")


def base_model(model: nn.Module) -> nn.Module:
    """The model that the adapter was put on, LoRA layers inside."""
    wrapped = peft_model(model)
    return model if wrapped is None else wrapped.get_base_model()


def moves_base_at_creation(model: nn.Module, adapter: str) -> bool:
    """Whether PEFT's initialisation of the adapter took its product out of the base weights."""
    wrapped = peft_model(model)
    config: Any = None if wrapped is None else wrapped.peft_config.get(adapter)
    return str(getattr(config, "init_lora_weights", "")).startswith(_MOVING_INITIALISATIONS)


def why_not_rebased(pair: LoRAPair) -> str | None:
    """Why re-basing this layer would not preserve its function, or None if it would."""
    module = pair.module
    if type(module) not in _SUPPORTED:
        return f"{type(module).__name__} layers are not supported"
    variant = module.lora_variant.get(pair.adapter)
    if variant is not None and not isinstance(variant, _PRESERVED_VARIANTS):
        return f"{type(variant).__name__} is more than a weight plus a low-rank product"
    base = module.get_base_layer()
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return "PEFT adds the adapter of a MultiheadAttention's out_proj twice"
    weight = base._parameters.get("weight")
    if weight is None:
        return "its base weight is computed from others (a parametrization)"
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in _FLOATS:
        return "its base weight is quantized or sharded"
    if weight.numel() == 0:
        return "its base weight is sharded"
    if weight.device.type == "meta":
        return "its base weight is offloaded"
    if isinstance(module, _CONVOLUTIONS):
        return _why_not_convolution(base)
    if isinstance(module, lora_layers.Embedding) and base.max_norm is not None:
        return "max_norm renormalises its base weight"
    if isinstance(module, lora_layers.Embedding) and base.sparse:
        return "its gradients are sparse"
    return None


def why_not_measured(pair: LoRAPair) -> str | None:
    """Why the layer's two paths cannot be seen apart from outside, or None if they can."""
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


@torch.no_grad()
def base_checksums(pairs: Sequence[LoRAPair]) -> dict[str, int]:
    """Layer name -> sum of the base weight's bits.  Waits for the device once."""
    return checksums({pair.name: pair.base_weight for pair in pairs})


@torch.no_grad()
def adapter_checksums(pairs: Sequence[LoRAPair]) -> dict[str, int]:
    """``lora_B:`` or ``lora_A:`` and the layer's name -> sum of the factor's bits in float32.

    PEFT loads half-precision adapters as float32: their values are what counts.  Waits for the
    device once.
    """
    factors: dict[str, Tensor] = {f"lora_B:{pair.name}": pair.P_parameter for pair in pairs}
    factors |= {f"lora_A:{pair.name}": pair.Q_parameter for pair in pairs}
    return checksums({name: factor.float() for name, factor in factors.items()})


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> sum of the tensor's bits.  Waits for the device once."""
    if not tensors:
        return {}
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        t.detach().view(words[t.element_size()]).sum(dtype=torch.int64) for t in tensors.values()
    ]
    return dict(
        zip(tensors, torch.stack([s.to(sums[0].device) for s in sums]).tolist(), strict=True)
    )


def peft_model(model: nn.Module) -> PeftModel | None:
    """The PeftModel in ``model`` (itself, or inside a wrapper such as DDP), if there is one."""
    return next((module for module in model.modules() if isinstance(module, PeftModel)), None)


def adapter_with_factors(
    model: PeftModel, adapter: str, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter's files with other factors in it: tensors by PEFT's names, and the config.

    Args:
        model: where everything else (``modules_to_save``, biases) comes from.
        adapter: its name.
        factors: layer name -> P (m, k), Q (n, k), the change being ``P Q^T``.  A layer that is not
            named keeps its own.

    Raises:
        ValueError: such a layer has a LoRA variant, which the others' config cannot express.
    """
    config: Any = copy.deepcopy(model.peft_config[adapter])
    tensors = dict(
        get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    )
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for pair in lora_pairs(model, adapter):
        pattern = f"^{re.escape(pair.name)}"
        if pair.name not in factors:
            if adapter in pair.module.lora_variant:
                raise ValueError(
                    f"{pair.name!r} has a LoRA variant and cannot be saved as plain LoRA; use "
                    "scalora.save_merged."
                )
            ranks[pattern], alphas[pattern] = pair.rank, pair.scaling * pair.rank
            continue
        P, Q = factors[pair.name]
        k = P.shape[-1]
        ranks[pattern] = alphas[pattern] = k
        if pair.is_embedding:
            names = (
                f"{_PREFIX}{pair.name}.lora_embedding_B",
                f"{_PREFIX}{pair.name}.lora_embedding_A",
            )
        else:
            names = (f"{_PREFIX}{pair.name}.lora_B.weight", f"{_PREFIX}{pair.name}.lora_A.weight")
        tensors[names[0]] = P.reshape(P.shape[0], k, *pair.P_parameter.shape[2:])
        tensors[names[1]] = Q.T.reshape(k, *pair.Q_parameter.shape[1:])
        tensors.pop(f"{_PREFIX}{pair.name}.lora_magnitude_vector.weight", None)
        bias = f"{_PREFIX}{pair.name}.lora_B.bias"
        if bias in tensors:
            tensors[bias] = tensors[bias] * pair.scaling
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    config.use_rslora = config.use_dora = False
    config.init_lora_weights = config.inference_mode = True
    return tensors, config


def warn_when_saved_alone(model: nn.Module) -> None:
    """Make ``save_pretrained`` of a re-based PeftModel say what it leaves out."""
    wrapped = peft_model(model)
    if wrapped is None or "save_pretrained" in vars(wrapped):
        return
    wrapped.save_pretrained = _SavePretrained(wrapped)


def trust_checkpoints(model: nn.Module) -> None:
    """Say nothing when a Trainer's checkpoint is written: a callback completes it."""
    warn_when_saved_alone(model)
    wrapped = peft_model(model)
    if wrapped is not None:
        wrapped.save_pretrained.checkpoints_are_completed = True


class _SavePretrained:
    """``PeftModel.save_pretrained`` with a warning.

    An object, not a bound method: pickle would restore that as the method of the class.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.checkpoints_are_completed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        folder = Path(str(args[0] if args else kwargs.get("save_directory", "")))
        if not (self.checkpoints_are_completed and re.fullmatch(r"checkpoint-\d+", folder.name)):
            # With the folder, or Python would show it once for all that a Trainer saves.
            warnings.warn(
                f"save_pretrained writes the adapter alone to {str(folder)!r}, but ScaLoRA has "
                "folded part of what was learned into the base weights: loaded on the original "
                "base, this adapter is not your model. Call scalora.save_merged(model, path) or "
                "scalora.save_adapter(model, path, base=...) instead.",
                UserWarning,
                stacklevel=2,
            )
        return type(self.model).save_pretrained(self.model, *args, **kwargs)
