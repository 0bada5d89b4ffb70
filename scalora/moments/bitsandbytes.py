"""bitsandbytes' optimizers: those that are known, and the format of their state.

Held by tests/moments/test_bitsandbytes_states.py.

A parameter has ``state1`` and, for some, ``state2``: float32, or uint8 codes with a map of levels
``qmap`` and one ``absmax`` a block (`scalora.moments.blockwise`).  Tensors of fewer than
``min_8bit_size`` elements, 4096 by default, are float32 also in the 8-bit optimizers.  ``step`` is
a Python number.  bitsandbytes itself is never imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scalora import sharding
from scalora.moments import directions
from scalora.moments.blockwise import BLOCK, decode, transfer_codes
from scalora.moments.directions import Group, State
from scalora.moments.history import Column, Kept, Moved, Powers, sums, transfer
from scalora.moments.moments import Moments, States

_CODE_TABLES = {"qmap1", "absmax1", "qmap2", "absmax2"}


@dataclass(frozen=True)
class BitsandbytesMoments(Moments):
    """`Moments` of one of bitsandbytes' optimizers, under the names that torch gives its states.

    Attributes:
        holds: bitsandbytes' name of a tensor -> the names of the states in it.  Several are stacked
            along an axis of their own, in front of the parameter's, and have one degree.
    """

    holds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def tensor_names(self) -> set[str]:
        """The optimizer's names of its tensors."""
        return self.holds.keys() | _CODE_TABLES

    @property
    def can_be_sharded(self) -> bool:
        """False: the kernels know nothing of shards."""
        return False

    def stacked(self, states: States, device: torch.device) -> dict[str, Tensor]:
        """Return the state by torch's names, decoded: (layers, *parameter shape), float32."""
        decoded: dict[str, Tensor] = {}
        for name, held in self.holds.items():
            if name not in states[0]:
                continue
            value = _stacked(states, name, device)
            if value.dtype == torch.uint8:
                absmax, level_map = _code_tables(states, name, device)
                value = decode(value, absmax, level_map)
            decoded |= zip(held, value.unbind(1) if len(held) > 1 else (value,), strict=True)
        return decoded

    def kept(
        self, states: States, parameter: Tensor, axis: int, optimizer: str
    ) -> tuple[list[Column], list[Kept]]:
        """Return all that is not of degree 0, as `Moments.kept` does."""
        columns: list[Column] = []
        others: list[Kept] = []
        for name, held in self.holds.items():
            degree = self.degrees[held[0]]
            if name not in states[0] or degree == 0:
                continue
            first = states[0][name]
            if first.dtype != torch.uint8 and len(held) == 1 and first.device == parameter.device:
                columns.append(Column(_tensors(states, name), degree))
            else:
                rank_axis = axis + (len(held) > 1)
                others.append(_Encoded(states, name, degree, rank_axis, parameter.device))
        return columns, others


@dataclass(frozen=True)
class _Encoded:
    """A tensor that cannot be stacked with its parameter: codes, two averages, or paged memory.

    Attributes:
        states: of one factor of every layer of a batch.
        name: of the tensor.
        degree: of homogeneity in the gradient history.
        axis: which axis of (layers, *shape) runs over the r columns.
        device: the parameters'.
    """

    states: States
    name: str
    degree: int
    axis: int
    device: torch.device

    def sums(self) -> Tensor:
        """Return (layers,) sums, of codes those of their scales."""
        is_codes = self.states[0][self.name].dtype == torch.uint8
        name = self._absmax if is_codes else self.name
        return sums(_stacked(self.states, name, self.device).unsqueeze(0))

    def moved(self, powers: Powers, layers: slice) -> list[Moved]:
        """Return the tensor in the new coordinates, of codes their scales as well."""
        factor, old = powers.factor[layers], _stacked(self.states, self.name, self.device)
        if old.dtype != torch.uint8:
            return [self._moved(self.name, old, transfer(old, factor, self.degree, self.axis))]
        absmax, level_map = _code_tables(self.states, self.name, self.device)
        new = transfer_codes(old, absmax, level_map, factor, self.degree, self.axis)
        return [self._moved(self.name, old, new[0]), self._moved(self._absmax, absmax, new[1])]

    @property
    def _absmax(self) -> str:
        return self.name.replace("state", "absmax")

    def _moved(self, name: str, old: Tensor, new: Tensor) -> Moved:
        return Moved([_tensors(self.states, name)], old.unsqueeze(0), new.unsqueeze(0))


