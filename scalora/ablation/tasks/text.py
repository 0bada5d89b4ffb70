"""A user's own causal language model and text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoTokenizer

from scalora.ablation.task import Split, Task
from scalora.ablation.tasks.byte_llama import language_loss, mean_loss
from scalora.ablation.tasks.documents import packed, read_documents, split_documents
from scalora.transformers_models import model_class, pretrained_model


class Text(Task):
    """Fine-tune a causal language model on text: blocks of 128 tokens, packed.

    A tenth of the documents validates and a tenth tests; no document is in two splits, and blocks
    are cut within a split.

    Scores: ``loss``, nats per token, on at most 60 batches of 8 blocks (``quick``: the first 10).

    Args:
        model: a folder or a hub id.
        data: a .txt, .csv or .jsonl file (column ``text``), a folder of them, or a data set of the
            hub.
        source: text of the same kinds like that of pretraining, to measure forgetting with.
    """

    name = "text"
    steps = 300
    short_steps = 30
    learning_rates = (1e-4, 3e-4, 1e-3, 3e-3)
    rank = 8
    task_type = "CAUSAL_LM"

    batch_size: ClassVar[int] = 8
    """Blocks per batch."""

    length: ClassVar[int] = 128
    """Most tokens per block; fewer where the model reads no more or a split is shorter."""

    def __init__(self, model: str, data: str, source: str | None = None) -> None:
        self._model, self._data, self._source = model, data, source

    def model(self, seed: int) -> nn.Module:
        """Return the pretrained model in float32; nothing in it is drawn by the seed."""
        kind = model_class(LoraConfig(task_type=self.task_type))
        model, lacking = pretrained_model(kind, self._model, dtype=torch.float32)
        if lacking:
            raise ValueError(f"{self._model} is no whole language model: it lacks {min(lacking)}")
        return model

    def batches(self, seed: int, steps: int) -> Iterator[Tensor]:
        """Yield shuffled epochs of the training blocks: (8, 128) tokens."""
        blocks = self._blocks["train"]
        generator = torch.Generator().manual_seed(1000 + seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            while len(order) < self.batch_size:
                order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
            yield blocks[order[: self.batch_size]]
            order = order[self.batch_size :]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean loss of the next token, () nats."""
        return language_loss(model, batch)

    def score(self, model: nn.Module, split: Split, *, quick: bool = False) -> dict[str, float]:
        """Return the loss, nats per token, on blocks of held-out documents."""
        return {"loss": mean_loss(model, self._held_out(split)[: 10 if quick else 60])}

    def source_loss(self, model: nn.Module) -> float | None:
        """Return the loss, nats per token, on the source text, if there is one."""
        if self._source is None:
            return None
        return mean_loss(model, self._held_out("source")[:30])

    def probes(self) -> list[Tensor]:
        """Return up to four validation batches of blocks."""
        return self._held_out("validation")[:4]

    def _held_out(self, split: str) -> list[Tensor]:
        return list(self._blocks[split].split(self.batch_size))

    @cached_property
    def _blocks(self) -> dict[str, Tensor]:
        tokenizer: Any = AutoTokenizer.from_pretrained(self._model)
        parts = split_documents(read_documents(self._data))
        if self._source is not None:
            parts["source"] = read_documents(self._source)
        # A tokenizer that knows of no limit has one of 1e30.
        length = min(self.length, tokenizer.model_max_length)
        return {name: packed(part, tokenizer, length) for name, part in parts.items()}
