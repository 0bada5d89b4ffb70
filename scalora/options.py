"""What a user chooses about re-basing, validated where it is made."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from scalora.arguments import described, did_you_mean
from scalora.scaling import DEFAULT_BOUND

Rule = Literal["auto", "leak", "age", "paper", "exact", "direction", "scalar", "none"]
Accumulator = Literal["auto", "dense", "carry"]
Rounding = Literal["stochastic", "compensated", "nearest"]
WhenFull = Literal["compress", "hold", "fold"]

_CHOICES = {"rule": Rule, "accumulator": Accumulator, "rounding": Rounding, "when_full": WhenFull}
_REBASING = tuple(rule for rule in get_args(Rule) if rule != "none")
_WITH_MEMORY = ("auto", "leak", "age")
# The rules that an option means something to.  Those that are not here mean something to all.
_RULES_OF: dict[str, tuple[str, ...]] = {
    "lipschitz": ("exact", "paper", "scalar"),
    "bound": _REBASING,
    "memory": _WITH_MEMORY,
    "interval": _REBASING,
    "calibration": _REBASING,
    "accumulator": _REBASING,
    "rounding": _REBASING,
    "carry_rank": _REBASING,
    "when_full": _REBASING,
    "carry_tolerance": _REBASING,
}
_OF_A_CARRY = ("carry_rank", "when_full", "carry_tolerance")

_AUTO_CALIBRATION = 100
_AUTO_MEMORY = {"leak": 100.0, "age": 15.0}  # steps
_AUTO_INTERVALS = 10  # re-basings in one memory


class RebasingKeywords(TypedDict, total=False):
    """`RebasingOptions` as keyword arguments, for type checkers."""

    interval: int | Literal["auto"]
    rule: Rule
    lipschitz: float | Literal["auto"] | None
    accumulator: Accumulator
    adapter_name: str
    rounding: Rounding
    bound: float
    seed: int
    carry_rank: int | Literal["auto"]
    when_full: WhenFull
    carry_tolerance: float
    calibration: int | Literal["auto"]
    memory: float | Literal["auto"]


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
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), get_args(choices))
        self._check_interval()
        _check_integer("seed", self.seed)
        if not isinstance(self.adapter_name, str):
            raise TypeError(f"adapter_name={described(self.adapter_name)} must be a string.")
        _check_number("bound", self.bound)
        if not (math.isfinite(self.bound) and self.bound >= 1):
            raise ValueError(f"bound={self.bound} must be finite and at least 1.")
        self._check_lipschitz()
        self._check_carry()
        self._check_calibration()
        self._check_memory()
        self._check_ignored()

    def _check_interval(self) -> None:
        interval = self.interval
        if isinstance(interval, bool) or not isinstance(interval, (int, str)):
            raise TypeError(
                f"interval={described(interval)} must be an integer, 1 or more, or 'auto'."
            )
        if interval != "auto" and (isinstance(interval, str) or interval < 1):
            raise ValueError(f"interval={interval!r} must be 'auto', 1 (every step) or more.")

    def _check_memory(self) -> None:
        memory = self.memory
        if memory == "auto":
            return
        if not isinstance(memory, str):
            _check_number("memory", memory)
        if isinstance(memory, str) or not 1 < memory <= 1e15:
            raise ValueError(f"memory={memory!r} must be 'auto' or more than 1 step.")

    def _check_carry(self) -> None:
        rank = self.carry_rank
        if isinstance(rank, bool) or not isinstance(rank, (int, str)):
            raise TypeError(f"carry_rank={described(rank)} must be an integer or 'auto'.")
        if rank != "auto" and (isinstance(rank, str) or rank < 1):
            raise ValueError(f"carry_rank={rank!r} must be 'auto' or 1 at least.")
        _check_number("carry_tolerance", self.carry_tolerance)
        if not 0 <= self.carry_tolerance < 1:
            raise ValueError(f"carry_tolerance={self.carry_tolerance} must be within [0, 1).")

    def _check_calibration(self) -> None:
        steps = self.calibration
        if isinstance(steps, bool) or not isinstance(steps, (int, str)):
            raise TypeError(f"calibration={described(steps)} must be a number of steps or 'auto'.")
        if steps != "auto" and (isinstance(steps, str) or steps < 0):
            raise ValueError(f"calibration={steps!r} must be 'auto', 0 (never) or more steps.")

    def _check_lipschitz(self) -> None:
        if self.lipschitz is None or self.lipschitz == "auto":
            return
        if not isinstance(self.lipschitz, str):
            _check_number("lipschitz", self.lipschitz)
        if isinstance(self.lipschitz, str) or not (
            self.lipschitz > 0 and math.isfinite(self.lipschitz)
        ):
            raise ValueError(f"lipschitz={self.lipschitz!r} must be 'auto' or a positive number.")

    def _check_ignored(self) -> None:
        """Raise a ValueError if a value would make no difference; its default says nothing."""
        defaults = {option.name: option.default for option in fields(RebasingOptions)}
        given = {
            name: value
            for name, default in defaults.items()
            if (value := getattr(self, name)) != default
        }
        for name, value in given.items():
            rules = _RULES_OF.get(name, (self.rule,))
            if self.rule not in rules:
                raise ValueError(
                    f"rule={self.rule!r} ignores {name}={value!r}: leave it out, or use one of the "
                    f"rules {list(rules)}, which take it."
                )
            if self.accumulator == "dense" and name in _OF_A_CARRY:
                raise ValueError(
                    f"accumulator='dense' ignores {name}={value!r}: leave it out, or use 'carry' "
                    "or 'auto'."
                )
            if name == "rounding" and self.accumulator == "carry" and self.when_full != "fold":
                raise ValueError(
                    f"accumulator='carry' ignores rounding={value!r}, as nothing is rounded into "
                    "the base: leave it out, or use 'dense' or 'auto'."
                )

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


def options_of(keywords: Mapping[str, Any], caller: str) -> RebasingOptions:
    """The options among a callable's keyword arguments.

    Raises:
        TypeError, ValueError: as `RebasingOptions` does; a name that is none is one of the
            ``caller``'s, so far as its user knows.
    """
    known = [option.name for option in fields(RebasingOptions)]
    for name in keywords:
        if name not in known:
            raise TypeError(
                f"{caller} has no option {name!r}.{did_you_mean(name, known)} Its options: "
                f"{', '.join(known)}."
            )
    return RebasingOptions(**keywords)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"{name}={described(value)} is not one of {list(choices)}.{near}")


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={described(value)} must be an integer.")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={described(value)} must be a number.")