def _momentum(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return SGD's; bitsandbytes accepts ``dampening`` and ``nesterov`` and ignores them."""
    plain = {"momentum": group["betas"][0], "dampening": 0.0, "nesterov": False}
    return directions.sgd(param, grad, state, plain)


def _rmsprop(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """Return RMSprop's; bitsandbytes accepts ``momentum`` and ignores it."""
    plain = {"alpha": group["betas"][0], "eps": group["eps"], "centered": False, "momentum": 0.0}
    return directions.rmsprop(param, grad, state, plain)


def _adagrad(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    return directions.adagrad(param, grad, state, {"eps": group["eps"], "lr_decay": 0.0})


_ADAM = BitsandbytesMoments(
    {"exp_avg": 1, "exp_avg_sq": 2},
    directions.adam,
    holds={"state1": ("exp_avg",), "state2": ("exp_avg_sq",)},
)
_LION = BitsandbytesMoments({"exp_avg": 1}, directions.lion, holds={"state1": ("exp_avg",)})
_ADEMAMIX = BitsandbytesMoments(
    {"exp_avg": 1, "exp_avg_slow": 1, "exp_avg_sq": 2},
    directions.ademamix,
    holds={"state1": ("exp_avg", "exp_avg_slow"), "state2": ("exp_avg_sq",)},
)
_SGD = BitsandbytesMoments(
    {"momentum_buffer": 1}, _momentum, direction_degree=1, holds={"state1": ("momentum_buffer",)}
)
_RMSPROP = BitsandbytesMoments({"square_avg": 2}, _rmsprop, holds={"state1": ("square_avg",)})
_ADAGRAD = BitsandbytesMoments({"sum": 2}, _adagrad, holds={"state1": ("sum",)})

_ANY_BITS = ("{}", "{}8bit", "{}32bit")
_PAGED_TOO = (*_ANY_BITS, "Paged{}", "Paged{}8bit", "Paged{}32bit")
# LAMB and LARS are not here: their step depends on the norms of whole parameters.  Nor are
# AdEMAMix32bit and its paged twin, which have room for one of the two averages and cannot step.
_CLASSES: list[tuple[str, str, Sequence[str], BitsandbytesMoments]] = [
    ("adam", "Adam", _PAGED_TOO, _ADAM),
    ("adamw", "AdamW", _PAGED_TOO, _ADAM),
    ("lion", "Lion", _PAGED_TOO, _LION),
    ("ademamix", "AdEMAMix", ("{}", "{}8bit", "Paged{}", "Paged{}8bit"), _ADEMAMIX),
    ("sgd", "SGD", _ANY_BITS, _SGD),
    ("rmsprop", "RMSprop", _ANY_BITS, _RMSPROP),
    ("adagrad", "Adagrad", _ANY_BITS, _ADAGRAD),
]
BY_NAME: dict[str, Moments] = {
    f"bitsandbytes.optim.{module}.{spelling.format(name)}": entry
    for module, name, spellings, entry in _CLASSES
    for spelling in spellings
}
"""``module.qualname`` of a class -> its entry."""


def _code_tables(states: States, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what decodes ``state1`` or ``state2``: absmax (layers, ..., blocks), map of levels."""
    absmax = _stacked(states, name.replace("state", "absmax"), device)
    elements = states[0][name][0].numel()
    if absmax.ndim == 3 and device.type != "cpu" and elements % BLOCK:
        raise TypeError(
            "bitsandbytes' 8-bit AdEMAMix lets the last block of one average and the first block "
            f"of the other overwrite each other's scale on {device.type!r} when a tensor's size "
            f"(here {elements}) is not a multiple of {BLOCK}, so that neither can be read back. "
            "Nothing was changed. Use optim_bits=32, or a min_8bit_size above that size."
        )
    return absmax, states[0][name.replace("state", "qmap")]


def _stacked(states: States, name: str, device: torch.device) -> Tensor:
    """Return (layers, ...), on the parameters' device.

    Paged states are managed memory, which torch takes for the host's: those are waited for, as
    bitsandbytes itself does at the end of every paged step.
    """
    return sharding.stack(_tensors(states, name)).to(device)


def _tensors(states: States, name: str) -> list[Tensor]:
    return [_in_memory_order(state[name]) for state in states]


def _in_memory_order(value: Tensor) -> Tensor:
    """Return a state as the kernels see it.

    For a parameter in ``channels_last`` the state has that layout too, but kernels of accelerators
    take both for flat memory (those of the CPU go by index).
    """
    if value.is_contiguous() or value.device.type == "cpu":
        return value
    strides = torch.empty(value.shape, device="meta").stride()
    return value.as_strided(value.shape, strides)
