"""``save_pretrained`` and ``load_adapter`` of a re-based model, which lose nothing or warn.

Held by tests/integrations/test_trainer_ends.py and tests/peft_layers/test_injected_adapters.py.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from scalora import sharding
from scalora.peft_layers import completed_files
from scalora.peft_layers.adapter_files import adapter_with_factors
from scalora.peft_layers.finding import adapted_models, all_lora_pairs, lora_pairs
from scalora.peft_layers.methods.combining import guard_combinations
from scalora.peft_layers.methods.misleading import MISLEADING, warn_of_changed_base
from scalora.peft_layers.methods.model_card import Content, note_in_model_card
from scalora.peft_layers.unpacking import put_scales_back
from scalora.warning import warn

_CHECKPOINT = re.compile(r"checkpoint-\d+")

_WARNINGS = {
    Content.ALONE: (
        "save_pretrained writes the adapter alone to {folder!r}, but ScaLoRA has put part of what "
        "was learned into the base weights, or into a carry beside them: loaded on the original "
        "base, this adapter is not your model. Call scalora.save_merged(model, path) or "
        "scalora.save_adapter(model, path, base=...) instead."
    ),
    Content.WITHOUT_CARRY: (
        "save_pretrained writes the adapter alone to {folder!r}, but ScaLoRA keeps part of what "
        "was learned in a carry beside the base: without it this adapter is not your model. Call "
        "scalora.save_merged(model, path) or scalora.save_adapter(model, path) instead; to resume "
        "training from there, scalora.save_training_state(optimizer, path) as well."
    ),
}


def complete_what_is_saved(model: nn.Module) -> None:
    """Make ``save_pretrained`` of a re-based model write what the adapter lacks, or warn.

    Other methods that would mislead by their names warn or refuse from then on too
    (`scalora.peft_layers.methods.misleading` and ``combining``).
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
    """Write what an adapter lacks beside it where a Trainer writes a checkpoint.

    Everywhere else the adapter is written whole: nothing resumes from there.

    Args:
        model: the adapted model, or a module around it.
        completing: given a checkpoint's folder, a context that is entered before the adapter is
            written there.  None: stop completing checkpoints.
    """
    complete_what_is_saved(model)
    for adapted in adapted_models(model).values():
        save = vars(adapted).get("save_pretrained")
        if isinstance(save, _SavePretrained):
            save.completing, save.by_trainer = completing, True


def restore_methods(model: nn.Module) -> None:
    """Give a model that has no adapter any more the methods of its class back."""
    for name in (_METHODS.keys() | MISLEADING) & vars(model).keys():
        delattr(model, name)


class _SavePretrained:
    """``save_pretrained`` that completes what it writes, or warns where it cannot.

    Attributes:
        completing: as in `complete_checkpoints`.
        by_trainer: whether a Trainer's callback completes checkpoints.  Nothing resumes from
            whatever else is written then.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.completing: Callable[[Path], AbstractContextManager[None]] | None = None
        self.by_trainer = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model must not complete checkpoints with the original's state.
        return {"model": self.model, "completing": None, "by_trainer": self.by_trainer}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = type(self.model).save_pretrained
        given = _given(method, self.model, args, kwargs, first=("save_directory",))
        folder = Path(str(given["save_directory"]))
        writes = bool(given.get("is_main_process", True))
        contents = self.contents(folder, given)
        _check_push(contents, given)
        self._warn(contents, folder)
        completed: AbstractContextManager[None] = nullcontext()
        if self.completing is not None and writes and _CHECKPOINT.fullmatch(folder.name):
            completed = self.completing(folder)
        with completed:
            result = type(self.model).save_pretrained(self.model, *args, **kwargs)
            put_scales_back(self.model)
            if writes:
                for adapter, content in contents.items():
                    there = completed_files.adapter_folder(folder, adapter)
                    self._complete(adapter, content, there)
        return result

    def contents(self, folder: Path, options: Mapping[str, Any]) -> dict[str, Content]:
        """Return adapter -> what its files will hold, for each adapter that would be written.

        Args:
            folder: where to.
            options: the arguments of ``save_pretrained`` by name.
        """
        model: Any = self.model
        if isinstance(model, PeftModel):
            adapters = options.get("selected_adapters") or list(model.peft_config)
        else:
            active = getattr(model, "active_adapters", None)
            adapters = active() if callable(active) else list(model.peft_config)
        plain = options.get("safe_serialization", True) and options.get("save_peft_format", True)
        can_complete = bool(plain) and not any(map(sharding.is_sharded, model.parameters()))
        to_resume_from = not self.by_trainer or self._is_in_checkpoint(folder)
        return {name: self._content(name, to_resume_from, can_complete) for name in adapters}

    def _content(self, adapter: str, to_resume_from: bool, can_complete: bool) -> Content:
        pairs = lora_pairs(self.model, adapter)
        carried = any(pair.has_carry for pair in pairs)
        if not carried and not any(pair.was_rebased for pair in pairs):
            return Content.AS_IT_IS
        if not can_complete:
            return Content.ALONE
        if not carried:
            folded = completed_files.folded_weights(self.model, adapter)
            return Content.WITH_BASE if folded else Content.ALONE
        if to_resume_from or completed_files.moved_weights(self.model, adapter) is None:
            return Content.WITHOUT_CARRY
        return Content.WIDE

    def _is_in_checkpoint(self, folder: Path) -> bool:
        """Return whether a folder is that of a checkpoint, or of one model part inside it."""
        names = (folder.name, folder.parent.name)
        return self.completing is not None and any(map(_CHECKPOINT.fullmatch, names))

    def _warn(self, contents: Mapping[str, Content], folder: Path) -> None:
        """Warn of the first thing that is not written, unless a callback writes it beside."""
        incomplete = [content for content in _WARNINGS if content in contents.values()]
        if not incomplete or self._is_in_checkpoint(folder):
            return
        # The text names the folder; else Python would show it once for all that a Trainer saves.
        warn(_WARNINGS[incomplete[0]].format(folder=str(folder)))

    def _complete(self, adapter: str, content: Content, folder: Path) -> None:
        """Make the adapter's files hold what they are to hold."""
        if content in (Content.WITH_BASE, Content.WITHOUT_CARRY):
            completed_files.add_folded_weights(self.model, adapter, folder)
        if content is Content.WITHOUT_CARRY:
            completed_files.mark_as_incomplete(folder)
        if content is Content.WIDE:
            moved = completed_files.moved_weights(self.model, adapter)
            assert moved is not None
            wide = {
                pair.name: (pair.scaling * pair.learned_P, pair.learned_Q.mT)
                for pair in lora_pairs(self.model, adapter)
                if pair.has_carry
            }
            tensors, config = adapter_with_factors(self.model, adapter, wide, keep_dora=True)
            completed_files.widen_by_carry(folder, tensors, config, moved)


