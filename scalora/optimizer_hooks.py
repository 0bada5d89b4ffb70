"""The hooks of an optimizer that wraps another, called as torch calls those of any optimizer.

Held by tests/optimizer/test_torch_optimizers.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.optim import optimizer as torch_optimizer

Function = TypeVar("Function", bound=Callable[..., Any])


def calls_global_hooks_once(step: Function) -> Function:
    """Wrap a wrapper's ``step`` so that torch's global step hooks see the wrapper alone.

    The user steps the wrapper, and only after its step is everything done.
    """

    @functools.wraps(step)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _passed_over_by_global_hooks(self.inner):
            return step(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def calls_state_dict_hooks(state_dict: Function) -> Function:
    """Wrap a wrapper's ``state_dict`` so that it calls the hooks registered on the wrapper.

    The inner optimizer calls those registered on itself.
    """

    @functools.wraps(state_dict)
    def wrapped(self: Any) -> dict[str, Any]:
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = state_dict(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state)
            state = state if replaced is None else replaced
        return state

    return wrapped  # type: ignore[return-value]


def calls_load_state_dict_hooks(load_state_dict: Function) -> Function:
    """Wrap a wrapper's ``load_state_dict`` likewise; hooks get a shallow copy of the state."""

    @functools.wraps(load_state_dict)
    def wrapped(self: Any, state_dict: dict[str, Any]) -> None:
        state = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state)
            state = state if replaced is None else replaced
        load_state_dict(self, state)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    return wrapped  # type: ignore[return-value]


@contextmanager
def _passed_over_by_global_hooks(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Hide an optimizer from torch's global step hooks while entered; they see all others."""
    tables: tuple[dict[int, Any], ...] = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    hooks = [(table, key, hook) for table in tables for key, hook in table.items()]
    for table, key, hook in hooks:
        table[key] = _PassesOver(hook, optimizer)
    try:
        yield
    finally:
        for table, key, hook in hooks:
            if key in table:  # not removed meanwhile
                table[key] = hook


class _PassesOver:
    """Global step hook that one optimizer does not call."""

    def __init__(self, hook: Callable[..., Any], optimizer: torch.optim.Optimizer) -> None:
        self.hook = hook
        self.optimizer = optimizer

    def __call__(self, optimizer: torch.optim.Optimizer, *args: Any) -> Any:
        return None if optimizer is self.optimizer else self.hook(optimizer, *args)
