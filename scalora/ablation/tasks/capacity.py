"""A domain shift that fills its adapter: one column, many steps."""

from __future__ import annotations

from typing import ClassVar

from scalora.ablation.tasks.domain_shift import DomainShift


class Capacity(DomainShift):
    """The domain shift at r = 1 for 2,400 steps: more to learn than one column can hold.

    An adapter is full when it has few columns for the steps that it is trained for: then the rank
    is what is missing, here on real text.  Data, splits, pretraining and scores are those of
    `DomainShift`.
    """

    name = "capacity"
    steps = 2400
    short_steps = 240
    learning_rates: ClassVar[tuple[float, ...]] = (2e-3, 5e-3, 1e-2, 2e-2)
    rank = 1
