"""Layers that are no longer those that an optimizer was made for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from scalora.peft_layers import LoRAPair


def checked_factors(
    pairs: Iterable[LoRAPair], optimizer: torch.optim.Optimizer, owner: object
) -> list[nn.Parameter]:
    """Return P and Q of every layer in turn, or raise if the optimizer no longer fits the model.

    They are looked up here, once per step: for hundreds of layers a look-up takes its time.

    Args:
        pairs: the layers to re-base.
        optimizer: the inner one.
        owner: whoever claimed the layers when it was made (`LoRAPair.claim`).

    Raises:
        ValueError: an adapter was deleted, another ScaLoRA has taken over, factors were replaced,
            or the state is not where, or of the dtype that, the factors are.
    """
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    factors: list[nn.Parameter] = []
    for pair in pairs:
        if not pair.exists:
            raise ValueError(
                f"{pair.name!r} has no adapter {pair.adapter!r} any more: it was deleted. Make a "
                "new optimizer over the adapter to train, or put this one aside."
            )
        if not pair.belongs_to(owner):
            raise ValueError(
                f"another ScaLoRA, made later, re-bases {pair.name!r} too, and each would take the "
                "other's moments for its own: step the newest only, and give it all parameters."
            )
        P, Q = pair.P_parameter, pair.Q_parameter
        if id(P) not in stepped or id(Q) not in stepped:
            raise ValueError(
                f"the factors of {pair.name!r} are no longer parameters that this optimizer "
                "steps: they were replaced (the adapter deleted and added, the model converted or "
                "sharded) or taken out. Make a new optimizer over model.parameters(); call "
                "fully_shard before it is made, or let accelerate do both. DeepSpeed replaces them "
                "under ZeRO and in half precision: use FSDP2 (fully_shard) or DDP instead."
            )
        factors += (P, Q)
    if factors:
        _check_state(factors[0], optimizer)
    return factors


def _check_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if a factor and its state are on two devices or of two dtypes.

    A model is moved or converted as one, so one parameter tells.
    """
    if not type(optimizer).__module__.startswith("torch.optim."):
        return  # others may keep their state elsewhere on purpose
    for value in optimizer.state.get(parameter, {}).values():
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        if (value.device, value.dtype) != (parameter.device, parameter.dtype):
            raise ValueError(
                f"the adapter is {parameter.dtype} on {parameter.device} now, its optimizer's "
                f"state {value.dtype} on {value.device}: the model was moved or converted after "
                "training had begun. Call optimizer.load_state_dict(optimizer.state_dict()), "
                "which brings the state along."
            )
