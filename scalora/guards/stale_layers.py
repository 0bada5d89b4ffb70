"""Whether the model's layers are still those that an optimizer was made for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalora.guards.factor_watch import FactorWatch, watch_factors
from scalora.peft_layers import LoRAPair
from scalora.warning import warn


def checked_factors(
    pairs: Sequence[LoRAPair], optimizer: torch.optim.Optimizer, owner: object
) -> list[nn.Parameter]:
    """P and Q of every layer in turn, if a step will be what it seems.

    They are looked up here, once a step: of hundreds of layers that takes its time.

    Args:
        pairs: the layers to re-base.
        optimizer: the inner one.
        owner: whoever re-bases them.

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


def watched_factors(places: Mapping[LoRAPair, str]) -> FactorWatch | None:
    """Watch whether factors are put back, from now on; None if no layer is re-based.

    Args:
        places: layer -> "dense" or "carry".
    """
    # A carry tells more: it is left behind even where a model's whole state is put back.  And of
    # an embedding, some columns may never change.
    order = sorted(places, key=lambda pair: (places[pair] != "carry", pair.is_embedding))
    return watch_factors(order[0], folds=places[order[0]] == "dense") if order else None


def _check_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """A model is moved or converted as one, so one parameter tells."""
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


def warn_without_gradients(param_groups: Iterable[dict[str, Any]]) -> None:
    """Warn if no parameter has a gradient, which is what an optimizer of another model finds."""
    if all(p.grad is None for group in param_groups for p in group["params"]):
        warn(
            "no parameter of this optimizer has a gradient, so the step does nothing. Was the "
            "model made anew after its optimizer, or another adapter activated? Make the optimizer "
            "over the parameters that are trained."
        )
