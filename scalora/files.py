"""Files and folders that are written whole or not at all; tensors are never pickled.

Held by tests/saving/test_written_whole.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; tensors that share memory are each written."""
    contiguous: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        address = own.untyped_storage().data_ptr()
        contiguous[name] = own.clone() if address in written else own
        written.add(address)
    with file_written_whole(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with file_written_whole(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def file_written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; without an error, force it to disk and rename it."""
    # Several processes of one run may write the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _force_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _force_to_disk(path.parent)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors (on the CPU) and the metadata of a safetensors file.

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
def folder_written_whole(folder: Path, last: str, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder to write, then move its files to ``folder``, unless an error comes.

    One process at a time may write a folder: the files of several would be mixed.

    A new folder appears whole.  An existing one (it may be a mount point) keeps its other files,
    and gets its old files back if anything is raised.  A process that is killed during the exchange
    leaves it without ``last`` and with the old files in a hidden folder inside.

    Args:
        folder: the folder to write.
        last: name of the file without which nothing loads the others.  It is removed first and
            written last.
        instead_of: patterns of old files to remove unless they are written again, such as the
            shards of an earlier model.

    Raises:
        ValueError: there is a file of that name.
    """
    folder = folder.absolute()
    there = folder.is_dir()
    if folder.exists() and not there:
        raise ValueError(f"{folder} is a file, and a folder is to be written there.")
    around = folder if there else folder.parent
    around.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scalora-", dir=around) as beside:
        staged = Path(beside, "new")
        staged.mkdir()
        yield staged
        for path in (*staged.rglob("*"), staged):
            _force_to_disk(path)
        if folder.is_dir():  # it may have been made since
            _exchange(folder, staged, Path(beside, "old"), last, instead_of)
        else:
            os.replace(staged, folder)
        _force_to_disk(around)


def _exchange(folder: Path, staged: Path, old: Path, last: str, instead_of: Sequence[str]) -> None:
    """Move the new files into ``folder`` and those they replace to ``old``, or move nothing."""
    old.mkdir()
    new = sorted((path.name for path in staged.iterdir()), key=lambda name: name == last)
    stale = {path.name for pattern in instead_of for path in folder.glob(pattern)}
    replaced = sorted(
        (name for name in stale.union(new) if (folder / name).exists()),
        key=lambda name: name != last,
    )
    moves = [(folder / name, old / name) for name in replaced]
    moves += [(staged / name, folder / name) for name in new]
    try:
        for source, target in moves:
            os.replace(source, target)
    except BaseException:
        for source, target in reversed(moves):
            if target.exists() and not source.exists():
                os.replace(target, source)
        raise


def _force_to_disk(path: Path) -> None:
    """Force a file's content or a folder's entries to disk.

    Otherwise a rename may survive a power cut that the content does not.  Systems that cannot do
    it for folders (Windows, some network mounts) are left to themselves.
    """
    if not path.is_dir():
        _sync(path, os.O_RDWR)
        return
    with suppress(OSError):
        _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
