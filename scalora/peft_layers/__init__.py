"""The only room that knows PEFT's internals: LoRA layers as pairs of matrices, adapters as files.

PEFT's ``lora_B`` is the derivation's P and ``lora_A`` is Q transposed.  This room translates;
nothing else says "A" or "B".  What PEFT's own methods do to a re-based model is in `methods`.
"""

from peft import PeftConfig, PeftModel

from scalora.peft_layers.adapter_files import ADAPTER_CONFIG, ADAPTER_FILE, adapter_with_factors
from scalora.peft_layers.carried import attach_carry
from scalora.peft_layers.checksums import adapter_checksums, base_checksums, checksums
from scalora.peft_layers.completed_files import (
    base_weights_at,
    is_without_carry,
    weights_in_adapter_file,
    without_notes,
)
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
    one_adapted_model,
    peft_model,
    sharing_modules,
)
from scalora.peft_layers.lookup import FoundLayer, LayerLookup
from scalora.peft_layers.merging import (
    check_mergeable,
    copied,
    merge_and_unload,
    untie_adapted_weights,
)
from scalora.peft_layers.methods import complete_checkpoints, complete_what_is_saved
from scalora.peft_layers.pair import LoRAPair, dequantized
from scalora.peft_layers.support import is_quantized, why_no_carry, why_not_dense, why_not_measured
from scalora.storage import storage_address

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILE",
    "FoundLayer",
    "LayerLookup",
    "LoRAPair",
    "PeftConfig",
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
    "one_adapted_model",
    "peft_model",
    "saved_embeddings",
    "sharing_modules",
    "storage_address",
    "untie_adapted_weights",
    "vocabulary_changed",
    "weights_in_adapter_file",
    "weights_in_files",
    "why_no_carry",
    "why_not_dense",
    "why_not_measured",
    "without_notes",
]
