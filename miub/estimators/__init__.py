"""Estimators of mutual information: pure functions of samples, in nats.

Held by tests/miub/test_estimators.py, test_ridge.py, test_ranked.py and test_heavy_samples.py.
"""

from collections.abc import Callable

from miub.estimators.club import club
from miub.estimators.estimate import Estimate
from miub.estimators.infonce import infonce
from miub.estimators.l1out import l1out
from miub.estimators.ranked import ranked
from miub.estimators.tempered import gaussian, tempered
from miub.estimators.vub import vub

ESTIMATORS: dict[str, Callable[..., Estimate]] = {
    "tempered": tempered,
    "gaussian": gaussian,
    "club": club,
    "vub": vub,
    "l1out": l1out,
    "infonce": infonce,
}

__all__ = [
    "ESTIMATORS",
    "Estimate",
    "club",
    "gaussian",
    "infonce",
    "l1out",
    "ranked",
    "tempered",
    "vub",
]
