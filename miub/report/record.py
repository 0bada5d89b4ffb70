"""What the monitor hands to the report: one measurement of one layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRecord:
    """One measurement of one layer, as plain numbers on the host.

    Attributes:
        layer: the module's name without PEFT's wrapping, "model.layers.0.self_attn.q_proj".
        adapter: the adapter's name.
        step: the monitor's step (forward passes of the model, counted from 1), or the
            Trainer's global step.
        rank: the coordinates of the learned path: r of the adapter, or more where it is all that
            was learned since a reference.
        value: the estimate, in nats.
        stderr: its standard error, in nats.
        lower: the InfoNCE lower bound, in nats; nan if it was not measured.
        tokens: how many tokens the estimate was made from.
        rebased: the frozen path has taken in folded increments and no reference was given,
            so the value is not that of the pretrained weights against all that was learned.
    """

    layer: str
    adapter: str
    step: int
    rank: int
    value: float
    stderr: float
    lower: float
    tokens: int
    rebased: bool
