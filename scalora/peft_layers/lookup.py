"""The tensors of many layers, looked up once and again only where a module holds others.

Held by tests/guards/test_situations.py.

Finding a factor through PEFT's modules takes about a microsecond.  That is nothing for one layer
and a tenth of an optimizer's step for hundreds of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from scalora.peft_layers.pair import LoRAPair


class FoundLayer(NamedTuple):
    """One layer and its tensors.

    Attributes:
        pair: the layer.
        P, Q: its factors as PEFT stores them, (m, r, ...) and (r, n, ...).
        base: its base weight as stored; None where the layer keeps it in other tensors (GPTQ, AWQ).
        scaling: PEFT's ``s``.
    """

    pair: LoRAPair
    P: nn.Parameter
    Q: nn.Parameter
    base: Tensor | None
    scaling: float


class LayerLookup:
    """Finds the tensors of layers.

    Args:
        pairs: the layers.
    """

    def __init__(self, pairs: Sequence[LoRAPair]) -> None:
        self.pairs = list(pairs)
        self._found: list[FoundLayer] = []
        self._links: list[_Link] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "_found": [], "_links": None}  # a copy has modules of its own

    def found(self) -> list[FoundLayer]:
        """Return every layer's tensors: the very list of the last call if none was replaced."""
        if not self.is_current:
            self._found = [
                FoundLayer(p, p.P_parameter, p.Q_parameter, p.stored_weight, p.scaling)
                for p in self.pairs
            ]
            self._links = [link for pair in self.pairs for link in _links(pair)]
        return self._found

    @property
    def is_current(self) -> bool:
        """Whether every module still holds what the last look found in it."""
        if self._links is None:
            return False
        return all(holder.get(key) is held for holder, key, held in self._links)


_Link = tuple[Mapping[Any, Any], Any, Any]  # a module's dictionary, a name in it, what it holds


def _links(pair: LoRAPair) -> list[_Link]:
    """Return all that leads from PEFT's layer to the layer's tensors, rank, scaling and owner."""
    module, adapter = pair.module, pair.adapter
    links: list[_Link] = [(numbers, adapter, numbers.get(adapter)) for numbers in _numbers(module)]
    links.append((module.__dict__, "scalora_owners", module.__dict__.get("scalora_owners")))
    if pair.is_embedding:
        for factors in (module.lora_embedding_A, module.lora_embedding_B):
            links.append((factors._parameters, adapter, factors._parameters.get(adapter)))
    else:
        for name in ("lora_A", "lora_B"):
            factors = module._modules[name]
            factor = factors._modules[adapter]
            links += [(module._modules, name, factors), (factors._modules, adapter, factor)]
            links.append(_weight_link(factor))
    layer = module
    while (inner := layer._modules.get("base_layer")) is not None:
        links.append((layer._modules, "base_layer", inner))
        layer = inner
    links += [(layer._modules, "base_layer", None), _weight_link(layer)]
    return links


def _numbers(module: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return module.r, module.scaling


def _weight_link(layer: nn.Module) -> _Link:
    """Return where the weight is; if it is computed, what never holds, so it is looked up again."""
    weight = layer._parameters.get("weight")
    return (layer._parameters, "weight", object() if weight is None else weight)
