"""The one place that knows PEFT's internals: LoRA layers as pairs of matrices.

PEFT's ``lora_B`` is the derivation's P and ``lora_A`` is Q transposed.  This package translates;
nothing else says "A" or "B".
"""

from peft import PeftModel

from scalora.peft_layers.carried import attach_carry
from scalora.peft_layers.checksums import adapter_checksums, base_checksums, checksums
from scalora.peft_layers.embeddings import (
    forgotten_embeddings,
    saved_embeddings,
    vocabulary_changed,
    weights_in_files,
)
from scalora.peft_layers.finding import (
    active_adapter,
    adapted_models,
    adapter_names,
    all_lora_pairs,
    base_layer_at,
    base_model,
    base_weight_name,
    config_moves_base,
    is_saved_with_adapter,
    lora_pairs,
    moves_base_at_creation,
    peft_model,
    sharing_modules,
    storage_address,
    untie_adapted_weights,
)
from scalora.peft_layers.lookup import FoundLayer, LayerLookup
from scalora.peft_layers.methods.adapter_files import adapter_with_factors
from scalora.peft_layers.methods.copying import copied
from scalora.peft_layers.methods.merging import check_mergeable, merge_and_unload
from scalora.peft_layers.methods.pretrained_methods import (
    complete_checkpoints,
    complete_what_is_saved,
)
from scalora.peft_layers.methods.whole_files import (
    base_weights_at,
    is_without_carry,
    weights_beside_adapter,
    without_notes,
)
from scalora.peft_layers.pair import LoRAPair, dequantized
from scalora.peft_layers.support import is_quantized, why_no_carry, why_not_dense, why_not_measured

__all__ = [
    "FoundLayer",
    "LayerLookup",
    "LoRAPair",
    "PeftModel",
    "active_adapter",
    "adapted_models",
    "adapter_checksums",
    "adapter_names",
    "adapter_with_factors",
    "all_lora_pairs",
    "attach_carry",
    "base_checksums",
    "base_layer_at",
    "base_model",
    "base_weight_name",
    "base_weights_at",
    "check_mergeable",
    "checksums",
    "complete_checkpoints",
    "complete_what_is_saved",
    "config_moves_base",
    "copied",
    "dequantized",
    "forgotten_embeddings",
    "is_quantized",
    "is_saved_with_adapter",
    "is_without_carry",
    "lora_pairs",
    "merge_and_unload",
    "moves_base_at_creation",
    "peft_model",
    "saved_embeddings",
    "sharing_modules",
    "storage_address",
    "untie_adapted_weights",
    "vocabulary_changed",
    "weights_beside_adapter",
    "weights_in_files",
    "why_no_carry",
    "why_not_dense",
    "why_not_measured",
    "without_notes",
]
