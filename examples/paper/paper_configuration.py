"""A row of one of the paper's tables as a file: how it is trained, and who says so.

A file has three sections, and every setting is in exactly one of them: "paper" holds what the
ScaLoRA paper is known to state, "reflora" what its authors' published code of an earlier paper
does (RefLoRA, same models and benchmarks), "ours" what had to be chosen here.
"""

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import scalora

SECTIONS = ("paper", "reflora", "ours")
METHODS = ("lora", "scalora", "full")
BASES = ("float32", "bf16", "nf4")
PROTOCOLS = ("options", "records")

# What the results say once for each run, in another form, or not at all.
NOT_OF_A_RUN = ("row", "reported", "learning_rates", "seeds")


@dataclass(frozen=True)
class Configuration:
    """One row. What may differ between tasks is a value, or an object with one for each task."""

    row: str
    """As the table heads its column."""
    benchmark: str
    model: str
    """Folder or hub id."""
    method: str
    reported: dict[str, float]
    """The paper's scores in percent, by task; "average" is their mean."""
    learning_rates: list[float] | dict[str, list[float]]
    seeds: list[int]
    epochs: float | dict[str, float]
    batch: int
    max_length: int | dict[str, int]
    """Tokens; longer inputs are cut."""
    warmup_steps: int
    weight_decay: float
    base: str = "float32"
    """Format that the pretrained weights are stored in."""
    micro_batch: int | None = None
    """Sequences that are on the device at once; None: the batch."""
    checkpointing: bool = False
    """True where activations are computed again instead of kept."""
    steps: int | None = None
    """Instead of epochs."""
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | None = None
    modules_to_save: list[str] | None = None
    classifier_dropout: float | None = None
    interval: int | None = None
    rule: str | None = None
    rounding: str | None = None
    protocol: str | None = None
    """Kind of commonsense reasoning: "options" or "records"."""
    beams: int = 1
    """Beams of the search that generates answers."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_method()
        for name in ("batch", "micro_batch", "steps", "rank", "beams"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: {value!r} is not a positive whole number")
        if self.batch % (self.micro_batch or self.batch):
            raise ValueError(f"batch: {self.batch} is no multiple of micro_batch")
        for name in ("epochs", "max_length"):
            _check_positive(name, _values(getattr(self, name)))
        for rates in _values(self.learning_rates):
            _check_positive("learning_rates", rates)
        if not self.seeds or any(type(seed) is not int for seed in self.seeds):
            raise ValueError(f"seeds: {self.seeds!r} is not a list of whole numbers")

    def _check_choices(self) -> None:
        for name, choices in (("method", METHODS), ("base", BASES)):
            _check_choice(name, getattr(self, name), choices)
        _check_choice("benchmark", self.benchmark, ("glue", "commonsense"))
        if self.benchmark == "commonsense":
            _check_choice("protocol", self.protocol, PROTOCOLS)
        if self.method == "full" and self.base == "nf4":
            raise ValueError("base: weights in nf4 cannot be trained; method 'full' needs others")

    def _check_method(self) -> None:
        adapter = {name: getattr(self, name) for name in ("rank", "alpha", "target_modules")}
        if self.method != "full" and None in adapter.values():
            missing = [name for name, value in adapter.items() if value is None]
            raise ValueError(f"method {self.method!r} needs {', '.join(missing)}")
        if self.method == "full" and any(value is not None for value in adapter.values()):
            raise ValueError(f"method 'full' has no adapter: leave out {', '.join(adapter)}")
        if self.method != "scalora" and self.rebasing:
            raise ValueError(
                f"method {self.method!r} does not re-base: no {', '.join(self.rebasing)}"
            )
        scalora.ScaLoRACallback(**self.rebasing)  # says what is wrong with them

    @property
    def rebasing(self) -> dict[str, Any]:
        """The options of ScaLoRA that the file sets."""
        options = {name: getattr(self, name) for name in ("interval", "rule", "rounding")}
        return {name: value for name, value in options.items() if value is not None}

    def of(self, name: str, task: str) -> Any:
        """Return a setting as it is for a task."""
        value = getattr(self, name)
        if not isinstance(value, dict):
            return value
        if task not in value:
            raise ValueError(f"{self.row}: {name} says nothing of the task {task!r}")
        return value[task]

    def settings(self, task: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """Return everything that a run depends on, as the results keep it."""
        own = {name: value for name, value in asdict(self).items() if name not in NOT_OF_A_RUN}
        own |= {name: self.of(name, task) for name in ("epochs", "max_length")}
        own["model"] = Path(self.model).name
        return {**own, "task": task, "learning_rate": learning_rate, "seed": seed}


def load(path: Path) -> Configuration:
    """Read a row's file; a ValueError says what in it is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    try:
        return Configuration(**_merged(content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _merged(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not set(content) <= {*SECTIONS}:
        raise ValueError(f"expected an object with the sections {', '.join(SECTIONS)}")
    known = {field.name for field in fields(Configuration)}
    merged: dict[str, Any] = {}
    for section in content.values():
        for name, value in section.items():
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{name!r} is not a setting{hint}")
            if name in merged:
                raise ValueError(f"{name!r} is in two sections")
            merged[name] = value
    needed = [f.name for f in fields(Configuration) if f.default is MISSING]
    missing = [name for name in needed if name not in merged]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}")
    return merged


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(choices)}")


def _check_positive(name: str, values: Any) -> None:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name}: expected a list of numbers, found {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{name}: {value!r} is not a positive number")
