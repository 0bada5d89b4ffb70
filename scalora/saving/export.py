"""A checkpoint of training as an ordinary adapter, or as a plain merged model.

Held by tests/cli/test_export.py and test_export_refusals.py.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from scalora import peft_layers, transformers_models
from scalora.arguments import check_folder
from scalora.files import folder_written_whole
from scalora.peft_layers import ADAPTER_CONFIG
from scalora.saving.adapter import write_adapter
from scalora.saving.merged import MODEL_CONFIG, merged_model
from scalora.saving.pretrained import has_one_change
from scalora.saving.training_state import load_rebased_weights
from scalora.saving.training_state_file import STATE_FILE, TrainingStateFile

_TOKENIZER_CONFIG = "tokenizer_config.json"
# Files that transformers' tokenizers save; each kind has some of them.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
)


@dataclass(frozen=True)
class Export:
    """Result of `export_checkpoint`.

    Attributes:
        folder: the folder that was written.
        merged: whether it holds a merged model, and not an adapter.
        errors: layer name -> relative error.  An adapter's is that of the whole change since the
            pretrained weights.  A merged model's is the part of the change that rounding the
            merged weight to its dtype lost.
        rank: the adapter's largest rank; None for a merged model.
        bytes: size of all files together.
    """

    folder: Path
    merged: bool
    errors: dict[str, float]
    rank: int | None
    bytes: int


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint of training.

    Attributes:
        folder: its folder.
        file: the training state in it.
        adapter: the adapter's config.
        adapter_folder: where the adapter's files are, at the top or one level below.
    """

    folder: Path
    file: TrainingStateFile
    adapter: peft_layers.PeftConfig
    adapter_folder: Path

    @classmethod
    def read(cls, folder: Path) -> _Checkpoint:
        """Read the checkpoint in a folder.

        Raises:
            ValueError: the folder, its training state or its adapter is missing or damaged.
        """
        check_folder(folder, "there is nothing to export")
        if not (folder / STATE_FILE).is_file():
            raise ValueError(
                f"{folder} has no {STATE_FILE}, which ScaLoRACallback and "
                "scalora.save_training_state write: there is nothing to export."
            )
        file = TrainingStateFile.read(folder)
        named = folder / str(file.values.get("adapter_name", "default"))
        adapter_folder = named if (named / ADAPTER_CONFIG).is_file() else folder
        if not (adapter_folder / ADAPTER_CONFIG).is_file():
            raise ValueError(f"{folder} has no {ADAPTER_CONFIG}: it holds no adapter.")
        with _loading(f"the adapter in {adapter_folder}"):
            adapter = peft_layers.PeftConfig.from_pretrained(str(adapter_folder))
        return cls(folder, file, adapter, adapter_folder)

    @property
    def model_config(self) -> dict[str, Any] | None:
        """Config of the model in training, as JSON values; None if it was not recorded."""
        return self.file.values.get("config")

    @property
    def model_class(self) -> Any:
        """Class that loads the model in training."""
        return transformers_models.model_class(self.adapter, self.file.values.get("model_class"))

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the base weights in training; None if it is not known."""
        return self.file.base_dtype

    @property
    def needs_base(self) -> bool:
        """Return whether part of what was learned is, or could be, in the base weights."""
        folds = self.file.base_dtype is not None
        return folds or peft_layers.config_moves_base(self.adapter)

    def weights_with_adapter(self) -> set[str]:
        """Return the names of the base's weights that the adapter's files hold."""
        with _loading(f"the adapter in {self.adapter_folder}"):
            return peft_layers.weights_in_files(self.adapter_folder)

    def source(self, base: str | None) -> str:
        """Return the pretrained model's folder or hub id, or raise a ValueError without one."""
        source = base or self.adapter.base_model_name_or_path
        if not source:
            raise ValueError("the adapter does not say what it was trained on: pass --base.")
        return source


