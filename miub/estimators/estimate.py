"""What an estimator returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """An estimate of mutual information.

    Attributes:
        value: (...), nats, on the samples' device.
        stderr: (...), nats: its standard error over the draw of the samples.
        n: the number of samples it was made from.
    """

    value: Tensor
    stderr: Tensor
    n: int
