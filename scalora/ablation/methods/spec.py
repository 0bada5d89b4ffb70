"""Specs, ``name:key=value:key=value``: how a command line names a method."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from scalora.ablation.methods.method import Recipe

_BOOLS = {"true": True, "false": False}


def parse(spec: str, recipes: Mapping[str, type[Recipe]]) -> Recipe:
    """Return the recipe that a spec asks for.

    Raises:
        ValueError: an unknown name or option, or a value that the option does not take; the
            message lists what there is.
    """
    name, *assignments = spec.split(":")
    if name not in recipes:
        raise ValueError(f"no method {name!r} in {spec!r}: there are {', '.join(recipes)}.")
    recipe: Any = recipes[name]
    hints = typing.get_type_hints(recipe)
    known = [option.name for option in dataclasses.fields(recipe)]
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if key not in known or not equals or key in values:
            takes = ", ".join(f"{option}=" for option in known) or "no options"
            raise ValueError(
                f"{assignment!r} in {spec!r}: {name} takes {takes}"
                f"{' (each once)' if key in values else ''}."
            )
        values[key] = _value(value, hints[key], f"{key}= in {spec!r}")
    try:
        return recipe(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{spec!r}: {error}") from error


def canonical(recipe: Recipe) -> str:
    """Return the one spec of a recipe: options in their order, those at their default left out."""
    options: Any = recipe
    given = [
        f"{option.name}={_written(getattr(recipe, option.name))}"
        for option in dataclasses.fields(options)
        if getattr(recipe, option.name) != option.default
    ]
    return ":".join([recipe.name, *given])


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(text: str, hint: Any, where: str) -> Any:
    """Return the text as the first of the option's types that it can be."""
    kinds = _kinds(hint)
    for kind in kinds:
        try:
            return _BOOLS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            continue
    expected = " or ".join(kind.__name__ for kind in kinds)
    raise ValueError(f"{where}: {text!r} is not of type {expected}.")


def _kinds(hint: Any) -> list[type]:
    """Return an option's types, None left out; a choice of words is text, which recipes check."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    found = typing.get_args(hint) if union else (hint,)
    return [
        str if typing.get_origin(kind) is typing.Literal else kind
        for kind in found
        if kind is not type(None)
    ]
