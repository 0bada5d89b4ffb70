"""The place of a layer in a model, read from its name: its block and its kind of module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# These name the class of a module; what it does, the name of its parent says.
_CLASS_NAMES = frozenset({"dense", "linear", "proj"})


@dataclass(frozen=True)
class Place:
    """The place of a layer.

    Attributes:
        stack: the list that holds the block, "model.layers"; "" for a layer that is in no block.
        index: the number of the block in its stack, None for a layer that is in no block.
        kind: "q_proj"; layers of other blocks that do the same have the same.
    """

    stack: str
    index: int | None
    kind: str


def places(layers: Iterable[str]) -> dict[str, Place]:
    """Return the place of each layer.

    The block is the first number in the name (later ones count experts or sub-layers).  The kind is
    the end of the rest, without numbers: as few components as tell all layers of a block apart.
    So Llama's are "q_proj" to "down_proj"; GPT-2 has "attn.c_proj" and "mlp.c_proj" beside "c_fc";
    BERT has "query", "intermediate.dense", "attention.output.dense" and "output.dense".
    """
    split = {layer: _split(layer) for layer in layers}
    tails = {tail for _, _, tail in split.values()}
    return {
        layer: Place(stack, index, _shortest_of_its_own(tail, tails))
        for layer, (stack, index, tail) in split.items()
    }


def _split(layer: str) -> tuple[str, int | None, tuple[str, ...]]:
    """Return stack, index, and the rest of the name without numbers."""
    parts = layer.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None:
        return "", None, tuple(parts)
    tail = tuple(part for part in parts[first + 1 :] if not part.isdecimal())
    # A block that is itself the layer, as in an nn.Sequential.
    return ".".join(parts[:first]), int(parts[first]), tail or (*parts[:first][-1:], "layer")[:1]


def _shortest_of_its_own(tail: tuple[str, ...], tails: set[tuple[str, ...]]) -> str:
    length = min(2, len(tail)) if tail[-1] in _CLASS_NAMES else 1
    while length < len(tail) and any(
        other != tail and other[-length:] == tail[-length:] for other in tails
    ):
        length += 1
    return ".".join(tail[-length:])
