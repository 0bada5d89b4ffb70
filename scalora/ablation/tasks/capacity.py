"""A domain shift that fills its adapter: one column, many steps."""

from __future__ import annotations

from scalora.ablation.tasks.domain_shift import DomainShift


class Capacity(DomainShift):
    """The domain shift at r = 1 for 2,400 steps: more to learn than one column can hold.

    An adapter with few columns for its number of steps is full: a higher rank would help, here on
    real text. Data, splits, pretraining and scores are those of `DomainShift`.
    """

    name = "capacity"
    steps = 2400
    short_steps = 240
    rank = 1
