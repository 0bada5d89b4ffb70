"""A state of re-basing as tensors, JSON and a checksum of both: never pickled.

Held by tests/resuming/test_state_encoding.py.

In this form it is written to ``scalora.safetensors``, and travels in a distributed checkpoint,
which keeps single values of a parameter group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

STATE_VERSION = 7
"""Format of ``optimizer.state_dict()["scalora"]`` and of ``scalora.safetensors``."""

_KEYS = (
    *("version", "steps", "rebase_count", "ranks", "shapes", "places", "base", "adapter"),
    *("learned", "step_length"),
)
_CARRY = ("up", "down", "cut", "capacity")


def check_version(found: Any) -> None:
    """Raise a ValueError if a state is in the format of another version of this package."""
    if found != STATE_VERSION:
        raise ValueError(
            f"the checkpoint was written by another version of scalora (its format is {found!r}, "
            f"this one's {STATE_VERSION}): resume or export it with the version that wrote it. "
            "Nothing was loaded."
        )


def flattened(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split what `scalora.ScaLoRA.rebasing_state` returns into tensors and values for JSON.

    Returns:
        The tensors that are not None, by ``carry.up:``, ``carry.down:``, ``carry.cut:``,
        ``carry.capacity:``, ``measured:`` or ``residual:`` followed by a layer's name, or
        ``frozen:`` followed by a layer's name, or ``step_length:`` followed by a name; and all
        other values.
    """
    values = {key: value for key, value in state.items() if key not in ("layers", "frozen")}
    tensors: dict[str, Tensor] = {}
    if (frozen := state.get("frozen")) is not None:
        values["frozen"] = frozen["columns"]
        tensors |= {f"frozen:{name}": sketch for name, sketch in frozen["sketches"].items()}
    for name, layer in state["layers"].items():
        carry = {f"carry.{key}": value for key, value in (layer["carry"] or {}).items()}
        memory = {"measured": layer["measured"], "residual": layer["residual"], **carry}
        tensors |= {f"{key}:{name}": value for key, value in memory.items() if value is not None}
    length = state["step_length"]
    found = {key: value for key, value in length.items() if isinstance(value, Tensor)}
    tensors |= {f"step_length:{key}": value for key, value in found.items()}
    values["step_length"] = {key: None if key in found else length[key] for key in length}
    return tensors, values


def restored(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that `flattened` was given."""
    length = values["step_length"]
    sketches = {
        name: tensors[f"frozen:{name}"] for name in values["ranks"] if f"frozen:{name}" in tensors
    }
    columns = values.get("frozen")
    return {
        **values,
        "frozen": None if columns is None else {"columns": columns, "sketches": sketches},
        "layers": {layer: _memory(tensors, layer) for layer in values["ranks"]},
        "step_length": {key: tensors.get(f"step_length:{key}", length[key]) for key in length},
    }


def saved_carry(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor] | None:
    """Return a layer's ``up`` (m, c), ``down`` (c, n), ``cut`` and ``capacity``, or None."""
    carry = {key: tensors.get(f"carry.{key}:{layer}") for key in _CARRY}
    found = {key: tensor for key, tensor in carry.items() if tensor is not None}
    return found if len(found) == len(_CARRY) else None


def _memory(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Any]:
    return {
        "measured": tensors.get(f"measured:{layer}"),
        "residual": tensors.get(f"residual:{layer}"),
        "carry": saved_carry(tensors, layer),
    }


def sealed(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, contiguous on the CPU, and safetensors' metadata: values, checksum."""
    text = json.dumps(values)
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return here, {"scalora": text, "sha256": _sha256(here, text)}


def opened(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: object
) -> dict[str, Any]:
    """Return the values that were `sealed` with these tensors.

    Args:
        tensors, metadata: as they were read.
        source: where they were read from, for the messages.

    Raises:
        ValueError: they are not as they were written, or not by this version of this package.
    """
    try:
        text = metadata["scalora"]
        values = json.loads(text)
        version = values["version"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{source} was not written by this package. Nothing was loaded."
        ) from error
    check_version(version)
    if metadata.get("sha256") != _sha256(tensors, text):
        raise ValueError(
            f"{source} is damaged: it is not what was written. Nothing was loaded; take an "
            "earlier checkpoint."
        )
    missing = [key for key in _KEYS if key not in values]
    if missing:
        raise ValueError(
            f"{source} is damaged: its entry {missing[0]!r} is missing. Nothing was loaded."
        )
    return values


def noted(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the values without a comparison with the checksum; {} if there are none."""
    try:
        values = json.loads(metadata["scalora"])
    except (KeyError, json.JSONDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def packed(state: Mapping[str, Any]) -> bytes:
    """Return a state of re-basing as one value, which a distributed checkpoint writes as it is."""
    tensors, metadata = sealed(*flattened(state))
    return save(tensors, metadata)


def unpacked(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Split an optimizer's state dict into the state of re-basing, or None, and the inner one's.

    Raises:
        ValueError: it is in a parameter group and damaged, or was not written by this version of
            this package.
    """
    own = state_dict.get("scalora")
    groups = []
    for group in state_dict["param_groups"]:
        held = group.get("scalora")
        if own is None and held is not None:
            own = _from_bytes(held)
        groups.append({name: value for name, value in group.items() if name != "scalora"})
    inner = {name: value for name, value in state_dict.items() if name != "scalora"}
    return own, {**inner, "param_groups": groups}


def _from_bytes(held: bytes) -> dict[str, Any]:
    source = "what the optimizer's parameter group holds of re-basing"
    try:
        tensors = load(held)
        # Which safetensors does not give: eight bytes of length, then JSON.
        header = json.loads(held[8 : 8 + int.from_bytes(held[:8], "little")])
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} cannot be read: it is damaged, or was written by another version of "
            "scalora. Nothing was loaded; take an earlier checkpoint."
        ) from error
    return restored(tensors, opened(tensors, header.get("__metadata__", {}), source))


def _sha256(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the checksum of contiguous tensors on the CPU, their names, and the text."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
