"""A Llama-8B's linear layers with LoRA on all of them, of as many decoder blocks as asked for."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

BLOCKS = 32
LAYERS_PER_BLOCK = 7  # with LoRA
RANK = 8
VOCABULARY = 256  # small: nothing is adapted there

_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(blocks: int, device: torch.device, *, small: bool = False) -> PreTrainedModel:
    """Return the model without LoRA, in bfloat16 with random weights.

    Args:
        blocks: how many decoder blocks.
        device: where it is made.
        small: 64 wide instead of 4096, to try a benchmark out.
    """
    sizes: dict[str, Any] = _SMALL if small else _LLAMA_8B
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=blocks, **sizes)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def with_lora(base: PreTrainedModel) -> PeftModel:
    """Return the model with LoRA of r = 8 on all its linear layers, float32 as PEFT makes it."""
    return get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear"))
