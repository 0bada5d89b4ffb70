"""Measurements of other processes.

Held by tests/sharding/test_distributed.py.
"""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def process_rank() -> int:
    """Return this process's rank, 0 if it is the only one."""
    return distributed.get_rank() if _several() else 0


def gathered(items: list[T]) -> list[T]:
    """Return the items of all ranks, in the order of the ranks; each rank has to call it."""
    if not _several():
        return list(items)
    everyone: list[list[T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, items)
    return [item for part in everyone for item in part]


def _several() -> bool:
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
