"""An adapter as files: tensors by PEFT's names, and the config.

Held by tests/peft_layers/test_adapter_files.py and tests/saving/test_saving.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from scalora.peft_layers.finding import PREFIX, lora_pairs
from scalora.peft_layers.pair import LoRAPair
from scalora.peft_layers.unpacking import put_scales_back

ADAPTER_CONFIG = CONFIG_NAME
"""Name of the file without which nothing loads an adapter."""
ADAPTER_FILE = SAFETENSORS_WEIGHTS_NAME
"""Name of the file with the adapter's tensors."""


def adapter_with_factors(
    model: nn.Module,
    adapter: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    keep_dora: bool = False,
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return an adapter's files with other factors: tensors by PEFT's names, and the config.

    Args:
        model: one of `adapted_models`, which all else in the files (``modules_to_save``, biases) is
            taken from.
        adapter: the adapter's name.
        factors: layer name -> P (m, k), Q (n, k) of the change ``P Q^T``.  A layer that is not
            named keeps its own.
        keep_dora: whether ``P Q^T`` is the product under DoRA's magnitude, which then is kept.
            Otherwise ``P Q^T`` is the whole change of the weight, the magnitude's share included.

    Raises:
        ValueError: a layer that is not in ``factors`` has a LoRA variant, which the config of the
            others cannot express, or PEFT would not load the files.
    """
    adapted: Any = model
    tensors = _own_tensors(model, adapter)
    pairs = lora_pairs(model, adapter)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for pair in pairs:
        pattern = f"^{re.escape(_name_in_patterns(pair))}"
        if pair.name in factors:
            P, Q = factors[pair.name]
            ranks[pattern] = alphas[pattern] = P.shape[-1]
            _put_factors(tensors, pair, P, Q, keep_dora)
            continue
        if pair.has_variant and not keep_dora:
            raise ValueError(
                f"{pair.name!r} has a LoRA variant and cannot be saved as plain LoRA; use "
                "scalora.save_merged."
            )
        ranks[pattern], alphas[pattern] = pair.rank, pair.scaling * pair.rank
    config: Any = copy.deepcopy(adapted.peft_config[adapter])
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    config.use_rslora = False
    config.use_dora = config.use_dora and keep_dora
    config.init_lora_weights = config.inference_mode = True
    for pair in pairs:
        _check_loadable(pair, config, tensors)
    return tensors, config


def _own_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return what PEFT itself would write of an adapter, embeddings left out."""
    found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    put_scales_back(model)
    prefix = "" if isinstance(model, PeftModel) else PREFIX  # PEFT's files always have it
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def _put_factors(
    tensors: dict[str, Tensor], pair: LoRAPair, P: Tensor, Q: Tensor, keep_dora: bool
) -> None:
    """Replace a layer's factors among an adapter's tensors; the scaling then is 1."""
    path, k = f"{PREFIX}{pair.name}", P.shape[-1]
    name_of_P, name_of_Q = _factor_names(pair)
    tensors[name_of_P] = P.reshape(P.shape[0], k, *pair.P_parameter.shape[2:])
    tensors[name_of_Q] = Q.T.reshape(k, *pair.Q_parameter.shape[1:])
    if not keep_dora:
        tensors.pop(f"{path}.lora_magnitude_vector.weight", None)
    bias = f"{path}.lora_B.bias"
    if bias in tensors:
        tensors[bias] = tensors[bias] * pair.scaling


def _factor_names(pair: LoRAPair) -> tuple[str, str]:
    """Return the names of P and Q in an adapter's file."""
    path = f"{PREFIX}{pair.name}"
    if pair.is_embedding:
        return f"{path}.lora_embedding_B", f"{path}.lora_embedding_A"
    return f"{path}.lora_B.weight", f"{path}.lora_A.weight"


def _check_loadable(pair: LoRAPair, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless PEFT would make the layer as large as the factors in the file."""
    name = _name_in_patterns(pair)
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    written = tensors[_factor_names(pair)[0]].shape[1]
    if written * pair.rank != rank * pair.P_parameter.shape[1]:
        raise ValueError(
            f"the adapter of {pair.name!r} cannot be written so that PEFT loads it: it would make "
            f"a layer of rank {rank} for {written} columns. Use scalora.save_merged."
        )


def _name_in_patterns(pair: LoRAPair) -> str:
    """Return the name that PEFT matches ``rank_pattern`` and ``alpha_pattern`` against.

    For ``target_parameters`` that is the parameter's name.  PEFT nests its layers over several
    parameters of one module in one another, under ``base_layer``.
    """
    if not isinstance(pair.module, ParamWrapper):
        return pair.name
    owner = pair.name
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    return f"{owner}.{pair.module.parameter_name}"
