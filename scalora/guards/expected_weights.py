"""The weights that a loaded state was saved with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scalora import peft_layers
from scalora.peft_layers import LoRAPair


@dataclass
class ExpectedWeights:
    """Checksums of a loaded state, which the next step verifies, then drops.

    Attributes:
        base: layer name -> checksum of the base weight, where increments went into it.
        adapter: factor -> checksum, where a carry belongs to it.
        in_file: whether the state itself is in a Trainer's checkpoint, and still to be loaded.
    """

    base: Mapping[str, int] = field(default_factory=dict)
    adapter: Mapping[str, int] = field(default_factory=dict)
    in_file: bool = False

    def expect(self, own: Mapping[str, Any] | None) -> None:
        """Expect what a state of re-basing was saved with; None expects nothing."""
        own = own or {}
        self.base, self.adapter = own.get("base", {}), own.get("adapter", {})
        self.in_file = own.get("in_file", False)

    def verify(self, pairs: Sequence[LoRAPair]) -> None:
        """Check the layers' weights, then expect nothing.  Waits for the device if at all.

        Args:
            pairs: all layers that are re-based.

        Raises:
            ValueError: the weights are not those of the state; they stay expected.
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
        self.expect(None)


def _differing(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    return next((name for name, value in expected.items() if found[name] != value), None)
