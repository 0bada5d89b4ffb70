"""The demo's model and a batch of its size, with random weights and tokens."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

_BATCH, _TOKENS = 32, 32


def demo_model(device: torch.device) -> PeftModel:
    """MiniLM-L6 with LoRA of r = 8 on all linear layers."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    base = BertForSequenceClassification(config)
    adapter = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(base, adapter).to(device)


def demo_batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (32, 32) and labels (32,)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (_BATCH, _TOKENS), generator=generator)
    return ids.to(device), (ids.sum(1) % 2).to(device)
