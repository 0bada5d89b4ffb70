"""Layers whose tensors can be stacked, so that one call serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.peft_layers import FoundLayer, LayerLookup, LoRAPair
from scalora.sharding.stacks import stack
from scalora.step_length.rates import host_rate, is_zero

# Elements of P and of Q that are moved at once: larger batches are launched one after the other,
# which costs nothing there and bounds the memory of their copies.
_ELEMENTS_AT_ONCE = 1 << 26


@dataclass
class LayerBatch:
    """Layers whose tensors all have the same shapes, dtypes and hyperparameters.

    Attributes:
        group_P, group_Q: the optimizer's parameter groups of the factors.
        index_P: the place of ``group_P`` among the optimizer's.
        pairs: the layers.
        P: their factors as PEFT stores them, (m, r, ...).
        Q: likewise, (r, n, ...).
    """

    group_P: dict[str, Any]
    group_Q: dict[str, Any]
    index_P: int
    pairs: list[LoRAPair] = field(default_factory=list)
    P: list[nn.Parameter] = field(default_factory=list)
    Q: list[nn.Parameter] = field(default_factory=list)

    @property
    def learning_rates(self) -> tuple[float | Tensor, float | Tensor]:
        """Learning rates of P and of Q."""
        return host_rate(self.group_P["lr"]), host_rate(self.group_Q["lr"])

    @property
    def rank(self) -> int:
        """The adapters' r."""
        return self.P[0].shape[1]


class Batching:
    """Groups the layers that take part in a step, and remembers what their tensors are like.

    Args:
        layers: finds their tensors.
        key_of: what must agree within a batch, beyond factors, state and hyperparameters, for as
            long as a layer's tensors are the same ones.
    """

    def __init__(self, layers: LayerLookup, key_of: Callable[[LoRAPair], Hashable]) -> None:
        self._layers = layers
        self._key_of = key_of
        self._found: list[FoundLayer] | None = None
        self._known: list[_Known | None] = []
        self._numbers: dict[Hashable, int] = {}  # keys are long: each gets a number

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None, "_known": [], "_numbers": {}}

    def of_step(
        self,
        optimizer: torch.optim.Optimizer,
        step_key: Callable[[LoRAPair, int], Hashable] | None = None,
        takes: Callable[[LoRAPair], bool] | None = None,
    ) -> list[LayerBatch]:
        """Return the layers that take part in this step, in batches.

        A layer without gradients, with a merged adapter or at learning rate 0 takes no part.

        Args:
            optimizer: holds their states and groups.
            step_key: what else must agree in this step, of a layer and the place of P's group.
            takes: whether a layer takes part; all do without it.
        """
        found = self._layers.found()
        if found is not self._found:
            self._found, self._known = found, [None] * len(found)
        groups = optimizer.param_groups
        index_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        learns = [not is_zero(group["lr"]) for group in groups]
        batches: dict[Hashable, LayerBatch] = {}
        for place, layer in enumerate(found):
            P, Q = layer.P, layer.Q
            if P.grad is None or Q.grad is None or layer.pair.is_merged:
                continue
            i, j = index_of.get(id(P)), index_of.get(id(Q))
            if i is None or j is None or not (learns[i] and learns[j]):
                continue
            if takes is not None and not takes(layer.pair):
                continue
            known = self._look(place, layer, optimizer)
            extra = None if step_key is None else step_key(layer.pair, i)
            key = (known.number, known.counters(), i, j, extra)
            if (batch := batches.get(key)) is None:
                batch = batches[key] = LayerBatch(groups[i], groups[j], i)
            batch.pairs.append(layer.pair)
            batch.P.append(P)
            batch.Q.append(Q)
        return list(batches.values())

    def _look(self, place: int, layer: FoundLayer, optimizer: torch.optim.Optimizer) -> _Known:
        """Return what the layer's tensors are like; looked at anew where one is another."""
        states = optimizer.state.get(layer.P, _EMPTY), optimizer.state.get(layer.Q, _EMPTY)
        dtypes = tuple(
            tensor.dtype  # which a module's own conversion changes in place
            for tensor in (layer.P, layer.Q, layer.P.grad, layer.Q.grad, layer.base)
            if tensor is not None
        )
        known = self._known[place]
        if known is not None and known.holds(states, dtypes):
            return known
        P, Q = layer.P, layer.Q
        (layout_P, counters_P), (layout_Q, counters_Q) = map(_layout, states)
        key = (dtypes, P.shape, Q.shape, P.device, sharding.layout(P), layer.scaling)
        number = self._numbers.setdefault(
            (key, layout_P, layout_Q, self._key_of(layer.pair)), len(self._numbers)
        )
        counted = [*((states[0], c) for c in counters_P), *((states[1], c) for c in counters_Q)]
        known = _Known(states, [len(s) for s in states], dtypes, number, counted)
        self._known[place] = known
        return known


