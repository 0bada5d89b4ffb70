"""Options of re-basing, validated where it is made.

Held by tests/guards/test_wrong_arguments.py.
"""

# Annotations are not strings here: `help` shows the values that an option takes.
import inspect
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from scalora.arguments import described, did_you_mean
from scalora.scaling import DEFAULT_BOUND

Rule = Literal["auto", "leak", "age", "expected", "paper", "exact", "direction", "scalar", "none"]
Accumulator = Literal["auto", "dense", "carry"]
Rounding = Literal["stochastic", "compensated", "nearest"]
WhenFull = Literal["compress", "hold"]

_CHOICES = {"rule": Rule, "accumulator": Accumulator, "rounding": Rounding, "when_full": WhenFull}
_REBASING = tuple(rule for rule in get_args(Rule) if rule != "none")
_BY_LENGTH = ("age", "expected")  # which count steps as the inner optimizer alone takes them
_WITH_MEMORY = ("auto", "leak", *_BY_LENGTH)
# Option -> the rules that it means something to; the options that are not here, to all.
_RULES_OF: dict[str, tuple[str, ...]] = {
    "lipschitz": ("exact", "paper", "scalar"),
    "bound": _REBASING,
    "memory": _WITH_MEMORY,
    "interval": _REBASING,
    "calibration": tuple(rule for rule in _REBASING if rule not in _BY_LENGTH),
    "accumulator": _REBASING,
    "rounding": _REBASING,
    "carry_rank": _REBASING,
    "when_full": _REBASING,
    "carry_tolerance": _REBASING,
}
_OF_A_CARRY = ("carry_rank", "when_full", "carry_tolerance")

_AUTO_CALIBRATION = 100
_AUTO_MEMORY = {"leak": 100.0, "age": 15.0, "expected": 15.0}  # steps
_AUTO_INTERVALS = 10  # re-basings in one memory


class RebasingKeywords(TypedDict, total=False):
    """Keyword arguments of `RebasingOptions`, for type checkers."""

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
        ValueError: a value out of its range, or one that the chosen rule ignores.
        TypeError: a value of the wrong type.
    """

    interval: int | Literal["auto"] = "auto"
    rule: Rule = "auto"
    lipschitz: float | Literal["auto"] | None = None
    accumulator: Accumulator = "auto"
    adapter_name: str = "default"
    rounding: Rounding = "stochastic"
    bound: float = DEFAULT_BOUND
    seed: int = 0
    carry_rank: int | Literal["auto"] = "auto"
    when_full: WhenFull = "compress"
    carry_tolerance: float = 1e-4
    calibration: int | Literal["auto"] = "auto"
    memory: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), get_args(choices))
        _check_count("interval", self.interval, 1, "'auto', 1 (every step) or more")
        _check_count("carry_rank", self.carry_rank, 1, "'auto', 1 or more")
        _check_count("calibration", self.calibration, 0, "'auto', 0 (never) or more steps")
        _check_integer("seed", self.seed)
        if not isinstance(self.adapter_name, str):
            raise TypeError(f"adapter_name={described(self.adapter_name)} must be a string.")
        _check_number("bound", self.bound)
        if not (math.isfinite(self.bound) and self.bound >= 1):
            raise ValueError(f"bound={self.bound} must be finite and at least 1.")
        _check_number("carry_tolerance", self.carry_tolerance)
        if not 0 <= self.carry_tolerance < 1:
            raise ValueError(f"carry_tolerance={self.carry_tolerance} must be within [0, 1).")
        _check_lipschitz(self.lipschitz)
        _check_memory(self.memory)
        self._check_ignored()

    def _check_ignored(self) -> None:
        """Raise a ValueError if a value would make no difference; a default is always accepted."""
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
            if name == "rounding" and self.accumulator == "carry":
                raise ValueError(
                    f"accumulator='carry' ignores rounding={value!r}, as nothing is rounded into "
                    "the base: leave it out, or use 'dense' or 'auto'."
                )

    @property
    def calibration_steps(self) -> int:
        """Steps after the learning rate's peak during which step length is calibrated; 0: never."""
        if self.calibration == "auto":
            return _AUTO_CALIBRATION if self.rule == "auto" else 0
        return int(self.calibration)

    @property
    def resolved_rule(self) -> str:
        """The rule behind ``"auto"``."""
        return "leak" if self.rule == "auto" else self.rule

    @property
    def scales_P_alone(self) -> bool:
        """Return whether the rule leaves Q as it is."""
        return self.rule in _WITH_MEMORY

    @property
    def memory_steps(self) -> float:
        """K, the number of steps that the adapter remembers, for the rules that scale P alone."""
        return _AUTO_MEMORY[self.resolved_rule] if self.memory == "auto" else float(self.memory)

    @property
    def interval_steps(self) -> int:
        """Steps from one re-basing to the next."""
        if self.interval != "auto":
            return int(self.interval)
        return max(1, int(self.memory_steps) // _AUTO_INTERVALS) if self.scales_P_alone else 1

    def resolved(self) -> dict[str, Any]:
        """Return the options that matter to the rule, with what "auto" became, by name.

        ``accumulator`` is chosen per layer, and a carry grows: both stay as they were given.
        """
        found = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if self.rule in _RULES_OF.get(option.name, (self.rule,))
        }
        became = {
            "rule": self.resolved_rule,
            "interval": self.interval_steps if self.rule != "none" else None,
            "calibration": self.calibration_steps,
            "memory": self.memory_steps if self.scales_P_alone else None,
        }
        return {name: became.get(name, value) for name, value in found.items()}


def options_of(keywords: Mapping[str, Any], caller: str) -> RebasingOptions:
    """Return a callable's keyword arguments as options.

    Args:
        keywords: names and values.
        caller: the callable's name, for the messages.

    Raises:
        TypeError, ValueError: as `RebasingOptions` does; TypeError for a name that is no option.
    """
    known = [option.name for option in fields(RebasingOptions)]
    for name in keywords:
        if name not in known:
            raise TypeError(
                f"{caller} has no option {name!r}.{did_you_mean(name, known)} Its options: "
                f"{', '.join(known)}."
            )
    return RebasingOptions(**keywords)


def option_parameters() -> list[inspect.Parameter]:
    """Return the options as keyword-only parameters, for a callable that takes ``**options``."""
    parameters = inspect.signature(RebasingOptions).parameters.values()
    return [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"{name}={described(value)} is not one of {list(choices)}.{near}")


def _check_count(name: str, value: Any, least: int, accepted: str) -> None:
    """Raise if a value is neither an integer of at least ``least`` nor ``"auto"``."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{name}={described(value)} must be an integer: {accepted}.")
    if value != "auto" and (isinstance(value, str) or value < least):
        raise ValueError(f"{name}={value!r} must be {accepted}.")


def _check_memory(memory: Any) -> None:
    if memory == "auto":
        return
    if not isinstance(memory, str):
        _check_number("memory", memory)
    if isinstance(memory, str) or not 1 < memory <= 1e15:
        raise ValueError(f"memory={memory!r} must be 'auto' or more than 1 step.")


def _check_lipschitz(lipschitz: Any) -> None:
    if lipschitz is None or lipschitz == "auto":
        return
    if not isinstance(lipschitz, str):
        _check_number("lipschitz", lipschitz)
    if isinstance(lipschitz, str) or not (lipschitz > 0 and math.isfinite(lipschitz)):
        raise ValueError(f"lipschitz={lipschitz!r} must be 'auto' or a positive number.")


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={described(value)} must be an integer.")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={described(value)} must be a number.")
