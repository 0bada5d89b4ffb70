"""Methods side by side on one task: does re-basing help, where, and which rule.

``scalora ablate`` is the command; :mod:`scalora.ablation.task` and
:mod:`scalora.ablation.methods` are what a reader extends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalora.ablation.task import Task

__all__ = ["Task"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import `Task` when it is asked for: ``scalora ablate --help`` needs no torch."""
        if name != "Task":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from scalora.ablation.task import Task

        return Task
