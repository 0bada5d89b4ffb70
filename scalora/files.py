"""Files and folders that are written whole or not at all; tensors are never pickled."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, force it to disk, then rename it."""
    temporary = path.with_name(path.name + ".partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, temporary, metadata=dict(metadata))
        _force_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _force_to_disk(path.parent)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file.

    Raises:
        ValueError: the file is missing, cut short or damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read, nothing was loaded: {error}") from error


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Another folder to write to, which takes the place of ``folder`` if nothing is raised.

    Args:
        folder: a path where nothing is, or an empty folder.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scalora-", dir=folder.parent) as beside:
        staged = Path(beside) / folder.name
        staged.mkdir()
        yield staged
        for path in (*staged.rglob("*"), staged):
            _force_to_disk(path)
        if folder.exists():
            folder.rmdir()
        os.replace(staged, folder)
    _force_to_disk(folder.parent)


def _force_to_disk(path: Path) -> None:
    """A file's content, or a folder's entries: a rename may survive a power cut that they do not.

    Where folders cannot be opened (Windows), nothing is done for them.
    """
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
