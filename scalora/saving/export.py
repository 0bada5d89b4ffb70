"""A checkpoint of training as an ordinary adapter, or as a plain merged model."""

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
from peft import PeftConfig
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from scalora import peft_layers, transformers_models
from scalora.arguments import check_folder
from scalora.files import folder_written_whole
from scalora.saving.finished import ADAPTER_CONFIG, MODEL_CONFIG, merged_model, write_adapter
from scalora.saving.ties import shared_weights, write_model
from scalora.saving.training_state import load_rebased_weights
from scalora.saving.training_state_file import STATE_FILE, TrainingStateFile

_TOKENIZER_CONFIG = "tokenizer_config.json"
# What tokenizers of transformers save; each has some of them.
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
    """What was written.

    Attributes:
        folder: where.
        merged: whether a merged model, not an adapter.
        errors: layer name -> relative error.  Of an adapter, of the whole change since the
            pretrained weights; of a merged model, what rounding to its dtype took from what was
            merged into the base weight.
        rank: the adapter's largest; None of a merged model.
        bytes: of all files.
    """

    folder: Path
    merged: bool
    errors: dict[str, float]
    rank: int | None
    bytes: int


@dataclass(frozen=True)
class _Checkpoint:
    folder: Path
    state: TrainingStateFile
    adapter: PeftConfig
    adapter_folder: Path

    @classmethod
    def read(cls, folder: Path) -> _Checkpoint:
        check_folder(folder, "there is nothing to export")
        if not (folder / STATE_FILE).is_file():
            raise ValueError(
                f"{folder} has no {STATE_FILE}, which ScaLoRACallback and "
                "scalora.save_training_state write: there is nothing to export."
            )
        state = TrainingStateFile.read(folder)
        named = folder / str(state.values.get("adapter_name", "default"))
        adapter_folder = named if (named / ADAPTER_CONFIG).is_file() else folder
        if not (adapter_folder / ADAPTER_CONFIG).is_file():
            raise ValueError(f"{folder} has no {ADAPTER_CONFIG}: it holds no adapter.")
        with _loading(f"the adapter in {adapter_folder}"):
            adapter = PeftConfig.from_pretrained(str(adapter_folder))
        return cls(folder, state, adapter, adapter_folder)

    @property
    def recorded(self) -> dict[str, Any] | None:
        """The config of the model in training."""
        return self.state.values.get("config")

    @property
    def model_class(self) -> Any:
        """The class that loads the model in training."""
        return transformers_models.model_class(self.adapter, self.state.values.get("model_class"))

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the base weights in training; None if they are not known."""
        return self.state.base_dtype

    @property
    def needs_base(self) -> bool:
        """Whether part of what was learned is, or could be, in the base weights."""
        moving = self.state.base_dtype is not None
        return moving or peft_layers.config_moves_base(self.adapter)

    def weights_with_adapter(self) -> set[str]:
        """Names of the weights of the base that are in the adapter's files."""
        with _loading(f"the adapter in {self.adapter_folder}"):
            return peft_layers.weights_in_files(self.adapter_folder)

    def source(self, base: str | None) -> str:
        """Where the pretrained model comes from."""
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
        output: a new or empty folder; it is there whole in the end, or not at all.
        base: the pretrained model, a folder or a hub id; None for what the adapter names.  An
            adapter whose increments are all in carries is written without it.
        rank: of the adapter, as in `scalora.save_adapter`.
        merged: write a merged model instead.  A base that was quantized in training is quantized
            again and dequantized, which gives the answers of the model in training.
        full_precision_base: merge onto this base instead, as it is stored.
        dtype: of the merged weights; None for that in training.

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
            model, errors = _merged(read, base, full_precision_base, dtype)
            with folder_written_whole(folder, MODEL_CONFIG) as staged:
                write_model(model, staged)
                _copy_tokenizer(read.folder, staged)
            return Export(folder, True, errors, None, _bytes(folder))
        wrapped, start = _adapted(read, base)
        with folder_written_whole(folder, ADAPTER_CONFIG) as staged:
            name = peft_layers.active_adapter(wrapped)
            grown = _vocabulary_changed(read, wrapped)
            errors = write_adapter(wrapped, staged, rank, start, name, grown)
            _copy_tokenizer(read.folder, staged)
        written = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return Export(folder, False, errors, int(written["r"]), _bytes(folder))


