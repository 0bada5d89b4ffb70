"""Demo's model and a batch of its size, with random weights and tokens."""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig

_BATCH, _TOKENS = 32, 32


def demo_model(device: torch.device) -> PeftModel:
    """Return MiniLM-L6 with LoRA of r = 8 on all linear layers."""
    base = _base()
    adapter = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(base, adapter).to(device)


def quantized_demo_model(device: torch.device) -> PeftModel:
    """Return the same encoder in NF4, double quantization, computing in float32, for QLoRA.

    The two layers of the head are not quantized, and are frozen.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["pooler", "classifier"],
    )
    with tempfile.TemporaryDirectory() as folder:
        _base().save_pretrained(folder)
        base = BertForSequenceClassification.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.float32, device_map={"": device}
        )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    encoder = r".*encoder\.layer.*\.(query|key|value|dense)"
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=encoder)
    return get_peft_model(base, adapter).to(device)


def _base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return BertForSequenceClassification(config)


def demo_batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids (32, 32) and labels (32,)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (_BATCH, _TOKENS), generator=generator)
    return ids.to(device), (ids.sum(1) % 2).to(device)
