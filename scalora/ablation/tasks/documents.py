"""A user's own text: documents, their split, and blocks of tokens."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalora.ablation.tasks.rows import read_rows

_TABLES = (".csv", ".jsonl", ".csv.gz", ".jsonl.gz")
_TEXTS = (".txt", ".txt.gz")


def read_documents(source: str | Path) -> list[str]:
    """Return the documents of a file, a folder or a data set of the hub; none empty, none twice.

    Each row of a .csv or .jsonl file (column ``text``) is a document. A .txt file in a folder is
    one document; given alone, each of its paragraphs is one (an empty line ends a paragraph). Files
    may be gzipped. A folder is read with its subfolders.

    Raises:
        ValueError: there is no such source, a file has no column ``text``, or there is no text.
    """
    path = Path(source)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.name.endswith(_TEXTS + _TABLES)]
        found = [text for file in files for text in _of_file(file)]
    elif path.name.endswith(_TEXTS) and path.is_file():
        found = re.split(r"\n\s*\n", _read(path))
    else:
        found = _of_rows(source)
    documents = list(dict.fromkeys(text.strip() for text in found if text.strip()))
    if not documents:
        raise ValueError(f"{path.name}: no text in it; .txt, .csv and .jsonl files are read")
    return documents


def split_documents(documents: list[str]) -> dict[str, list[str]]:
    """Return a tenth to validate, a tenth to test, and the rest to train on; always the same.

    Raises:
        ValueError: there are fewer than three documents.
    """
    if len(documents) < 3:
        raise ValueError(f"{len(documents)} documents; training, validation and test need one each")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(documents), generator=generator).tolist()
    shuffled = [documents[i] for i in order]
    tenth = max(1, len(documents) // 10)
    return {
        "test": shuffled[:tenth],
        "validation": shuffled[tenth : 2 * tenth],
        "train": shuffled[2 * tenth :],
    }


def packed(documents: list[str], tokenizer: Any, length: int) -> Tensor:
    """Return the documents' tokens, each document ended, packed in blocks (blocks, length).

    Tokens that do not fill a last block are left out, unless it is the only one.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        tokens += [*ids, *end]
    length = min(length, len(tokens))
    if length < 2:
        raise ValueError(f"{len(documents)} documents have {len(tokens)} tokens: too few")
    blocks = len(tokens) // length
    return torch.tensor(tokens[: blocks * length]).view(blocks, length)


def _of_file(path: Path) -> list[str]:
    return [_read(path)] if path.name.endswith(_TEXTS) else _of_rows(path)


def _of_rows(source: str | Path) -> list[str]:
    rows = read_rows(source)
    without = next((row for row in rows if "text" not in row), None)
    if without is not None:
        raise ValueError(f"{source}: no column `text` among {sorted(without)}")
    return [str(row["text"]) for row in rows]


def _read(path: Path) -> str:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode("utf-8")
    return path.read_text("utf-8")
