"""Methods side by side on one task: does re-basing help, where, and which rule.

Held by tests/ablation/test_ablation_runs.py and test_ablate_command.py.

``scalora ablate`` is the command. A task of one's own is a subclass of
`scalora.ablation.Task`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalora.ablation.task import Task

__all__ = ["Task"]


def __getattr__(name: str) -> Any:
    """Import `Task` when it is asked for: it needs torch, which ``--help`` does without."""
    if name == "Task":
        from scalora.ablation.task import Task

        return Task
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
