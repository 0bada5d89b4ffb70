"""Layers whose tensors can be stacked, so that one call serves all of them.

Held by tests/peft_layers/test_layers.py and tests/rebasing/test_bitsandbytes_training.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, repeat
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.peft_layers import FoundLayer, LayerLookup, LoRAPair
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
    """Groups the layers that take part in a step, and remembers which of them can be stacked.

    Args:
        layers: finds their tensors.
        key_of: what must agree within a batch, beyond factors, state and hyperparameters, until a
            layer's tensors are others or `forget` is called.
    """

    def __init__(self, layers: LayerLookup, key_of: Callable[[LoRAPair], Hashable]) -> None:
        self._layers = layers
        self._key_of = key_of
        self._known: _Known | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def forget(self) -> None:
        """Look at every layer anew in the next step: what must agree may have changed."""
        self._known = None

    def of_step(
        self,
        optimizer: torch.optim.Optimizer,
        step_key: Callable[[LoRAPair, int], Hashable] | None = None,
        takes: Callable[[LoRAPair], bool] | None = None,
        counters_agree: bool = True,
    ) -> list[LayerBatch]:
        """Return the layers that take part in this step, in batches.

        A layer without gradients, with a merged adapter or at learning rate 0 takes no part.

        Args:
            optimizer: holds their states and groups.
            step_key: what else must agree in this step, of a layer and the place of P's group.
            takes: whether a layer takes part; all do without it.
            counters_agree: whether the counters in the states of a batch must agree, as they must
                for the directions of the coming step.
        """
        known, groups = self._look(optimizer), optimizer.param_groups
        index_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        learns = [not is_zero(group["lr"]) for group in groups]
        indices = list(map(index_of.get, map(id, known.factors)))
        count = len(known.found)
        counters = known.counters() if counters_agree else [None] * count
        batches: dict[Hashable, LayerBatch] = {}
        for layer, number, counter, i, j in zip(
            known.found, known.numbers, counters, indices[:count], indices[count:], strict=True
        ):
            if number is None or layer.merged or i is None or j is None:
                continue
            if not (learns[i] and learns[j]) or (takes is not None and not takes(layer.pair)):
                continue
            own = None if step_key is None else step_key(layer.pair, i)
            key = (number, counter, i, j, own)
            if (batch := batches.get(key)) is None:
                batch = batches[key] = LayerBatch(groups[i], groups[j], i)
            batch.pairs.append(layer.pair)
            batch.P.append(layer.P)
            batch.Q.append(layer.Q)
        return list(batches.values())

    def _look(self, optimizer: torch.optim.Optimizer) -> _Known:
        """Return the layers as they are; look at them anew if anything has changed."""
        found = self._layers.found()
        known = self._known
        if known is not None and known.found is found:
            factors = known.factors
        else:
            factors = [x.P for x in found] + [x.Q for x in found]
        states = list(map(optimizer.state.get, factors, repeat(_EMPTY)))
        looks = _Looks(
            list(map(len, states)),
            [p.dtype for p in factors],  # which a module's own conversion changes in place
            [None if x.base is None else x.base.dtype for x in found],
            [None if (grad := p.grad) is None else grad.dtype for p in factors],
        )
        if known is None or not known.holds(found, states, looks):
            known = self._known = _Known(found, factors, states, looks, self._key_of)
        return known


_EMPTY: dict[str, Any] = {}


class _Looks(NamedTuple):
    """Sizes and dtypes, which may change while the tensors stay the same objects.

    Attributes:
        sizes: entries of the states, of every P and then of every Q.
        factors, grads: dtypes of those, None for no gradient.
        bases: dtypes of the base weights.
    """

    sizes: list[int]
    factors: list[torch.dtype]
    bases: list[torch.dtype | None]
    grads: list[torch.dtype | None]


class _Known:
    """Layers whose tensors were looked at, and which of them can be stacked.

    Args:
        found: the layers.
        factors: every P and then every Q.
        states: the optimizer's, of each of those.
        looks: sizes and dtypes of all their tensors.
        key_of: as for `Batching`.

    Attributes:
        numbers: for every layer the number of what must agree for layers to be stacked; None for
            one without gradients.
    """

    def __init__(
        self,
        found: list[FoundLayer],
        factors: list[nn.Parameter],
        states: list[dict[str, Any]],
        looks: _Looks,
        key_of: Callable[[LoRAPair], Hashable],
    ) -> None:
        self.found, self.factors = found, factors
        self._states, self._looks = states, looks
        layouts = [_layout(state) for state in states]
        self._counted = [
            (state, name)
            for state, (_, names) in zip(states, layouts, strict=True)
            for name in names
        ]
        self._ends = [0, *accumulate(len(names) for _, names in layouts)]
        numbers: dict[Hashable, int] = {}  # the keys are long
        self.numbers: list[int | None] = []
        for i, (P, Q) in enumerate(zip(factors[: len(found)], factors[len(found) :], strict=True)):
            places, x = (i, len(found) + i), found[i]
            if any(looks.grads[place] is None for place in places):
                self.numbers.append(None)
                continue
            own = [(looks.factors[p], looks.grads[p], layouts[p][0]) for p in places]
            like = P.shape, Q.shape, P.device, sharding.layout(P), x.scaling, looks.bases[i]
            key = (*like, *own, key_of(x.pair))
            self.numbers.append(numbers.setdefault(key, len(numbers)))

    def holds(self, found: list[FoundLayer], states: list[dict[str, Any]], looks: _Looks) -> bool:
        """Return whether this is known of these very layers and states."""
        same = found is self.found and looks == self._looks
        return same and all(map(is_, states, self._states))

    def counters(self) -> list[Hashable]:
        """Return every layer's counters; on the host, so reading them waits for nothing."""
        values = [float(state[name]) for state, name in self._counted]
        count, ends = len(self.found), self._ends
        if len(set(values)) <= 1:  # as in nearly every step
            return [None] * count
        own = [tuple(values[start:end]) for start, end in pairwise(ends)]
        return [(own[i], own[count + i]) for i in range(count)]


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
    return (tuple(tensors), tuple(counters)), counters


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
    return sharding.stack(P).flatten(2), sharding.own_columns(sharding.stack(Q), Q[0])
