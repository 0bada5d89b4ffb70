"""The result of an estimator, and when it means little."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec

from torch import Tensor

from miub.estimators.samples import Margins, Samples
from scalora.warning import warn

P = ParamSpec("P")

# A sample is heavy above this share of the variance, and the share that chance gives a few samples.
_HEAVY = 0.1


@dataclass(frozen=True)
class Estimate:
    """An estimate of mutual information.

    Attributes:
        value: (...), nats, on the samples' device; at least 0, as mutual information is.
        stderr: (...), nats: its standard error over the draw of the samples.
        n: the number of samples behind it.
        heaviest: (...): the largest share that a single sample has of the variance of u or of v, or
            None where it was not looked at.  Where moments exist it falls with the number of
            samples; where it does not, as for Cauchy samples, an estimate from moments means little
            (Embrechts, Kluppelberg and Mikosch 1997, section 6.2.6).
    """

    value: Tensor
    stderr: Tensor
    n: int
    heaviest: Tensor | None = None


def estimate_of(samples: Samples | Margins, value: Tensor, stderr: Tensor, n: int) -> Estimate:
    """Return an estimate: 0 where u or v is constant, and never negative.

    A bound stays one: mutual information is not negative, so the larger of an upper bound and 0 is
    an upper bound, and the larger of a lower bound and 0 a lower bound.  NaN stays NaN.
    """
    value = value.clamp_min(0) * samples.informative
    return Estimate(value, stderr * samples.informative, n, samples.heaviest)


def is_heavy(heaviest: float, n: int) -> bool:
    """Return whether a single one of n samples decides their moments.

    A Gaussian number's largest square of n is about 2 log n times its variance.
    """
    return heaviest > _HEAVY + 4 * math.log(n) / n


def warns_of_heavy_tails(estimator: Callable[P, Estimate]) -> Callable[P, Estimate]:
    """Let an estimator from moments warn where a single sample decides them.

    Samples on a device are not looked at, which would wait for it: `Estimate.heaviest` says so.
    """

    @functools.wraps(estimator)
    def warning(*args: P.args, **kwargs: P.kwargs) -> Estimate:
        found = estimator(*args, **kwargs)
        if found.heaviest is None or found.heaviest.device.type != "cpu":
            return found
        if is_heavy(float(found.heaviest.max()), found.n):
            warn(
                f"{estimator.__name__}: a single sample holds more than a tenth of the variance of "
                "u or of v. Their moments, and what is estimated from them, mean little, and "
                "nothing is bounded; miub.estimators.ranked has no need of moments."
            )
        return found

    return warning
