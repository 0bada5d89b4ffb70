"""Tied weights of a transformers model, and how to write it so that it loads as it is in memory.

A checkpoint does not say which weights are tied: transformers works it out from the config and the
model's class.  Once merging has given some users of one matrix a weight of their own, that answer
is wrong, both for the untied weights and for those that are still tied.

Held by tests/saving/test_merged_ties.py.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from scalora.storage import storage_address
from scalora.transformers_models.quiet import without_load_reports

_TIED = "tie_word_embeddings"
_SHOWN = 3

Groups = list[frozenset[str]]


@contextmanager
def keeping_ties(model: nn.Module) -> Iterator[None]:
    """Restore on exit what the model's configs say of ties, which PEFT's merging changes."""
    before = [(part, getattr(part, _TIED)) for part in _configs(model) if hasattr(part, _TIED)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        yield
    for part, value in before:
        setattr(part, _TIED, value)


def settle_ties(model: nn.Module) -> None:
    """Turn tying off in the config of a model that does not hold all the ties of its class.

    Some configs (T5's family) cannot say that, and some forward passes read the entry and would
    compute something else.  Such a config stays; transformers leaves weights untied that differ in
    the checkpoint.
    """
    if not isinstance(model, PreTrainedModel):
        return
    shared = shared_weights(model)
    held = all(any(tie <= group for group in shared) for tie in declared_ties(model))
    if held or not _can_untie(model):
        return
    for config in _configs(model):
        _untie(config)
    model.all_tied_weights_keys = {}


def write_model(model: Any, folder: Path) -> None:
    """Save a model so that it loads as it is in memory, and load it as a check.

    Weights that share memory where transformers would not tie them are written one by one.  The
    check maps the files into memory, so it takes no second copy on a CPU.

    Raises:
        ValueError: what loads from the folder is not the model.
    """
    with without_load_reports():
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, state_dict=_state_to_write(model))
        else:
            model.save_pretrained(folder)
            if not hasattr(model, "from_pretrained"):
                return
        loaded = _loaded(type(model), folder)
    wrong = differing_weights(model, loaded)
    if wrong:
        listed = ", ".join(map(repr, wrong[:_SHOWN])) + (", ..." if len(wrong) > _SHOWN else "")
        raise ValueError(
            f"the merged {type(model).__name__} cannot be written so that it loads as it is: "
            f"{len(wrong)} of its weights come back otherwise ({listed}). Nothing was written and "
            "the model is as it was: save it with scalora.save_adapter."
        )


def differing_weights(model: nn.Module, loaded: nn.Module) -> list[str]:
    """Return the names of a model's weights and buffers that a loaded one lacks or has otherwise.

    They are compared in the loaded model's dtype: transformers loads all weights in one dtype.
    """
    there = loaded.state_dict()
    return [
        name
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not _same(tensor, there.get(name))
    ]


def declared_ties(model: PreTrainedModel) -> Groups:
    """Return the groups of weights that transformers ties on loading, by the present config."""
    names = set(model.state_dict())
    groups: Groups = []
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    for pair in pairs.items():
        joined = frozenset(pair).union(*(group for group in groups if not group.isdisjoint(pair)))
        groups = [group for group in groups if group.isdisjoint(pair)] + [joined]
    groups = [group & names for group in groups]
    return [group for group in groups if len(group) > 1]


def shared_weights(model: nn.Module) -> Groups:
    """Return the groups of weights and buffers that are one tensor in memory."""
    found: dict[object, set[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.numel():
            found.setdefault(_identity(tensor), set()).add(name)
    return [frozenset(names) for names in found.values() if len(names) > 1]


def _identity(tensor: Tensor) -> object:
    """Return a key that two tensors share if they are the same view of the same memory."""
    if tensor.device.type == "meta":
        return id(tensor)
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return tensor.device, storage_address(tensor), *place


def _state_to_write(model: PreTrainedModel) -> dict[str, Any]:
    """Return the model's state dict, with copies of shared weights that are not tied on loading."""
    state = model.state_dict()
    ties = declared_ties(model)
    for group in shared_weights(model):
        if group in ties:
            continue
        for name in sorted(group)[1:]:
            state[name] = state[name].clone()
    return state


def _can_untie(model: PreTrainedModel) -> bool:
    """Return whether turning ties off in the config changes nothing else of the model."""
    if any(_TIED in _names_in_forward(module) for module in model.modules()):
        return False
    untied = copy.deepcopy(model.config)
    for part in _parts(untied):
        _untie(part)
    before, after = _written_and_read(model.config), _written_and_read(untied)
    if any(getattr(part, _TIED, False) for part in _parts(after)):
        return False
    return _without_ties(before.to_dict()) == _without_ties(after.to_dict())


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    """Return the attribute names in the code of the module's forward pass."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return () if code is None else code.co_names


def _written_and_read(config: PretrainedConfig) -> PretrainedConfig:
    return type(config).from_dict(json.loads(config.to_json_string()))


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a config and those of the models inside its model."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield from _parts(part)


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """Return the configs of a model and of the models inside, some of which hold copies."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [part for module in models for part in _parts(module.config)]


def _untie(config: PretrainedConfig) -> None:
    if hasattr(config, _TIED):
        setattr(config, _TIED, False)


def _without_ties(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_ties(value) for key, value in values.items() if key != _TIED}
    return values


def _loaded(kind: Any, folder: Path) -> nn.Module:
    """Return what ``kind.from_pretrained`` loads, or raise a ValueError that says why it cannot."""
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            return kind.from_pretrained(str(folder))
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"the merged {kind.__name__} was written, but {kind.__name__}.from_pretrained cannot "
            f"load it: {error}. Nothing was left in the folder and the model is as it was: save it "
            "with scalora.save_adapter."
        ) from error


def _same(tensor: Tensor, loaded: Any) -> bool:
    """Return whether a loaded tensor has the same shape and, in its own dtype, the same values."""
    if not isinstance(loaded, Tensor) or loaded.shape != tensor.shape:
        return False
    here, there = tensor.detach().to(loaded.device, loaded.dtype), loaded.detach()
    return torch.equal(here, there) or torch.equal(here.nan_to_num(), there.nan_to_num())
