"""Measurements whose numbers are still on the device, and their way to the host.

Held by tests/miub/test_monitor.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miub.estimators.estimate import is_heavy
from miub.report.rows import LayerRecord


@dataclass(frozen=True)
class Measurement:
    """One layer at one step.

    Attributes:
        place: the layer's place in the model.
        layer, adapter, step, coordinates, rebased: as in `LayerRecord`.
        numbers: (5,): value, stderr, lower, tokens, largest share of a single token.
    """

    place: int
    layer: str
    adapter: str
    step: int
    coordinates: int
    numbers: Tensor
    rebased: bool


def fetched(measurements: Sequence[Measurement]) -> list[tuple[int, LayerRecord, bool]]:
    """Return each layer's place, its record, and whether a single token decides its moments.

    One transfer per device.
    """
    devices = {measurement.numbers.device for measurement in measurements}
    numbers: dict[int, list[float]] = {}
    for device in devices:
        there = [i for i, m in enumerate(measurements) if m.numbers.device == device]
        on_host = torch.stack([measurements[i].numbers for i in there]).tolist()
        numbers.update(zip(there, on_host, strict=True))
    return [
        (
            m.place,
            LayerRecord(
                layer=m.layer,
                adapter=m.adapter,
                step=m.step,
                coordinates=m.coordinates,
                value=numbers[i][0],
                stderr=numbers[i][1],
                lower=numbers[i][2],
                tokens=int(numbers[i][3]),
                rebased=m.rebased,
            ),
            is_heavy(numbers[i][4], max(int(numbers[i][3]), 1)),
        )
        for i, m in enumerate(measurements)
    ]
