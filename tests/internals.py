"""The private parts that tests look at: a private name that changes is changed here alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

import miub
import scalora
from scalora.carry import Carry
from scalora.guards.watches import FactorWatch
from scalora.peft_layers import LoRAPair
from scalora.rebasing.rebaser import Rebaser
from scalora.resuming.run_state import RunState


def rebaser(optimizer: scalora.ScaLoRA) -> Rebaser:
    return optimizer._rebaser


def rebase(optimizer: scalora.ScaLoRA, count: int = 0) -> None:
    """Re-base on the gradients that are there, without the inner optimizer's step.

    Args:
        optimizer: re-bases its layers; its own count stays.
        count: the number of this re-basing, from which the noise of rounding is drawn.
    """
    optimizer._rebaser.rebase(optimizer.inner, count)


def run_state(optimizer: scalora.ScaLoRA) -> RunState:
    return optimizer._run


def factor_watch(optimizer: scalora.ScaLoRA) -> FactorWatch:
    return optimizer._guard._factor_watch


def carry_of(optimizer: scalora.ScaLoRA, pair: LoRAPair) -> Carry:
    """Return the carry of a layer, an empty one where it has none yet."""
    return optimizer._rebaser._carry_accumulator.carry_of(pair)


def narrow_carries() -> AbstractContextManager[Any]:
    """Keep carries in as few bits as beside a quantized base, whatever the base is."""
    return mock.patch("scalora.rebasing.accumulators.carry.is_quantized", lambda pair: True)


def residual(optimizer: scalora.ScaLoRA, layer: str) -> Tensor | None:
    """Return what rounding cut from a layer's base weight, and the next increment makes up for."""
    return optimizer._rebaser._dense_accumulator.residuals.get(layer)


def make_room(optimizer: scalora.ScaLoRA, pair: LoRAPair, columns: int) -> None:
    """Compress the carry of a layer so that it can take in some columns."""
    optimizer._rebaser._carry_accumulator.make_room([pair], columns)


def own_records(monitor: miub.MIUBMonitor) -> Any:
    """Return the measurements of this process alone."""
    return monitor._records


def pending(monitor: miub.MIUBMonitor) -> Any:
    """Return the measurements whose numbers are still on the device."""
    return monitor._pending
