"""Models that wrappers and engines have made into what cannot be re-based.

Held by tests/sharding/test_deepspeed.py and tests/sharding/test_sharded_training.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from scalora import peft_layers, sharding
from scalora.moments import Moments
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair


def check_processes(
    optimizer: torch.optim.Optimizer,
    places: Mapping[LoRAPair, str],
    options: RebasingOptions,
    moments: Moments,
) -> None:
    """Raise a ValueError if the parameters, as wrappers have made them, cannot be re-based.

    Wrappers (accelerate, DeepSpeed) shard a model after its optimizer was made.

    Args:
        optimizer: the inner one.
        places: layer -> "dense" or "carry", where its increments go.
        options: the user's.
        moments: how the optimizer's state depends on the gradient.
    """
    for pair, place in places.items():
        if not sharding.is_sharded(pair.P_parameter):
            continue
        in_place = peft_layers.why_not_dense if place == "dense" else None
        reason = (in_place or peft_layers.why_no_carry)(pair)
        if reason is not None:
            raise ValueError(f"{pair.name!r} cannot be re-based any more: {reason}.")
    spread = sharding.layouts(pair.P_parameter for pair in places)
    if not spread:
        return
    if len(spread) > 1 or not all(sharding.is_sharded(pair.P_parameter) for pair in places):
        raise ValueError(
            "LoRA layers are sharded in different ways: call fully_shard with one mesh for all of "
            "them, or leave the others out of target_modules."
        )
    if not moments.can_be_sharded:
        raise ValueError(
            f"the state of {type(optimizer).__name__} cannot be re-based where it is sharded: use "
            "an optimizer of torch.optim other than Adafactor."
        )
    if options.rounding == "compensated":
        raise ValueError(
            "rounding='compensated' keeps a residual beside every base weight, which a checkpoint "
            "of a sharded model would lose: use rounding='stochastic'."
        )


def check_engine(model: nn.Module) -> None:
    """Raise a ValueError if an engine keeps the parameters in a way that is not supported."""
    reason = sharding.why_sharding_unsupported(model)
    if reason is not None:
        raise ValueError(
            f"ScaLoRA cannot re-base this model: {reason}. Use torch.distributed.fsdp.fully_shard "
            "(accelerate: fsdp_version=2), or DistributedDataParallel."
        )
