"""An adapter as files: tensors by PEFT's names, and the config."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from scalora.peft_layers.finding import PREFIX, lora_pairs
from scalora.peft_layers.pair import LoRAPair
from scalora.peft_layers.unpacking import put_scales_back


def adapter_with_factors(
    model: nn.Module,
    adapter: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    keep_dora: bool = False,
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter's files with other factors in it: tensors by PEFT's names, and the config.

    Args:
        model: one of `adapted_models`; everything else (``modules_to_save``, biases) is its.
        adapter: its name.
        factors: layer name -> P (m, k), Q (n, k), the change being ``P Q^T``.  A layer that is not
            named keeps its own.
        keep_dora: whether ``P Q^T`` is the product under DoRA's magnitude, which is kept, and not
            the change of the weight, which it is part of.

    Raises:
        ValueError: such a layer has a LoRA variant, which the others' config cannot express.
    """
    adapted: Any = model
    config: Any = copy.deepcopy(adapted.peft_config[adapter])
    found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    put_scales_back(model)
    prefix = "" if isinstance(model, PeftModel) else PREFIX  # which PEFT's files have
    tensors = {f"{prefix}{name}": tensor for name, tensor in found.items()}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for pair in lora_pairs(model, adapter):
        pattern = f"^{re.escape(_name_in_patterns(pair))}"
        if pair.name not in factors:
            if pair.has_variant and not keep_dora:
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
                f"{PREFIX}{pair.name}.lora_embedding_B",
                f"{PREFIX}{pair.name}.lora_embedding_A",
            )
        else:
            names = (f"{PREFIX}{pair.name}.lora_B.weight", f"{PREFIX}{pair.name}.lora_A.weight")
        tensors[names[0]] = P.reshape(P.shape[0], k, *pair.P_parameter.shape[2:])
        tensors[names[1]] = Q.T.reshape(k, *pair.Q_parameter.shape[1:])
        if not keep_dora:
            tensors.pop(f"{PREFIX}{pair.name}.lora_magnitude_vector.weight", None)
        bias = f"{PREFIX}{pair.name}.lora_B.bias"
        if bias in tensors:
            tensors[bias] = tensors[bias] * pair.scaling
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    config.use_rslora = False
    config.use_dora = config.use_dora and keep_dora
    config.init_lora_weights = config.inference_mode = True
    for pair in lora_pairs(model, adapter):
        _check_found(pair, config, tensors)
    return tensors, config


def _check_found(pair: LoRAPair, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless PEFT makes the layer of this config as large as the factors that are loaded."""
    name = _name_in_patterns(pair)
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    leaf = "lora_embedding_B" if pair.is_embedding else "lora_B.weight"
    written = tensors[f"{PREFIX}{pair.name}.{leaf}"].shape[1]
    if written * pair.rank != rank * pair.P_parameter.shape[1]:
        raise ValueError(
            f"the adapter of {pair.name!r} cannot be written so that PEFT loads it: it would make "
            f"a layer of rank {rank} for {written} columns. Use scalora.save_merged."
        )


def _name_in_patterns(pair: LoRAPair) -> str:
    """What PEFT matches ``rank_pattern`` and ``alpha_pattern`` against.

    Of ``target_parameters`` that is the parameter's name.  PEFT's layers over several of one module
    are inside one another there, under ``base_layer``.
    """
    if not isinstance(pair.module, ParamWrapper):
        return pair.name
    owner = pair.name
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    return f"{owner}.{pair.module.parameter_name}"