def _given(
    method: Callable[..., Any],
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    first: Sequence[str],
) -> dict[str, Any]:
    """Return the arguments that a method of a model is called with, by name.

    Args:
        method, model, args, kwargs: of the call.
        first: names of the first arguments, where another library has put a function of
            ``(*args, **kwargs)`` in the method's place.

    Raises:
        TypeError: it cannot be called so.
    """
    call = inspect.signature(method).bind(model, *args, **kwargs)
    kinds = {p.name: p.kind for p in call.signature.parameters.values()}
    given: dict[str, Any] = dict(zip(first, args, strict=False))
    for name, value in call.arguments.items():
        if kinds[name] is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif kinds[name] is not inspect.Parameter.VAR_POSITIONAL:
            given[name] = value
    return given


def _check_push(contents: Mapping[str, Content], options: Mapping[str, Any]) -> None:
    """Raise a ValueError if files would be uploaded before they are completed."""
    if options.get("push_to_hub") and set(contents.values()) != {Content.AS_IT_IS}:
        raise ValueError(
            "save_pretrained(push_to_hub=True) uploads the files before ScaLoRA can complete "
            "them: call model.push_to_hub(repo_id), which uploads what is whole. Nothing was "
            "written."
        )


def _load_adapter(model: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Do what ``load_adapter`` does; warn where increments belong to the adapter it replaces."""
    method = type(model).load_adapter
    given = _given(method, model, args, kwargs, first=("model_id", "adapter_name"))
    source = given.get("model_id", given.get("peft_model_id"))
    name = given.get("adapter_name") or "default"
    # A callback that completes checkpoints restores what belongs to the adapter it loads, and a
    # run that is resumed does so later.
    save = vars(model).get("save_pretrained")
    completing = getattr(save, "completing", None)
    resumed = given.get("is_trainable", False) and any(Path(str(source)).glob("scalora*"))
    if completing is None and not resumed and _leaves_others(model, name, Path(str(source))):
        warn(
            f"load_adapter replaces the adapter {name!r} alone: what ScaLoRA has put "
            "into the base weights, or into a carry beside them, belongs to the one that was "
            f"there, and this is neither model. Call scalora.load_training_state(optimizer, "
            f"{str(source)!r}) after it; in a Trainer (load_best_model_at_end) pass a "
            "scalora.ScaLoRACallback, which does that."
        )
    return type(model).load_adapter(model, *args, **kwargs)


def _leaves_others(model: nn.Module, adapter: str, folder: Path) -> bool:
    """Return whether increments of the replaced adapter would stay in the model."""
    replaced = [pair for pair in all_lora_pairs(model) if pair.adapter == adapter]
    if any(pair.has_carry for pair in replaced):
        return True
    folded = [pair for pair in replaced if pair.was_rebased]
    return bool(folded) and not completed_files.has_base_weights(folded, folder)


def _create_or_update_model_card(model: Any, output_dir: Any) -> None:
    """Do what ``create_or_update_model_card`` does, and add what the adapters' files hold."""
    type(model).create_or_update_model_card(model, output_dir)
    contents = vars(model)["save_pretrained"].contents(Path(output_dir), {})
    note_in_model_card(Path(output_dir), set(contents.values()))


# Each makes a method that can be pickled; a bound one would be restored as that of the class.
_METHODS: dict[str, Callable[[Any], Any]] = {
    "save_pretrained": _SavePretrained,
    "load_adapter": lambda model: partial(_load_adapter, model),
    "create_or_update_model_card": lambda model: partial(_create_or_update_model_card, model),
}