_EMPTY: dict[str, Any] = {}


class _Known(NamedTuple):
    """What one layer's tensors are like.

    Attributes:
        states: the optimizer's, of P and of Q.
        sizes: how many entries they have.
        dtypes: of the layer's tensors.
        number: of all that must agree for layers to be stacked.
        counted: where the state's counters are, whose values must agree too.
    """

    states: tuple[dict[str, Any], dict[str, Any]]
    sizes: list[int]
    dtypes: tuple[torch.dtype, ...]
    number: int
    counted: list[tuple[dict[str, Any], str]]

    def holds(
        self, states: tuple[dict[str, Any], dict[str, Any]], dtypes: tuple[torch.dtype, ...]
    ) -> bool:
        """Return whether this is known of these very dictionaries."""
        return (
            states[0] is self.states[0]
            and states[1] is self.states[1]
            and [len(states[0]), len(states[1])] == self.sizes
            and dtypes == self.dtypes
        )

    def counters(self) -> tuple[float, ...]:
        """Return the counters; on the host, so reading them waits for nothing."""
        return tuple([float(state[name]) for state, name in self.counted])


def _layout(state: dict[str, Any]) -> tuple[Hashable, list[str]]:
    """Return what must agree for two states to be stacked, and the names of host counters."""
    tensors: list[Hashable] = []
    counters = []
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors.append((name, value.shape, value.dtype, value.device))
            if not value.shape and value.device.type == "cpu":
                counters.append(name)
        elif isinstance(value, (int, float)):
            counters.append(name)
    return tuple(tensors), counters


def at_once(batches: Sequence[LayerBatch]) -> Iterator[list[LayerBatch]]:
    """Yield the batches that are moved together.

    They are of one device, dtype, rank, way of sharding and pair of parameter groups.
    """
    together: dict[Hashable, list[LayerBatch]] = {}
    for batch in batches:
        P, groups = batch.P[0], (id(batch.group_P), id(batch.group_Q))
        key = (P.device, P.dtype, batch.Q[0].dtype, batch.rank, sharding.layout(P), groups)
        together.setdefault(key, []).append(batch)
    for alike in together.values():
        part: list[LayerBatch] = []
        elements = 0
        for batch in alike:
            more = len(batch.pairs) * max(batch.P[0].numel(), batch.Q[0].numel())
            if part and elements + more > _ELEMENTS_AT_ONCE:
                yield part
                part, elements = [], 0
            part.append(batch)
            elements += more
        yield part


def places(batches: Sequence[LayerBatch]) -> list[slice]:
    """Return where each batch's layers are among those of all."""
    ends = accumulate((len(batch.pairs) for batch in batches), initial=0)
    return [slice(start, end) for start, end in pairwise(ends)]


def thin_factors(pairs: Sequence[LoRAPair]) -> tuple[Tensor, Tensor]:
    """Return P (layers, m, r) and Q (layers, r, n); of sharded ones the m and the n held here."""
    P, Q = [pair.P_parameter for pair in pairs], [pair.Q_parameter for pair in pairs]
    return stack(P).flatten(2), sharding.own_columns(stack(Q), Q[0])
