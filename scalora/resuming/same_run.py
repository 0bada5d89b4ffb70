"""Whether a saved state of re-basing belongs to this run, and to the weights that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scalora import peft_layers
from scalora.peft_layers import LoRAPair

STATE_VERSION = 5
"""Of what is saved, in ``optimizer.state_dict()["scalora"]`` and in ``scalora.safetensors``."""


def check_version(found: Any) -> None:
    """Raise a ValueError if a state is in another version's format."""
    if found != STATE_VERSION:
        raise ValueError(
            f"the checkpoint was written by another version of scalora (its format is {found!r}, "
            f"this one's {STATE_VERSION}): resume or export it with the version that wrote it. "
            "Nothing was loaded."
        )


def check_same_kind(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise a ValueError, which says what differs, if a state is of another kind of run.

    Args:
        saved: the state; it may hold more.
        present: what must agree, of this run: ``ranks``, ``shapes`` and ``places`` map layers, the
            rest are single values.
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


@dataclass(frozen=True)
class ExpectedWeights:
    """What a loaded state was saved with, until the first step has seen that it is there.

    Attributes:
        base: layer name -> checksum of the base weight, where increments went into it.
        adapter: factor -> checksum, where a carry belongs to it.
        in_file: the state itself is in a Trainer's checkpoint, and still to be loaded.
    """

    base: Mapping[str, int] = field(default_factory=dict)
    adapter: Mapping[str, int] = field(default_factory=dict)
    in_file: bool = False

    @classmethod
    def of(cls, own: Mapping[str, Any] | None) -> ExpectedWeights:
        """What a state of re-basing expects; None expects nothing."""
        own = own or {}
        return cls(own.get("base", {}), own.get("adapter", {}), own.get("in_file", False))

    def check(self, pairs: Sequence[LoRAPair]) -> None:
        """Raise a ValueError if the layers' weights are others.  Waits for the device, if at all.

        Args:
            pairs: all layers that are re-based.
        """
        if self.in_file:
            raise ValueError(
                "this optimizer state is from a Trainer's checkpoint, which has the rest in "
                "scalora.safetensors: call scalora.load_training_state(optimizer, folder) after "
                "load_state_dict and before the first step, or give the Trainer a ScaLoRACallback."
            )
        if self.adapter:
            found = peft_layers.adapter_checksums(pairs)
            if name := _differing(self.adapter, found):
                raise ValueError(
                    f"the model's adapter is not the one this optimizer state was saved with "
                    f"({name!r} differs), and the carry in it belongs to that one: load the "
                    "adapter of the same checkpoint before the first step."
                )
        if self.base:
            found = peft_layers.base_checksums([pair for pair in pairs if pair.name in self.base])
            if name := _differing(self.base, found):
                raise ValueError(
                    f"the base weight of {name!r} is not the one this optimizer state was saved "
                    "with: what had been folded into it would be lost. Load the model's full "
                    "state_dict, or scalora.load_training_state, before the first step (or drop "
                    "the state's 'scalora' entry to begin re-basing anew on this base)."
                )


def _differing(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    return next((name for name, value in expected.items() if found[name] != value), None)


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
