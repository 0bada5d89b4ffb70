"""A small Llama over bytes, pretrained once and kept in a file."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from scalora.ablation.tasks.evaluation import evaluating
from scalora.files import read_tensors, write_tensors

Pair = tuple[Tensor, Tensor]
"""Bytes and labels, (batch, length) each."""

_RISE = 50
"""Pretraining steps until the learning rate peaks; from there it falls to zero."""


@dataclass(frozen=True)
class ByteLlama:
    """Sizes of a Llama with one token per byte.

    Attributes:
        width, intermediate, layers, heads: as of ``LlamaConfig``.
        context: most bytes that it reads at once.
        spread: standard deviation of the new weights.
    """

    width: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    context: int = 128
    spread: float = 0.02

    def build(self, seed: int = 0) -> LlamaForCausalLM:
        """Return a model with new weights, float32 on the CPU; torch's generator does not move."""
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.context,
            initializer_range=self.spread,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)


def text_bytes(text: str) -> Tensor:
    """Return the text's bytes in UTF-8, (bytes,), int64."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return pieces (count, length) of a text (bytes,), each from a random start."""
    starts = torch.randint(0, len(text) - length + 1, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length)]


def language_loss(model: nn.Module, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the mean loss of the next token, () nats.

    Args:
        model: a causal language model.
        tokens: (batch, length).
        labels: the same, with -100 where a token does not count; by default all count.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    loss: Tensor = model(
        input_ids=tokens, labels=tokens if labels is None else labels.to(device)
    ).loss
    return loss


def mean_loss(model: nn.Module, batches: list[Tensor]) -> float:
    """Return the mean over batches of `language_loss`, nats per token, in evaluation mode."""
    with evaluating(model):
        losses = [language_loss(model, batch) for batch in batches]
        return torch.stack(losses).mean().item()


def pretrained_once(
    cache: Path, shape: ByteLlama, batches: Sequence[Tensor | Pair], learning_rate: float
) -> dict[str, Tensor]:
    """Return the weights after one pass over the batches, from the cache if it has them.

    The file's name is a digest of everything that the weights depend on. The file is written
    elsewhere and moved into place: processes that race do the work twice and leave one whole file.

    Args:
        cache: a folder, made if it is missing.
        shape: the model's sizes.
        batches: (batch, length) bytes each, or bytes and their labels.
        learning_rate: AdamW's, at its peak.
    """
    told = json.dumps([asdict(shape), learning_rate, _RISE, len(batches)], sort_keys=True)
    digest = hashlib.sha256(told.encode())
    for batch in batches:
        for part in _parts(batch):
            digest.update(part.numpy().tobytes())
    file = cache / f"pretrained-{digest.hexdigest()[:16]}.safetensors"
    if not file.is_file():
        weights = _pretrain(shape, batches, learning_rate)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pretrained-", dir=cache) as own:
            beside = Path(own) / file.name
            write_tensors(beside, weights, {"learned": told})
            beside.replace(file)
    return read_tensors(file)[0]


def _parts(batch: Tensor | Pair) -> tuple[Tensor, ...]:
    return (batch,) if isinstance(batch, Tensor) else batch


def _pretrain(
    shape: ByteLlama, batches: Sequence[Tensor | Pair], learning_rate: float
) -> dict[str, Tensor]:
    model = shape.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / _RISE) * (1 - step / len(batches))
    )
    for batch in batches:
        optimizer.zero_grad()
        language_loss(model, *_parts(batch)).backward()
        optimizer.step()
        schedule.step()
    return dict(model.state_dict())
