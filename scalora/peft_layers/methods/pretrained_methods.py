"""``save_pretrained`` and ``load_adapter`` of a re-based model: whole, or with a warning."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from scalora import sharding
from scalora.peft_layers.finding import adapted_models, all_lora_pairs, lora_pairs
from scalora.peft_layers.methods import whole_files
from scalora.peft_layers.methods.adapter_files import adapter_with_factors
from scalora.peft_layers.methods.combining import guard_combinations
from scalora.peft_layers.methods.misleading import warn_of_changed_base
from scalora.peft_layers.methods.model_card import note_in_model_card
from scalora.peft_layers.pair import LoRAPair
from scalora.peft_layers.unpacking import put_scales_back
from scalora.warning import warn

_CHECKPOINT = re.compile(r"checkpoint-\d+")

# What an adapter's files are:
_AS_IT_IS = "as it is"  # nothing belongs to it that PEFT would not write
_WITH_BASE = "with base"  # and the base weights that were folded into
_WIDE = "wide"  # adapter and carry as one
_WITHOUT_CARRY = "without carry"  # of the rank in training, so that training can go on
_ALONE = "alone"  # what belongs to it cannot be written with it

_WARNINGS = {
    _ALONE: (
        "save_pretrained writes the adapter alone to {folder!r}, but ScaLoRA has put part of what "
        "was learned into the base weights, or into a carry beside them: loaded on the original "
        "base, this adapter is not your model. Call scalora.save_merged(model, path) or "
        "scalora.save_adapter(model, path, base=...) instead."
    ),
    _WITHOUT_CARRY: (
        "save_pretrained writes the adapter alone to {folder!r}, but ScaLoRA keeps part of what "
        "was learned in a carry beside the base: without it this adapter is not your model. Call "
        "scalora.save_merged(model, path) or scalora.save_adapter(model, path) instead; to resume "
        "training from there, scalora.save_training_state(optimizer, path) as well."
    ),
}


def complete_what_is_saved(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a re-based model write what the adapter alone leaves out.

    Or say that it is left out; and let other methods say what would mislead by their names
    (`scalora.peft_layers.methods.misleading`).
    """
    for adapted in adapted_models(model).values():
        if isinstance(vars(adapted).get("save_pretrained"), _SavePretrained):
            continue
        for name, method in _METHODS.items():
            if hasattr(adapted, name):
                setattr(adapted, name, method(adapted))
        warn_of_changed_base(adapted)
        guard_combinations(getattr(adapted, "base_model", adapted))


def complete_checkpoints(
    model: nn.Module, completing: Callable[[Path], AbstractContextManager[None]] | None
) -> None:
    """Write what an adapter lacks together with it, where a Trainer writes a checkpoint.

    Everywhere else the adapter is written whole: nothing resumes from there.

    Args:
        model: the adapted model, or a module around it.
        completing: given a checkpoint's folder; entered before the adapter is written there.  None:
            no more.
    """
    complete_what_is_saved(model)
    for adapted in adapted_models(model).values():
        save = vars(adapted).get("save_pretrained")
        if isinstance(save, _SavePretrained):
            save.completing, save.by_trainer = completing, True