def export_checkpoint(
    checkpoint: str | PathLike[str],
    output: str | PathLike[str],
    *,
    base: str | None = None,
    rank: int | None = None,
    merged: bool = False,
    full_precision_base: str | None = None,
    dtype: torch.dtype | None = None,
) -> Export:
    """Write a checkpoint of training as an ordinary adapter, or as a plain merged model.

    Args:
        checkpoint: a folder with an adapter and ``scalora.safetensors``.
        output: a new or empty folder, written whole or not at all.
        base: the pretrained model, a folder or a hub id; None for the one that the adapter names.
            An adapter whose increments are all in carries is written without it.
        rank: rank of the adapter, as in `scalora.save_adapter`.
        merged: whether to write a merged model.  A base that was quantized in training is quantized
            again and dequantized, which gives the answers of the model in training.
        full_precision_base: another base to merge onto, as it is stored.
        dtype: dtype of the merged weights; None for that in training.

    Raises:
        ValueError: options that exclude each other, an output folder that is not empty, or a
            checkpoint or base that is missing, damaged, or belongs to another model.
        OSError: the files cannot be written.
    """
    if not merged and (full_precision_base is not None or dtype is not None):
        raise ValueError("--full-precision-base and --dtype go with --merged.")
    if merged and rank is not None:
        raise ValueError("--rank is of an adapter, not of a merged model.")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank={rank} must be at least 1.")
    folder = Path(output)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and is not an empty folder.")
    read = _Checkpoint.read(Path(checkpoint))
    with torch.no_grad():
        if merged:
            return _export_merged(read, folder, base, full_precision_base, dtype)
        return _export_adapter(read, folder, base, rank)


def _export_merged(
    read: _Checkpoint,
    folder: Path,
    base: str | None,
    full_precision_base: str | None,
    dtype: torch.dtype | None,
) -> Export:
    """Write the merged model and the tokenizer."""
    model, errors = _merged(read, base, full_precision_base, dtype)
    with folder_written_whole(folder, MODEL_CONFIG) as staged:
        transformers_models.write_model(model, staged)
        _copy_tokenizer(read.folder, staged)
    return Export(folder, True, errors, None, _bytes(folder))


def _export_adapter(read: _Checkpoint, folder: Path, base: str | None, rank: int | None) -> Export:
    """Write the adapter and the tokenizer."""
    model, start = _adapted(read, base)
    with folder_written_whole(folder, ADAPTER_CONFIG) as staged:
        name = peft_layers.active_adapter(model)
        grown = _vocabulary_changed(read, model)
        errors = write_adapter(model, staged, rank, start, name, grown)
        _copy_tokenizer(read.folder, staged)
    written = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return Export(folder, False, errors, int(written["r"]), _bytes(folder))


def _adapted(
    read: _Checkpoint, base: str | None
) -> tuple[peft_layers.PeftModel, dict[str, Tensor] | None]:
    """Return the trained model, and the pretrained weights if what it learned needs them."""
    model = None if read.needs_base else _adapted_without_base(read, base)
    if model is not None:
        return model, None
    pretrained, missing = _pretrained(read, read.source(base), quantized=False)
    unsupplied = missing - _supplied(read, pretrained)
    start = {name: weight.clone() for name, weight in pretrained.state_dict().items()}
    model = _with_adapter(read, pretrained)
    layers = {f"{layer}.weight" for layer in read.file.values["ranks"]}
    embeddings = set(map(peft_layers.base_weight_name, _embeddings(read, model)))
    # A layer's weight in the adapter's files was folded into since: what it began with is needed
    # from the base, except for a changed vocabulary, whose new rows are in no base.
    began = layers - embeddings if _vocabulary_changed(read, model) else layers
    _require_all((missing & began) | (unsupplied & (layers | embeddings)), read.source(base))
    return model, start


def _adapted_without_base(read: _Checkpoint, base: str | None) -> peft_layers.PeftModel | None:
    """Return the trained model on a base without weights; None if an adapter needs some of them."""
    with _loading("the model's config"):
        source = "" if read.model_config is not None else read.source(base)
        empty = transformers_models.model_without_weights(
            read.model_class, source, read.model_config
        )
    model = _with_adapter(read, empty, assign=True)
    pairs = peft_layers.all_lora_pairs(model)
    if any(pair.has_variant and pair.carry is None for pair in pairs):
        return None
    lacking = any(map(transformers_models.is_stand_in, _embeddings(read, model).values()))
    return None if lacking else model


def _embeddings(read: _Checkpoint, model: peft_layers.PeftModel) -> dict[str, Tensor]:
    """Return the base weights that `write_adapter` writes with the adapter."""
    name = peft_layers.active_adapter(model)
    return peft_layers.saved_embeddings(model, name, _vocabulary_changed(read, model))


