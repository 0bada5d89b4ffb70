"""The tensors of many layers, looked up once and again only where a module holds others.

Held by tests/guards/test_situations.py.

Finding a factor through PEFT's modules takes about a microsecond.  That is nothing for one layer
and a tenth of an optimizer's step for hundreds of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from scalora.peft_layers.pair import LoRAPair


class FoundLayer(NamedTuple):
    """One layer and what its modules hold.

    Attributes:
        pair: the layer.
        P, Q: its factors as PEFT stores them, (m, r, ...) and (r, n, ...).
        base: its base weight as stored; None where the layer keeps it in other tensors (GPTQ, AWQ).
        scaling: PEFT's ``s``.
        merged: PEFT's list of the adapters that are merged into the base.
    """

    pair: LoRAPair
    P: nn.Parameter
    Q: nn.Parameter
    base: Tensor | None
    scaling: float
    merged: list[str]


class LayerLookup:
    """Finds the tensors of layers.

    Args:
        pairs: the layers.
    """

    def __init__(self, pairs: Iterable[LoRAPair]) -> None:
        self.pairs = list(pairs)
        self._found: list[FoundLayer] | None = None
        self._to_factors = self._to_others = _Links()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has modules of its own.
        return {
            "pairs": self.pairs,
            "_found": None,
            "_to_factors": _Links(),
            "_to_others": _Links(),
        }

    def found(self) -> list[FoundLayer]:
        """Return every layer's tensors: the very list of the last call if none was replaced."""
        if self._found is None or not (self.has_same_factors and self._to_others.hold):
            self._found = [
                FoundLayer(
                    *(pair, pair.P_parameter, pair.Q_parameter, pair.stored_weight, pair.scaling),
                    pair.module.merged_adapters,
                )
                for pair in self.pairs
            ]
            self._to_factors = _Links(link for pair in self.pairs for link in _to_factors(pair))
            self._to_others = _Links(link for pair in self.pairs for link in _to_others(pair))
        return self._found

    @property
    def has_same_factors(self) -> bool:
        """Return whether there was a look, and all layers still have the factors of then."""
        return self._found is not None and self._to_factors.hold


_Link = tuple[dict[Any, Any], Any, Any]  # a module's dictionary, a name in it, what it holds


class _Links:
    """Places where things were found."""

    def __init__(self, links: Iterable[_Link] = ()) -> None:
        all_links = list(links)
        self._holders = [holder for holder, _, _ in all_links]
        self._names = [name for _, name, _ in all_links]
        self._held = [held for _, _, held in all_links]

    @property
    def hold(self) -> bool:
        """Return whether every dictionary still holds the very thing that was found in it."""
        return all(map(is_, map(dict.get, self._holders, self._names), self._held))


def _to_factors(pair: LoRAPair) -> Iterator[_Link]:
    """Yield all that leads from PEFT's layer to its factors and its owner."""
    module, adapter = pair.module, pair.adapter
    yield module.__dict__, "scalora_owners", module.__dict__.get("scalora_owners")
    if pair.is_embedding:
        for factors in (module.lora_embedding_A, module.lora_embedding_B):
            yield factors._parameters, adapter, factors._parameters.get(adapter)
        return
    modules = module._modules
    for name in ("lora_A", "lora_B"):
        factor = modules[name]._modules[adapter]
        yield modules, name, modules[name]
        yield modules[name]._modules, adapter, factor
        yield _weight_link(factor)


def _to_others(pair: LoRAPair) -> Iterator[_Link]:
    """Yield all that leads to the base weight, the scaling and the merged adapters."""
    module, adapter = pair.module, pair.adapter
    yield module.scaling, adapter, module.scaling[adapter]
    yield module.__dict__, "merged_adapters", module.__dict__.get("merged_adapters")
    layer = module
    while (inner := layer._modules.get("base_layer")) is not None:
        yield layer._modules, "base_layer", inner
        layer = inner
    yield layer._modules, "base_layer", None
    # None where other tensors hold it: that is no reason to look again in every step.
    yield layer._parameters, "weight", layer._parameters.get("weight")


def _weight_link(layer: nn.Module) -> _Link:
    """Return where the weight is; if it is computed, what never holds, so it is looked up again."""
    weight = layer._parameters.get("weight")
    return (layer._parameters, "weight", object() if weight is None else weight)