def _adapted(
    read: _Checkpoint, base: str | None
) -> tuple[peft_layers.PeftModel, dict[str, Tensor] | None]:
    """The trained model, and its pretrained weights if they are needed to tell what it learned."""
    if not read.needs_base:
        with _loading("the model's config"):
            source = "" if read.recorded is not None else read.source(base)
            empty = transformers_models.model_without_weights(
                read.model_class, source, read.recorded
            )
        model = _with_adapter(read, empty, assign=True)
        pairs = peft_layers.all_lora_pairs(model)
        thin = all(pair.carry is not None or not pair.has_variant for pair in pairs)
        if thin and not any(
            map(transformers_models.is_stand_in, _embeddings(read, model).values())
        ):
            return model, None
    pretrained, missing = _pretrained(read, read.source(base), quantized=False)
    unsupplied = missing - _supplied(read, pretrained)
    start = {name: weight.clone() for name, weight in pretrained.state_dict().items()}
    model = _with_adapter(read, pretrained)
    layers = {f"{layer}.weight" for layer in read.state.values["ranks"]}
    embeddings = set(map(peft_layers.base_weight_name, _embeddings(read, model)))
    # What the adapter's files hold of a layer is what was folded into, not what it began with; new
    # rows of a vocabulary began nowhere.
    began = layers - embeddings if _vocabulary_changed(read, model) else layers
    _require_all((missing & began) | (unsupplied & (layers | embeddings)), read.source(base))
    return model, start


def _embeddings(read: _Checkpoint, model: peft_layers.PeftModel) -> dict[str, Tensor]:
    """What `write_adapter` writes with the adapter."""
    name = peft_layers.active_adapter(model)
    return peft_layers.saved_embeddings(model, name, _vocabulary_changed(read, model))


def _vocabulary_changed(read: _Checkpoint, model: peft_layers.PeftModel) -> bool:
    """Whether the vocabulary was changed before training, as PEFT saw then or can be seen now."""
    name = peft_layers.active_adapter(model)
    if peft_layers.vocabulary_changed(model, name):
        return True
    always = peft_layers.saved_embeddings(model, name, False)
    new = peft_layers.saved_embeddings(model, name, True).keys() - always.keys()
    return not read.weights_with_adapter().isdisjoint(map(peft_layers.base_weight_name, new))


def _supplied(read: _Checkpoint, base: nn.Module) -> set[str]:
    """Names of the weights that loading the adapter puts in place, where they are tied too."""
    held = read.weights_with_adapter()
    return held.union(*(group for group in shared_weights(base) if not held.isdisjoint(group)))


def _require_all(lacking: set[str], source: str) -> None:
    if lacking:
        raise ValueError(
            f"neither {source} nor the checkpoint has a weight {min(lacking)!r} that fits."
        )


def _merged(
    read: _Checkpoint, base: str | None, full_precision_base: str | None, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The merged model, and what rounding took from what was merged into each layer."""
    source = full_precision_base or read.source(base)
    pretrained, missing = _pretrained(read, source, quantized=full_precision_base is None)
    quantized = hasattr(pretrained.config, "quantization_config")
    if full_precision_base is not None and quantized:
        raise ValueError(f"--full-precision-base={full_precision_base} is quantized.")
    if full_precision_base is None and read.state.values.get("quantized") and not quantized:
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


def _pretrained(
    read: _Checkpoint, source: str, quantized: bool
) -> tuple[PreTrainedModel, set[str]]:
    with _loading(f"the base {source}"):
        return transformers_models.pretrained_model(
            read.model_class,
            source,
            read.recorded,
            quantized=quantized,
            dtype=read.dtype,
        )


def _with_adapter(
    read: _Checkpoint, base: nn.Module, *, assign: bool = False
) -> peft_layers.PeftModel:
    """The trained model: the base with the checkpoint's adapter and its re-based weights.

    Args:
        read: the checkpoint.
        base: what the adapter goes on.
        assign: whether to put the adapter's tensors in the place of the base's copies
            (``modules_to_save``), which cannot be written to where they have no memory.
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
    """Layer name -> ``|W - merged|_F / |change|_F``, W being what the layer computes with."""
    errors = {}
    for pair in peft_layers.all_lora_pairs(model):
        if (
            peft_layers.why_not_dense(pair) is not None
            and peft_layers.why_no_carry(pair) is not None
        ):
            continue
        exact = pair.effective_weight()
        weight: Any = merged.get_submodule(pair.name).weight
        change = torch.linalg.norm(pair.learned_change())
        lost = torch.linalg.norm(weight.to(exact.device, exact.dtype) - exact)
        errors[pair.name] = float(lost / change) if change > 0 else 0.0
    return errors


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Whatever goes wrong in another library says what could not be loaded."""
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
    if not (checkpoint / _TOKENIZER_CONFIG).is_file():
        return
    for pattern in _TOKENIZER_FILES:
        for path in checkpoint.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
            else:
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
