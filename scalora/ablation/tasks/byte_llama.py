"""A small Llama that reads bytes: made, pretrained once, kept in a file."""

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
"""Pretraining steps until the learning rate is at its highest; it falls to zero from there."""


@dataclass(frozen=True)
class ByteLlama:
    """The sizes of a Llama with a token for every byte; 4 layers of width 128 unless said.

    context: the most bytes that it reads at once; spread: standard deviation of the new weights.
    """

    width: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    context: int = 128
    spread: float = 0.02

    def build(self, seed: int = 0) -> LlamaForCausalLM:
        """Return a model with new weights, float32 on the CPU; torch's own generator is kept."""
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
    """The text in UTF-8: (bytes,), int64."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Pieces of a text (bytes,) that start anywhere: (count, length)."""
    starts = torch.randint(0, len(text) - length + 1, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(length)]


def language_loss(model: nn.Module, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean loss of the next byte, () nats.

    tokens: (batch, length); labels: as they are, -100 where a byte does not count; by default all
    bytes count.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    loss: Tensor = model(
        input_ids=tokens, labels=tokens if labels is None else labels.to(device)
    ).loss
    return loss


def mean_loss(model: nn.Module, batches: list[Tensor]) -> float:
    """Mean over batches of `language_loss`, nats a byte, in evaluation mode."""
    with evaluating(model):
        losses = [language_loss(model, batch) for batch in batches]
        return torch.stack(losses).mean().item()


def pretrained_weights(
    cache: Path, shape: ByteLlama, batches: Sequence[Tensor | Pair], learning_rate: float
) -> dict[str, Tensor]:
    """The weights after a pass over the batches: from the folder, or made now and kept there.

    The file's name tells of everything that they depend on, so what is found is what was asked for.
    It is written beside its place and moved there: processes that race do the work twice and leave
    one whole file.

    cache: a folder, made if it is not there; batches: (batch, length) bytes each, or bytes and
    their labels.
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
