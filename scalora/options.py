"""What a user chooses about re-basing, validated where it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scalora.fold import ROUNDINGS
from scalora.scaling import DEFAULT_BOUND

RULES = ("auto", "leak", "age", "paper", "exact", "direction", "scalar", "none")
ACCUMULATORS = ("auto", "dense", "carry")
WHEN_FULL = ("compress", "hold", "fold")
_WITH_MEMORY = ("auto", "leak", "age")
_WITHOUT_LIPSCHITZ = (*_WITH_MEMORY, "direction", "none")

_AUTO_CALIBRATION = 100
_AUTO_MEMORY = {"leak": 100.0, "age": 15.0}  # steps
_AUTO_INTERVALS = 10  # re-basings in one memory


@dataclass(frozen=True)
class RebasingOptions:
    """Options of `scalora.ScaLoRA`, which documents them.

    Raises:
        ValueError: a value out of its range, or one that the chosen rule does not take.
        TypeError: a value of the wrong type.
    """

    interval: int | str = "auto"
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
    memory: float | str = "auto"

    def __post_init__(self) -> None:
        self._check_interval()
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
        self._check_memory()

    def _check_interval(self) -> None:
        interval = self.interval
        if isinstance(interval, bool) or not isinstance(interval, (int, str)):
            raise TypeError(f"interval={interval!r} must be an integer, 1 or more, or 'auto'.")
        if interval != "auto" and (isinstance(interval, str) or interval < 1):
            raise ValueError(f"interval={interval!r} must be 'auto', 1 (every step) or more.")

    def _check_memory(self) -> None:
        memory = self.memory
        if isinstance(memory, bool) or not isinstance(memory, (int, float, str)):
            raise TypeError(f"memory={memory!r} must be a number of steps or 'auto'.")
        if memory == "auto":
            return
        if isinstance(memory, str) or not (math.isfinite(memory) and memory > 1):
            raise ValueError(f"memory={memory!r} must be 'auto' or more than 1 step.")
        if self.rule not in _WITH_MEMORY:
            raise ValueError(f"rule={self.rule!r} has no memory; leave it out, or use rule='auto'.")

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
        return "leak" if self.rule == "auto" else self.rule

    @property
    def scales_P_alone(self) -> bool:
        """Whether the rule leaves Q as it is."""
        return self.rule in _WITH_MEMORY

    @property
    def memory_steps(self) -> float:
        """For how many steps the adapter remembers, by the rules that scale P alone."""
        return _AUTO_MEMORY[self.resolved_rule] if self.memory == "auto" else float(self.memory)

    @property
    def interval_steps(self) -> int:
        """Steps from one re-basing to the next."""
        if self.interval != "auto":
            return int(self.interval)
        return max(1, int(self.memory_steps) // _AUTO_INTERVALS) if self.scales_P_alone else 1
