"""What a user chooses about re-basing, validated where it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scalora.fold import ROUNDINGS
from scalora.scaling import DEFAULT_BOUND

RULES = ("auto", "renew", "paper", "exact", "direction", "scalar", "none")
ACCUMULATORS = ("auto", "dense", "carry")
WHEN_FULL = ("compress", "hold", "fold")
_WITHOUT_LIPSCHITZ = ("auto", "renew", "direction", "none")

_AUTO_CALIBRATION = 100


@dataclass(frozen=True)
class RebasingOptions:
    """Options of `scalora.ScaLoRA`, which documents them.

    Raises:
        ValueError: a value out of its range, or one that the chosen rule does not take.
        TypeError: a value of the wrong type.
    """

    interval: int = 1
    rule: str = "auto"
    lipschitz: float | str | None = None
    accumulator: str = "auto"
    adapter_name: str = "default"
    rounding: str = "stochastic"
    bound: float = DEFAULT_BOUND
    seed: int = 0
    carry_rank: int | str = "auto"
    when_full: str = "compress"
    carry_tolerance: float = 1e-4
    calibration: int | str = "auto"
    lifetime: int = 200

    def __post_init__(self) -> None:
        if isinstance(self.interval, bool) or not isinstance(self.interval, int):
            raise TypeError(f"interval={self.interval!r} must be an integer, 1 or more.")
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} must be 1 (every step) or more.")
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r} is not one of {list(RULES)}.")
        if self.accumulator not in ACCUMULATORS:
            raise ValueError(
                f"accumulator={self.accumulator!r} is not one of {list(ACCUMULATORS)}."
            )
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding={self.rounding!r} is not one of {list(ROUNDINGS)}.")
        if not (math.isfinite(self.bound) and self.bound >= 1):
            raise ValueError(f"bound={self.bound} must be finite and at least 1.")
        self._check_lipschitz()
        self._check_carry()
        self._check_calibration()
        if isinstance(self.lifetime, bool) or not isinstance(self.lifetime, int):
            raise TypeError(f"lifetime={self.lifetime!r} must be a number of steps.")
        if self.lifetime < 1:
            raise ValueError(f"lifetime={self.lifetime} must be 1 step or more.")

    def _check_carry(self) -> None:
        rank = self.carry_rank
        if isinstance(rank, bool) or not isinstance(rank, (int, str)):
            raise TypeError(f"carry_rank={rank!r} must be an integer or 'auto'.")
        if rank != "auto" and (isinstance(rank, str) or rank < 1):
            raise ValueError(f"carry_rank={rank!r} must be 'auto' or 1 at least.")
        if self.when_full not in WHEN_FULL:
            raise ValueError(f"when_full={self.when_full!r} is not one of {list(WHEN_FULL)}.")
        if not 0 <= self.carry_tolerance < 1:
            raise ValueError(f"carry_tolerance={self.carry_tolerance} must be within [0, 1).")

    def _check_calibration(self) -> None:
        steps = self.calibration
        if isinstance(steps, bool) or not isinstance(steps, (int, str)):
            raise TypeError(f"calibration={steps!r} must be a number of steps or 'auto'.")
        if steps != "auto" and (isinstance(steps, str) or steps < 0):
            raise ValueError(f"calibration={steps!r} must be 'auto', 0 (never) or more steps.")

    def _check_lipschitz(self) -> None:
        if self.lipschitz is None:
            return
        if self.rule in _WITHOUT_LIPSCHITZ:
            raise ValueError(
                f"rule={self.rule!r} takes no lipschitz; leave it out, or use rule='exact'."
            )
        if self.lipschitz == "auto":
            return
        if isinstance(self.lipschitz, str) or not (
            self.lipschitz > 0 and math.isfinite(self.lipschitz)
        ):
            raise ValueError(f"lipschitz={self.lipschitz!r} must be 'auto' or a positive number.")

    @property
    def calibration_steps(self) -> int:
        """For how many steps the length of a step is calibrated; 0: never."""
        if self.calibration == "auto":
            return _AUTO_CALIBRATION if self.rule == "auto" else 0
        return int(self.calibration)

    @property
    def resolved_rule(self) -> str:
        """The rule behind ``"auto"``."""
        return "renew" if self.rule == "auto" else self.rule
