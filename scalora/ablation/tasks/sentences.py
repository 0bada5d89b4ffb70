"""Labelled sentences: reading, splitting and batching."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from scalora.ablation.tasks.rows import Row, read_rows

SHIPPED = Path(__file__).parent / "data" / "movie_reviews.csv.gz"

# Ratings run from -4 to 4. Closer to neutral than this, the sign says little.
NEUTRAL = 0.5

# Sentences are sorted by length among this many batches, so that little is padding.
SORTED_BATCHES = 16


@dataclass(frozen=True)
class Sentences:
    """Sentences, and the number of each one's class."""

    texts: list[str]
    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: list[int]) -> Sentences:
        """Return the sentences at these positions."""
        texts = [self.texts[i] for i in indices]
        return Sentences(texts, [self.labels[i] for i in indices], self.classes)


def load_sentences(source: str) -> Sentences:
    """Return the sentences of a file or a data set of the hub, as `read_rows` reads them.

    The columns are `text` (or `sentence`) and either `label`, one class per value, or `rating`:
    positive above zero, negative below, left out near zero. A sentence that occurs twice is taken
    once, so that it cannot be in two splits.

    Raises:
        ValueError: it cannot be read, lacks a column, or has fewer than two classes.
    """
    labelled = {}
    for row in read_rows(source):
        label = read_label(row)
        if label is not None:
            labelled[read_text(row)] = label
    classes = sorted(set(labelled.values()))
    if len(classes) < 2:
        raise ValueError(f"{source}: found the classes {classes}; at least two are needed")
    return Sentences(list(labelled), [classes.index(c) for c in labelled.values()], classes)


def read_text(row: Row) -> str:
    """Return the text of a row."""
    for column in ("text", "sentence"):
        if column in row:
            return str(row[column])
    raise ValueError(f"no column `text` or `sentence` among {sorted(row)}")


def read_label(row: Row) -> str | None:
    """Return the class of a row, or None if its rating is too near neutral to have one."""
    if "label" in row:
        return str(row["label"])
    if "rating" not in row:
        raise ValueError(f"no column `label` or `rating` among {sorted(row)}")
    rating = float(row["rating"])
    if abs(rating) < NEUTRAL:
        return None
    return "positive" if rating > 0 else "negative"


def split(sentences: Sentences, held_out: int, seed: int) -> tuple[Sentences, Sentences]:
    """Return the sentences to train on and those held out, drawn by the seed."""
    if not 0 < held_out < len(sentences):
        raise ValueError(f"{held_out} sentences to hold out of {len(sentences)}")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed)).tolist()
    return sentences.select(order[held_out:]), sentences.select(order[:held_out])


def training_batches(
    sentences: Sentences,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    batch_size: int,
    max_length: int,
    seed: int,
) -> list[BatchEncoding]:
    """Return one batch per step, from as many shuffled epochs as that takes.

    Within stretches of a shuffled epoch sentences are sorted by length; the batches of a stretch
    are shuffled again.
    """
    if batch_size > len(sentences):
        raise ValueError(f"batches of {batch_size}: only {len(sentences)} training sentences")
    encoded = encode(sentences, tokenizer, max_length)
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[dict[str, Any]]] = []
    while len(batches) < steps:
        order = torch.randperm(len(encoded), generator=generator).tolist()
        stretch = batch_size * SORTED_BATCHES
        for start in range(0, len(order), stretch):
            part = [encoded[i] for i in order[start : start + stretch]]
            part.sort(key=lambda example: len(example["input_ids"]))
            cut = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
            full = [batch for batch in cut if len(batch) == batch_size]
            shuffled = torch.randperm(len(full), generator=generator).tolist()
            batches += [full[i] for i in shuffled]
    return [tokenizer.pad(batch, return_tensors="pt") for batch in batches[:steps]]


def held_out_batches(
    sentences: Sentences, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int
) -> list[BatchEncoding]:
    """Return all sentences once, sorted by length."""
    encoded = encode(sentences, tokenizer, max_length)
    encoded.sort(key=lambda example: len(example["input_ids"]))
    cut = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
    return [tokenizer.pad(batch, return_tensors="pt") for batch in cut]


def encode(
    sentences: Sentences, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, Any]]:
    """Return the tokens and the class of every sentence, as a tokenizer pads them."""
    tokens = tokenizer(sentences.texts, truncation=True, max_length=max_length)["input_ids"]
    return [
        {"input_ids": ids, "labels": label}
        for ids, label in zip(tokens, sentences.labels, strict=True)
    ]
