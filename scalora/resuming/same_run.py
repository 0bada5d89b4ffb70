"""What two runs must agree on for one to continue the other.

Held by tests/resuming/test_training_state.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATE_VERSION = 5
"""Format of ``optimizer.state_dict()["scalora"]`` and of ``scalora.safetensors``."""


def check_version(found: Any) -> None:
    """Raise a ValueError if a state is in the format of another version of this package."""
    if found != STATE_VERSION:
        raise ValueError(
            f"the checkpoint was written by another version of scalora (its format is {found!r}, "
            f"this one's {STATE_VERSION}): resume or export it with the version that wrote it. "
            "Nothing was loaded."
        )


def check_same_run(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise a ValueError that says what differs if this run cannot continue a saved one.

    Args:
        saved: a state of re-basing; it may hold more than must agree.
        present: what must agree (`RunState.kind`): ``ranks``, ``shapes`` and ``places`` map layer
            names, the rest are single values.
    """
    check_version(saved.get("version"))
    for name, value in present.items():
        found = saved.get(name)
        if found == value:
            continue
        if name == "ranks":
            raise ValueError(_other_layers(found or {}, value))
        if name == "shapes":
            raise ValueError(_other_shapes(found or {}, value))
        if name == "places":
            raise ValueError(_other_place(found or {}, value))
        raise ValueError(
            f"the checkpoint was written with {name}={found!r}, this optimizer has "
            f"{name}={value!r}. Create it with the same {name} to resume. Nothing was loaded."
        )


def _other_layers(saved: Mapping[str, int], ranks: Mapping[str, int]) -> str:
    differing = sorted(k for k in {*saved, *ranks} if saved.get(k) != ranks.get(k))
    return (
        f"the checkpoint's LoRA layers are not this model's: {len(differing)} differ in presence "
        f"or rank, for example {differing[0]!r} (checkpoint: rank {saved.get(differing[0])}, "
        f"model: rank {ranks.get(differing[0])}). Nothing was loaded."
    )


def _other_shapes(saved: Mapping[str, Any], shapes: Mapping[str, Any]) -> str:
    layer = next(name for name, shape in shapes.items() if saved.get(name) != shape)
    return (
        f"the checkpoint belongs to another model: the weight of {layer!r} is "
        f"{tuple(saved.get(layer, ()))} there and {tuple(shapes[layer])} here. Nothing was loaded."
    )


def _other_place(saved: Mapping[str, str], places: Mapping[str, str]) -> str:
    layer = next(name for name, place in places.items() if saved.get(name) != place)
    return (
        f"the checkpoint keeps the increments of {layer!r} in its accumulator "
        f"{saved.get(layer)!r}, this optimizer in {places[layer]!r}: create it with the same "
        "accumulator, over the same kind of base. Nothing was loaded."
    )