def _vocabulary_changed(read: _Checkpoint, model: peft_layers.PeftModel) -> bool:
    """Return whether the vocabulary was changed before training, by the base or by PEFT's files."""
    name = peft_layers.active_adapter(model)
    if peft_layers.vocabulary_changed(model, name):
        return True
    always = peft_layers.saved_embeddings(model, name, False)
    new = peft_layers.saved_embeddings(model, name, True).keys() - always.keys()
    return not read.weights_with_adapter().isdisjoint(map(peft_layers.base_weight_name, new))


def _supplied(read: _Checkpoint, base: nn.Module) -> set[str]:
    """Return the names of the weights that loading the adapter sets, tied ones included."""
    held, shared = read.weights_with_adapter(), transformers_models.shared_weights(base)
    return held.union(*(group for group in shared if not held.isdisjoint(group)))


def _require_all(lacking: set[str], source: str) -> None:
    """Raise a ValueError that names the first of the weights that are nowhere, if there are any."""
    if lacking:
        raise ValueError(
            f"neither {source} nor the checkpoint has a weight {min(lacking)!r} that fits."
        )


def _merged(
    read: _Checkpoint, base: str | None, full_precision_base: str | None, dtype: torch.dtype | None
) -> tuple[nn.Module, dict[str, float]]:
    """Return the merged model and, by layer, the relative error of rounding what was merged."""
    source = full_precision_base or read.source(base)
    pretrained, missing = _pretrained(read, source, quantized=full_precision_base is None)
    quantized = hasattr(pretrained.config, "quantization_config")
    if full_precision_base is not None and quantized:
        raise ValueError(f"--full-precision-base={full_precision_base} is quantized.")
    if full_precision_base is None and read.file.values.get("quantized") and not quantized:
        raise ValueError(
            f"the base was quantized in training, and neither {source} nor the checkpoint says "
            "how: pass --full-precision-base to merge onto weights that are not."
        )
    _require_all(missing - _supplied(read, pretrained), source)
    model = _with_adapter(read, pretrained)
    merged = merged_model(model)
    if dtype is not None:
        merged = merged.to(dtype)
    return merged, _rounded_away(model, merged)


def _pretrained(read: _Checkpoint, source: str, quantized: bool) -> tuple[Any, set[str]]:
    """Return the pretrained model, and the names of the weights that ``source`` lacks."""
    with _loading(f"the base {source}"):
        return transformers_models.pretrained_model(
            read.model_class,
            source,
            read.model_config,
            quantized=quantized,
            dtype=read.dtype,
        )


def _with_adapter(
    read: _Checkpoint, base: nn.Module, *, assign: bool = False
) -> peft_layers.PeftModel:
    """Return the trained model: the base with the checkpoint's adapter and re-based weights.

    Args:
        read: the checkpoint.
        base: the model to put the adapter on.
        assign: whether the adapter's tensors replace the base's copies (``modules_to_save``), for a
            base without weights, whose tensors cannot be written.
    """
    with _loading(f"the adapter in {read.adapter_folder}"):
        model = peft_layers.PeftModel.from_pretrained(
            base,
            str(read.adapter_folder),
            torch_device="cpu",
            low_cpu_mem_usage=assign,
        )
    load_rebased_weights(model, read.folder)
    return model


def _rounded_away(model: nn.Module, merged: nn.Module) -> dict[str, float]:
    """Return layer name -> ``|W - merged|_F / |change|_F``, W being the exact merged weight."""
    errors = {}
    for pair in peft_layers.all_lora_pairs(model):
        if not has_one_change(pair):
            continue
        exact = pair.effective_weight()
        weight: Any = merged.get_submodule(pair.name).weight
        change = torch.linalg.norm(pair.learned_change())
        lost = torch.linalg.norm(weight.to(exact.device, exact.dtype) - exact)
        errors[pair.name] = float(lost / change) if change > 0 else 0.0
    return errors


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turn other libraries' errors into a ValueError that says what could not be loaded."""
    try:
        with peft_layers.without_notes():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            yield
    except (
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
        LookupError,
        AttributeError,
        ImportError,
        SafetensorError,
        UserWarning,
    ) as error:
        raise ValueError(f"{what} could not be loaded: {error}") from error


def _copy_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Copy the tokenizer's files, if the checkpoint has a tokenizer."""
    if not (checkpoint / _TOKENIZER_CONFIG).is_file():
        return
    for pattern in _TOKENIZER_FILES:
        for path in checkpoint.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
            else:
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)


def _bytes(folder: Path) -> int:
    """Return the size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
