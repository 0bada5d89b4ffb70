"""A language model that moves from English to Python."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import ClassVar

import torch
from torch import Tensor, nn

from scalora.ablation.task import Split, Task
from scalora.ablation.tasks.byte_llama import (
    ByteLlama,
    language_loss,
    mean_loss,
    pretrained_once,
    text_bytes,
    windows,
)

_BATCH, _BYTES = 16, 96
_SHAPE = ByteLlama()


class DomainShift(Task):
    """A 4-layer Llama of width 128 over bytes, from the English of Python's help texts to Python.

    It is pretrained on English alone and fine-tuned on the sources at the top of the standard
    library. The splits are by file: CRC-32 of the file's name modulo 16 is 0 for the test files and
    1 for the validation files; all others train. So no file is in two splits, and a file stays in
    its split when another version of Python adds some. English is split by topic in the same way,
    modulo 12.

    Scores: ``loss``, nats per byte, on 60 fixed batches of 16 x 96 bytes of the split (``quick``:
    the first 10 of them).
    """

    name = "domain-shift"
    steps = 1500
    short_steps = 150
    learning_rates: ClassVar[tuple[float, ...]] = (2e-3, 5e-3, 1e-2, 2e-2, 6e-2)
    rank = 4

    pretraining_steps: ClassVar[int] = 1200
    """Batches of 16 x 96 bytes of English, at a learning rate of 2e-3."""

    def prepare(self, cache: Path) -> None:
        """Pretrain on English, once: about a minute."""
        generator = torch.Generator().manual_seed(0)
        english = english_text("train")
        batches = [
            windows(english, _BATCH, _BYTES, generator) for _ in range(self.pretraining_steps)
        ]
        self._weights = pretrained_once(cache, _SHAPE, batches, learning_rate=2e-3)

    def model(self, seed: int) -> nn.Module:
        """Return the pretrained model; nothing in it is drawn by the seed."""
        model = _SHAPE.build()
        model.load_state_dict(self._weights)
        return model

    def batches(self, seed: int, steps: int) -> Iterator[Tensor]:
        """Yield pieces of the training files that start anywhere: (16, 96) bytes."""
        generator = torch.Generator().manual_seed(1000 + seed)
        for _ in range(steps):
            yield windows(self._python["train"], _BATCH, _BYTES, generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean loss of the next byte, () nats."""
        return language_loss(model, batch)

    def score(self, model: nn.Module, split: Split, *, quick: bool = False) -> dict[str, float]:
        """Return the loss, nats per byte, on fixed batches of held-out files."""
        batches = self._fixed(self._python[split], 60)
        return {"loss": mean_loss(model, batches[:10] if quick else batches)}

    def source_loss(self, model: nn.Module) -> float:
        """Return the loss, nats per byte, on English that was held out of pretraining."""
        return mean_loss(model, self._fixed(english_text("test"), 30))

    def probes(self) -> list[Tensor]:
        """Return four validation batches, (16, 96) bytes each."""
        return self._fixed(self._python["validation"], 4)

    @cached_property
    def _python(self) -> dict[str, Tensor]:
        return {split: python_text(split) for split in ("train", "validation", "test")}

    @staticmethod
    def _fixed(text: Tensor, count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [windows(text, _BATCH, _BYTES, generator) for _ in range(count)]


def python_text(split: str) -> Tensor:
    """Return the standard library's sources of a split, one after the other, (bytes,)."""
    paths = python_files()[split]
    return text_bytes("".join(path.read_text("utf-8", "replace") for path in paths))


def python_files() -> dict[str, list[Path]]:
    """Return, by split, the files at the top of the standard library."""
    files: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    sides = {0: "test", 1: "validation"}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        files[sides.get(zlib.crc32(path.name.encode()) % 16, "train")].append(path)
    return files


def english_text(split: str) -> Tensor:
    """Return Python's help texts, those to pretrain on ("train") or held out ("test"), (bytes,)."""
    held_out = split == "test"
    names = [name for name in sorted(topics) if (zlib.crc32(name.encode()) % 12 == 0) == held_out]
    return text_bytes("\n".join(topics[name] for name in names))
