"""The tasks that come with the package, and how a user's own is found.

Held by tests/ablation/test_ablation_tasks.py and its neighbours for each task.

Import from :mod:`scalora.ablation`; a task's file says what it is and what its scores mean.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from scalora.ablation.task import Task
from scalora.ablation.tasks.arithmetic import Arithmetic
from scalora.ablation.tasks.capacity import Capacity
from scalora.ablation.tasks.domain_shift import DomainShift
from scalora.ablation.tasks.regression import Regression
from scalora.ablation.tasks.sentiment import Sentiment
from scalora.ablation.tasks.text import Text

EMBEDDED: dict[str, type[Task]] = {
    task.name: task for task in (DomainShift, Capacity, Sentiment, Arithmetic, Regression, Text)
}


def task_of(spec: str, **options: Any) -> Task:
    """Make a task: the name of an embedded one, or ``path/to/file.py:Class`` for a user's own.

    A user's file is loaded again in every process that makes the task, so its class need not be
    importable. Options go to the constructor; those that are ``None`` are not passed.

    Raises:
        ValueError: there is no such task, file or class, it is not a :class:`Task`, or its
            constructor does not take an option or lacks one.
    """
    kind = EMBEDDED[spec] if spec in EMBEDDED else _own_class(spec)
    given = {name: value for name, value in options.items() if value is not None}
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise ValueError(f"task {spec} lacks {missing}")
    _check_options(spec, kind, given)
    return kind(**given)


def _check_options(spec: str, kind: type[Task], given: dict[str, Any]) -> None:
    signature = inspect.signature(kind)
    try:
        signature.bind(**given)
    except TypeError as error:
        taken = ", ".join(signature.parameters) or "none"
        raise ValueError(f"task {spec}: {error}; the options that it takes: {taken}") from error


def _own_class(spec: str) -> type[Task]:
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
        known = ", ".join(EMBEDDED)
        raise ValueError(f"no task {spec}: it is one of {known}, or path/to/file.py:Class")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"task {spec}: there is no file {file}")
    found = getattr(_module(path), name, None)
    if not isinstance(found, type):
        raise ValueError(f"task {spec}: {path.name} has no class {name}")
    if not issubclass(found, Task):
        raise ValueError(f"task {spec}: {name} is not a subclass of scalora.ablation.Task")
    return found


def _module(path: Path) -> ModuleType:
    """Return the file as a module, under a name that no import has."""
    name = f"scalora_own_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and annotations look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"{path.name} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return module
