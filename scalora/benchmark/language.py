"""A small language model that moves from English to Python: does a rule keep up with plain LoRA?"""

from __future__ import annotations

import statistics
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import scalora
from scalora.benchmark.table import markdown

_BATCH, _BYTES = 16, 96
_PRETRAINING, _STEPS, _WARM_UP = 1200, 300, 20
_RATES = (3e-3, 1e-2)
_CASES: list[tuple[str, dict[str, Any]]] = [
    ("plain LoRA", {"rule": "none"}),
    ("auto", {}),
    ("exact", {"rule": "exact"}),
    ("exact, interval=10", {"rule": "exact", "interval": 10}),
    ("direction", {"rule": "direction"}),
]


def run(device: torch.device) -> str:
    """A 4-layer Llama of width 128 over bytes, r = 4 on all linears, AdamW, one seed.

    Pretrained on the English of Python's own help texts, then fine-tuned on its standard library's
    sources: held-out loss in nats a byte.
    """
    english = _bytes("\n".join(topics[name] for name in sorted(topics)))
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    python = _bytes("".join(path.read_text("utf-8", "replace") for path in sources))[:4_000_000]
    train, held_out = python[:-500_000], python[-500_000:]
    pretrained = _pretrained(english, device)
    rows = []
    for name, options in _CASES:
        losses = [_fine_tuned(pretrained, train, held_out, lr, options, device) for lr in _RATES]
        rows.append([name, *(f"{loss:.3f}" for loss in losses)])
    return markdown(["rule", *(f"lr {lr:g}" for lr in _RATES)], rows)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def _model(device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).to(device)


def _batch(text: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    starts = torch.randint(0, len(text) - _BYTES, (_BATCH,), generator=generator)
    return torch.stack([text[start : start + _BYTES] for start in starts]).to(device)


def _pretrained(text: Tensor, device: torch.device) -> dict[str, Tensor]:
    model, generator = _model(device), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / _PRETRAINING)
    )
    for _ in range(_PRETRAINING):
        batch = _batch(text, generator, device)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    return dict(model.state_dict())


def _fine_tuned(
    pretrained: dict[str, Tensor],
    train: Tensor,
    held_out: Tensor,
    lr: float,
    options: dict[str, Any],
    device: torch.device,
) -> float:
    base = _model(device)
    base.load_state_dict(pretrained)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    optimizer = scalora.create_scalora_optimizer(
        model, torch.optim.AdamW, lr=lr, weight_decay=0, **options
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / _WARM_UP)
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(_STEPS):
        batch = _batch(train, generator, device)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        batches = [_batch(held_out, generator, device) for _ in range(40)]
        return statistics.fmean(model(input_ids=b, labels=b).loss.item() for b in batches)
