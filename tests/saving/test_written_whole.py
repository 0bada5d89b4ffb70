"""What is saved into a folder is there whole or not at all, whatever is raised in between."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from peft import PeftModel
from training import rebase
from transformers import BertForSequenceClassification, PreTrainedModel

import scalora
from scalora.files import folder_written_whole

resource = pytest.importorskip("resource")

IDS = models.token_ids(4, 9)


def trained(steps: int = 2) -> Any:
    torch.manual_seed(0)
    model = models.with_lora(models.bert(), target_modules=["query", "dense"])
    rebase(model, IDS, steps)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    """Saving leaves it as it is."""
    return trained()


def save_merged(model: Any, folder: Path) -> None:
    scalora.save_merged(model, folder)


def save_adapter(model: Any, folder: Path) -> None:
    torch.manual_seed(0)
    scalora.save_adapter(model, folder, base=models.bert())


def of_merged(folder: Path) -> Any:
    return BertForSequenceClassification.from_pretrained(folder)


def of_adapter(folder: Path) -> Any:
    torch.manual_seed(0)
    return PeftModel.from_pretrained(models.bert(), folder)


SAVES = {"merged": (save_merged, of_merged), "adapter": (save_adapter, of_adapter)}
saves = pytest.mark.parametrize("save, load", SAVES.values(), ids=SAVES.keys())


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@contextlib.contextmanager
def little_space() -> Iterator[None]:
    """The system lets no file grow beyond 8 KiB: room for a config, and not for the weights."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@saves
def test_without_space_nothing_is_written_and_nothing_lost(
    save: Callable[..., None], load: Callable[[Path], Any], tmp_path: Path
) -> None:
    model, folder = trained(), tmp_path / "saved"
    with little_space(), pytest.raises(Exception, match=os.strerror(errno.EFBIG)):
        save(model, folder)
    assert list(tmp_path.iterdir()) == []
    save(model, folder)
    old = content(folder)
    models.train(model, torch.optim.SGD(models.trainable(model), lr=0.1), IDS, 2)
    with little_space(), pytest.raises(Exception, match=os.strerror(errno.EFBIG)):
        save(model, folder)
    assert content(folder) == old
    save(model, folder)
    assert content(folder).keys() == old.keys() and content(folder) != old
    torch.testing.assert_close(
        models.answers(load(folder), IDS), models.answers(model, IDS), rtol=1e-3, atol=1e-3
    )


@saves
def test_other_files_of_a_folder_stay(
    model: Any, save: Callable[..., None], load: Callable[[Path], Any], tmp_path: Path
) -> None:
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "model.safetensors").write_text("another's")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-best.safetensors").write_text("another's")
    before = content(tmp_path)
    save(model, tmp_path)
    assert before.items() < content(tmp_path).items()
    load(tmp_path)


def test_file_in_the_place_of_the_folder_is_refused(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for save, _ in SAVES.values():
        with pytest.raises(ValueError, match="is a file"):
            save(model, tmp_path / "file")
    assert content(tmp_path) == {"file": b"text"}


@pytest.mark.parametrize("shards_first", [True, False])
def test_weights_of_an_earlier_save_do_not_outlive_it(
    model: Any, shards_first: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other: PreTrainedModel = models.bert()
    other.save_pretrained(tmp_path, max_shard_size="4KB" if shards_first else "1GB")
    assert bool(list(tmp_path.glob("model-*"))) == shards_first
    save_merged(model, tmp_path)
    torch.testing.assert_close(models.answers(of_merged(tmp_path), IDS), models.answers(model, IDS))
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


NEW = {"config.json": b"new", "weights": b"new", "extra": b"new"}
OLD = {"config.json": b"old", "weights": b"old", "stale-1": b"old", "kept": b"old"}
FINAL = {**NEW, "kept": b"old"}


def write(folder: Path) -> None:
    with folder_written_whole(folder, "config.json", ("stale-*",)) as staged:
        for name, text in NEW.items():
            (staged / name).write_bytes(text)


def prepared(folder: Path) -> Path:
    folder.mkdir()
    for name, text in OLD.items():
        (folder / name).write_bytes(text)
    return folder


@pytest.mark.parametrize("after", [False, True], ids=["before the move", "after it"])
def test_interrupt_at_any_move_puts_the_old_files_back(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, moves = os.replace, [0]

    def interrupted(source: Path, target: Path) -> None:
        moves[0] += 1
        if moves[0] == at and not after:
            raise KeyboardInterrupt
        replace(source, target)
        if moves[0] == at:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    at = -1
    write(prepared(tmp_path / "whole"))
    assert content(tmp_path / "whole") == FINAL
    for at in range(1, moves[0] + 1):
        moves[0], folder = 0, prepared(tmp_path / str(at))
        with pytest.raises(KeyboardInterrupt):
            write(folder)
        assert content(folder) == OLD


def test_config_is_there_only_with_the_files_that_belong_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process that is killed in between would leave, after every move."""
    replace, seen = os.replace, []
    folder = prepared(tmp_path / "saved")

    def watched(source: Path, target: Path) -> None:
        replace(source, target)
        there = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        seen.append(there)

    monkeypatch.setattr("os.replace", watched)
    write(folder)
    assert seen[-1] == FINAL
    assert len(seen) > 3 and all("config.json" not in there for there in seen[:-1])


def test_empty_folder_that_cannot_be_replaced_is_filled(tmp_path: Path) -> None:
    """As a mount point, or the folder one is in: it stays the folder that it is."""
    inode = tmp_path.stat().st_ino
    write(tmp_path)
    assert content(tmp_path) == NEW
    assert tmp_path.stat().st_ino == inode


def test_folder_is_written_where_folders_cannot_be_forced_to_disk(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network mounts."""
    fsync, refused = os.fsync, []

    def for_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", for_files_only)
    write(tmp_path / "saved")
    assert content(tmp_path / "saved") == NEW
    assert refused
    optimizer = training.optimizer_of(model)
    assert scalora.save_training_state(optimizer, tmp_path).is_file()


def test_file_that_cannot_be_forced_to_disk_is_not_taken_for_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int) -> None:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")

    folder = prepared(tmp_path / "saved")
    monkeypatch.setattr("os.fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        write(folder)
    assert content(folder) == OLD
