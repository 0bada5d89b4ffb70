"""Methods side by side on one task: does re-basing help, where, and which rule.

``scalora ablate`` is the command; :mod:`scalora.ablation.task` and
:mod:`scalora.ablation.methods` are what a reader extends.
"""

from scalora.ablation.task import Task

__all__ = ["Task"]
