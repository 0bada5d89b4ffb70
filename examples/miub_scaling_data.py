"""Texts of different complexity, all on any machine that has Python."""

import functools
import lzma
import random
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch

TEXTS = ("table", "English", "Python", "shuffled Python")
SIZE, HELD_OUT = 400_000, 50_000  # bytes


def table() -> str:
    """A list of sums, one rule for all lines."""
    numbers = random.Random(0)
    pairs = ((numbers.randrange(100), numbers.randrange(100)) for _ in range(60_000))
    return "".join(f"{a} plus {b} is {a + b}\n" for a, b in pairs)


def python() -> str:
    """Return the sources of the standard library, in the order of their names."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "".join(path.read_text("utf-8", "replace") for path in sources)


def shuffled() -> str:
    """Return the same with its words and signs in random order."""
    words = re.findall(r"\w+|\s|[^\w\s]", python()[: 2 * SIZE])
    random.Random(0).shuffle(words)
    return "".join(words)


def english() -> str:
    return "\n".join(topics[name] for name in sorted(topics))


SOURCES = {"table": table, "English": english, "Python": python, "shuffled Python": shuffled}


@functools.cache
def load(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes to train on and those held out."""
    text = SOURCES[name]().encode()[:SIZE]
    numbers = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return numbers[:-HELD_OUT], numbers[-HELD_OUT:]


@functools.cache
def complexity(name: str) -> float:
    """Return bits per byte after compression with LZMA."""
    text = SOURCES[name]().encode()[:SIZE]
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def pieces(text: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return `count` random pieces of the text: (count, length)."""
    starts = torch.randint(0, len(text) - length, (count,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts])
