"""An optimizer around another: what is not its own step is the other's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from scalora.arguments import described

Function = TypeVar("Function", bound=Callable[..., Any])


class OptimizerWrapper(torch.optim.Optimizer):
    """Has the inner optimizer's parameter groups, state and defaults: its own, not copies.

    A subclass sets ``inner`` by ``__setstate__``, as torch's own unpickling does it: that sets up
    the hooks of an optimizer without copying groups and state.
    """

    inner: torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The inner optimizer's."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The inner optimizer's."""
        self.inner.add_param_group(param_group)


def check_inner(optimizer: Any, model: Any) -> None:
    """Raise a TypeError if these are no optimizer to wrap and the model that it trains."""
    if isinstance(optimizer, nn.Module) and isinstance(model, torch.optim.Optimizer):
        raise TypeError("optimizer and model are swapped: ScaLoRA(optimizer, model) takes both.")
    if isinstance(optimizer, OptimizerWrapper):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} already; pass the optimizer it wraps."
        )
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        name = optimizer.__name__
        raise TypeError(
            f"optimizer is the class {name}: pass one that was made, {name}(parameters, lr=...), "
            f"or call scalora.create_scalora_optimizer(model, {name}, lr=...)."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is {described(optimizer)}, not a torch.optim.Optimizer.")
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} around another: wrap the innermost "
            "one, before accelerator.prepare."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {described(model)}, not a torch.nn.Module.")


def calls_global_hooks_once(step: Function) -> Function:
    """Wrap a wrapper's ``step``: torch's global step hooks see the wrapper, not the inner one too.

    What the user steps is the wrapper, and only after its step is everything done.
    """

    @functools.wraps(step)
    def wrapped(self: OptimizerWrapper, *args: Any, **kwargs: Any) -> Any:
        with _passed_over_by_global_hooks(self.inner):
            return step(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def calls_state_dict_hooks(state_dict: Function) -> Function:
    """Wrap a wrapper's ``state_dict``: the hooks registered on the wrapper, as torch calls them.

    The inner optimizer calls those that were registered on itself.
    """

    @functools.wraps(state_dict)
    def wrapped(self: OptimizerWrapper) -> dict[str, Any]:
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = state_dict(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state)
            state = state if replaced is None else replaced
        return state

    return wrapped  # type: ignore[return-value]


def calls_load_state_dict_hooks(load_state_dict: Function) -> Function:
    """Wrap a wrapper's ``load_state_dict`` likewise; hooks get a shallow copy of what is loaded."""

    @functools.wraps(load_state_dict)
    def wrapped(self: OptimizerWrapper, state_dict: dict[str, Any]) -> None:
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
    """Within it torch's global step hooks do not see that optimizer; they see all others."""
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
    """A global step hook that one optimizer does not call."""

    def __init__(self, hook: Callable[..., Any], optimizer: torch.optim.Optimizer) -> None:
        self.hook = hook
        self.optimizer = optimizer

    def __call__(self, optimizer: torch.optim.Optimizer, *args: Any) -> Any:
        return None if optimizer is self.optimizer else self.hook(optimizer, *args)