class _SavePretrained:
    """``save_pretrained`` that completes what it writes, or warns where it cannot.

    An object, not a bound method: pickle would restore that as the method of the class.

    Attributes:
        completing: of `complete_checkpoints`.
        by_trainer: whether a Trainer's callback completes the checkpoints, so that all else that is
            written is not for resuming.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.completing: Callable[[Path], AbstractContextManager[None]] | None = None
        self.by_trainer = False

    def __getstate__(self) -> dict[str, Any]:
        # What completes the checkpoints of a model completes none of its copy's.
        return {"model": self.model, "completing": None, "by_trainer": self.by_trainer}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        folder = Path(str(args[0] if args else kwargs.get("save_directory", "")))
        writes = bool(kwargs.get("is_main_process", True))
        forms = self.forms(folder, kwargs)
        self._check_push(forms, kwargs)
        self._warn(forms, folder)
        completed: AbstractContextManager[None] = nullcontext()
        if self.completing is not None and writes and _CHECKPOINT.fullmatch(folder.name):
            completed = self.completing(folder)
        with completed:
            result = type(self.model).save_pretrained(self.model, *args, **kwargs)
            put_scales_back(self.model)
            if writes:
                for adapter, form in forms.items():
                    self._complete(adapter, form, whole_files.adapter_folder(folder, adapter))
        return result

    def forms(self, folder: Path, options: Mapping[str, Any]) -> dict[str, str]:
        """Adapter -> what its files in that folder are, for those that would be written there."""
        model: Any = self.model
        if isinstance(model, PeftModel):
            adapters = options.get("selected_adapters") or list(model.peft_config)
        else:
            active = getattr(model, "active_adapters", None)
            adapters = active() if callable(active) else list(model.peft_config)
        plain = options.get("safe_serialization", True) and options.get("save_peft_format", True)
        sharded = any(map(sharding.is_sharded, model.parameters()))
        return {
            name: self._form(name, self._is_of_checkpoint(folder), bool(plain) and not sharded)
            for name in adapters
        }

    def _form(self, adapter: str, in_checkpoint: bool, can_complete: bool) -> str:
        pairs = lora_pairs(self.model, adapter)
        carried, folded = any(map(_has_carry, pairs)), any(pair.was_rebased for pair in pairs)
        if not carried and not folded:
            return _AS_IT_IS
        if not can_complete:
            return _ALONE
        if carried:
            whole = self.by_trainer and not in_checkpoint
            movable = whole and whole_files.moved_weights(self.model, adapter) is not None
            return _WIDE if movable else _WITHOUT_CARRY
        return _WITH_BASE if whole_files.folded_weights(self.model, adapter) else _ALONE

    def _is_of_checkpoint(self, folder: Path) -> bool:
        """Whether it is a checkpoint's folder, or one in it (of one part of a model of many)."""
        names = (folder.name, folder.parent.name)
        return self.completing is not None and any(map(_CHECKPOINT.fullmatch, names))

    def _check_push(self, forms: Mapping[str, str], options: Mapping[str, Any]) -> None:
        if options.get("push_to_hub") and set(forms.values()) != {_AS_IT_IS}:
            raise ValueError(
                "save_pretrained(push_to_hub=True) uploads the files before ScaLoRA can complete "
                "them: call model.push_to_hub(repo_id), which uploads what is whole. Nothing was "
                "written."
            )

    def _warn(self, forms: Mapping[str, str], folder: Path) -> None:
        incomplete = [form for form in _WARNINGS if form in forms.values()]
        if not incomplete or self._is_of_checkpoint(folder):
            return
        # With the folder, or Python would show it once for all that a Trainer saves.
        warn(_WARNINGS[incomplete[0]].format(folder=str(folder)))

    def _complete(self, adapter: str, form: str, folder: Path) -> None:
        if form in (_WITH_BASE, _WITHOUT_CARRY):
            whole_files.add_folded_weights(self.model, adapter, folder)
        if form == _WITHOUT_CARRY:
            whole_files.mark_as_incomplete(folder)
        if form == _WIDE:
            moved = whole_files.moved_weights(self.model, adapter)
            assert moved is not None
            wide = {
                pair.name: (pair.scaling * pair.learned_P, pair.learned_Q.mT)
                for pair in lora_pairs(self.model, adapter)
                if _has_carry(pair)
            }
            tensors, config = adapter_with_factors(self.model, adapter, wide, keep_dora=True)
            whole_files.widen_by_carry(folder, tensors, config, moved)


class _LoadAdapter:
    """``load_adapter`` with a warning where increments belong to what it replaces."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("model_id", "adapter_name"), args, strict=False)) | kwargs
        source = given.get("model_id", given.get("peft_model_id"))
        name = given.get("adapter_name") or "default"
        # A callback that completes checkpoints brings back what belongs to the one it loads; that
        # of a run that is resumed comes later.
        save = vars(self.model).get("save_pretrained")
        completing = getattr(save, "completing", None)
        resumed = given.get("is_trainable", False) and any(Path(str(source)).glob("scalora*"))
        if completing is None and not resumed and self._is_without_its_own(name, Path(str(source))):
            warn(
                f"load_adapter replaces the adapter {name!r} alone: what ScaLoRA has put "
                "into the base weights, or into a carry beside them, belongs to the one that was "
                f"there, and this is neither model. Call scalora.load_training_state(optimizer, "
                f"{str(source)!r}) after it; in a Trainer (load_best_model_at_end) pass a "
                "scalora.ScaLoRACallback, which does that."
            )
        return type(self.model).load_adapter(self.model, *args, **kwargs)

    def _is_without_its_own(self, adapter: str, folder: Path) -> bool:
        """Whether something is in the model that belongs to the replaced adapter and stays."""
        replaced = [pair for pair in all_lora_pairs(self.model) if pair.adapter == adapter]
        if any(map(_has_carry, replaced)):
            return True
        folded = [pair for pair in replaced if pair.was_rebased]
        return bool(folded) and not whole_files.has_base_weights(folded, folder)


class _ModelCard:
    """``create_or_update_model_card`` with a line on what ScaLoRA has put where."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, output_dir: Any) -> None:
        type(self.model).create_or_update_model_card(self.model, output_dir)
        forms = vars(self.model)["save_pretrained"].forms(Path(output_dir), {})
        note_in_model_card(Path(output_dir), set(forms.values()))


_METHODS = {
    "save_pretrained": _SavePretrained,
    "load_adapter": _LoadAdapter,
    "create_or_update_model_card": _ModelCard,
}

COMPLETED = frozenset(_METHODS)
"""Names of the methods that a model has of this module."""


def _has_carry(pair: LoRAPair) -> bool:
    carry = pair.carry
    return carry is not None and carry.columns > 0
