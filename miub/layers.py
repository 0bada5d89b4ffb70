"""The LoRA layers of a model that can be measured.

Held by tests/miub/test_monitor.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from scalora.peft_layers import LoRAPair, adapter_names, lora_pairs, why_not_measured
from scalora.warning import warn


def measured_pairs(model: nn.Module, adapter_name: str | None) -> list[LoRAPair]:
    """Return the layers that can be measured, and warn of those that cannot.

    Args:
        model: with a LoRA adapter.
        adapter_name: None: every adapter.

    Raises:
        ValueError: there is none.
    """
    names = sorted(adapter_names(model)) if adapter_name is None else [adapter_name]
    every = [pair for name in names for pair in lora_pairs(model, name)]
    if not every:
        what = "no LoRA layer" if adapter_name is None else f"no LoRA adapter {adapter_name!r}"
        raise ValueError(f"the model has {what}; make it with peft.get_peft_model.")
    reasons = {pair.name: why_not_measured(pair) for pair in every}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    pairs = [pair for pair in every if pair.name not in left_out]
    if not pairs:
        name, reason = next(iter(left_out.items()))
        raise ValueError(f"no LoRA layer can be measured, {name!r} for one: {reason}.")
    if left_out:
        name, reason = next(iter(left_out.items()))
        warn(f"{len(left_out)} LoRA layers are not measured, {name!r} for one: {reason}.")
    return pairs


def refuse_merged(pairs: Sequence[LoRAPair]) -> None:
    """Raise a ValueError if an adapter is merged into its base weight."""
    merged = [pair for pair in pairs if pair.is_merged]
    if merged:
        raise ValueError(
            f"the adapter of {merged[0].name!r} is merged into its base weight, where the two "
            "paths cannot be told apart; call model.unmerge_adapter() first."
        )
