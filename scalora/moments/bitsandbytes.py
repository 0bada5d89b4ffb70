"""bitsandbytes' optimizers: which are known, and how they keep their state.

A parameter has ``state1`` and, for some, ``state2``: float32, or uint8 codes with a map of levels
``qmap`` and one ``absmax`` a block (`scalora.moments.blockwise`).  Tensors of fewer than
``min_8bit_size`` elements, 4096 by default, are float32 also in the 8-bit optimizers.  ``step`` is
a Python number.  bitsandbytes itself is never imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scalora.moments import Moments, directions, register_by_name, transfer
from scalora.moments.blockwise import BLOCK, decode, transfer_codes
from scalora.moments.directions import Group, State
from scalora.sharding.stacks import Write, stack

_States = Sequence[Mapping[str, Any]]  # of the layers of a batch

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
        """What the optimizer calls its tensors."""
        return self.holds.keys() | _CODE_TABLES


def _momentum(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """SGD: bitsandbytes takes ``dampening`` and ``nesterov`` and does without."""
    plain = {"momentum": group["betas"][0], "dampening": 0.0, "nesterov": False}
    return directions.sgd(param, grad, state, plain)


def _rmsprop(param: Tensor, grad: Tensor, state: State, group: Group) -> Tensor:
    """RMSprop: bitsandbytes takes ``momentum`` and does without."""
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
for _module, _name, _spellings, _entry in _CLASSES:
    for _spelling in _spellings:
        register_by_name(f"bitsandbytes.optim.{_module}.{_spelling.format(_name)}", _entry)


def decoded_states(
    moments: BitsandbytesMoments, states: _States, device: torch.device
) -> dict[str, Tensor]:
    """What the states hold, float32, by torch's names: (layers, *parameter shape) each."""
    decoded: dict[str, Tensor] = {}
    for name, held in moments.holds.items():
        if name not in states[0]:
            continue
        value = _stacked(states, name, device)
        if value.dtype == torch.uint8:
            absmax, level_map = _code_tables(states, name, device)
            value = decode(value, absmax, level_map)
        decoded |= zip(held, value.unbind(1) if len(held) > 1 else (value,), strict=True)
    return decoded


def moved_tensors(
    moments: BitsandbytesMoments,
    states: _States,
    device: torch.device,
    factor: Tensor,
    axis: int,
) -> list[Write]:
    """(targets, old, new) of every tensor that is not of degree 0.

    Args:
        moments: the optimizer's.
        states: of each layer of the batch.
        device: the parameters'.
        factor: (layers, r), as in `transfer`.
        axis: which axis of (layers, *parameter shape) runs over the r columns.
    """
    moved: list[Write] = []
    for name, held in moments.holds.items():
        degree, rank_axis = moments.degrees[held[0]], axis + (len(held) > 1)
        if name not in states[0] or degree == 0:
            continue
        targets, old = _tensors(states, name), _stacked(states, name, device)
        if old.dtype != torch.uint8:
            moved.append((targets, old, transfer(old, factor, degree, rank_axis)))
            continue
        absmax, level_map = _code_tables(states, name, device)
        codes, new_absmax = transfer_codes(old, absmax, level_map, factor, degree, rank_axis)
        moved.append((targets, old, codes))
        moved.append((_tensors(states, name.replace("state", "absmax")), absmax, new_absmax))
    return moved


def _code_tables(states: _States, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """What decodes ``state1`` or ``state2``: absmax (layers, ..., blocks) and the map of levels."""
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


def _stacked(states: _States, name: str, device: torch.device) -> Tensor:
    """(layers, ...), on the parameters' device.

    Paged states are managed memory, which torch takes for the host's: those are waited for, as
    bitsandbytes itself does at the end of every paged step.
    """
    return stack(_tensors(states, name)).to(device)


def _tensors(states: _States, name: str) -> list[Tensor]:
    return [_in_memory_order(state[name]) for state in states]


def _in_memory_order(value: Tensor) -> Tensor:
    """As the kernels see it.

    For a parameter in ``channels_last`` the state has that layout too, but kernels of accelerators
    take both for flat memory (those of the CPU go by index).
    """
    if value.is_contiguous() or value.device.type == "cpu":
        return value
    strides = torch.empty(value.shape, device="meta").stride()
    return value.as_strided(value.shape, strides)
