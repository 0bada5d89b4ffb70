"""Layers that are not, or no longer, what an optimizer can re-base or its state was saved with.

Held by tests/guards/test_situations.py, tests/sharding/test_deepspeed.py and
tests/sharding/test_sharded_training.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scalora import peft_layers, sharding
from scalora.fold import is_rounded
from scalora.moments import Moments
from scalora.options import RebasingOptions
from scalora.peft_layers import LayerLookup, LoRAPair


def check_engine(model: nn.Module) -> None:
    """Raise a ValueError if an engine keeps the parameters in a way that is not supported."""
    reason = sharding.why_sharding_unsupported(model)
    if reason is not None:
        raise ValueError(
            f"ScaLoRA cannot re-base this model: {reason}. Use torch.distributed.fsdp.fully_shard "
            "(accelerate: fsdp_version=2), or DistributedDataParallel."
        )


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
    folded = [pair.base_weight for pair, place in places.items() if place == "dense"]
    if options.rounding == "compensated" and any(is_rounded(base.dtype) for base in folded):
        raise ValueError(
            "rounding='compensated' keeps a residual beside every base weight in half precision, "
            "which a checkpoint of a sharded model would lose: use rounding='stochastic'."
        )


class CheckedFactors:
    """Checks the layers of an optimizer in every step, one by one only if something has changed.

    Args:
        layers: finds their tensors.
        owner: whoever claimed the layers when it was made (`LoRAPair.claim`).
    """

    def __init__(self, layers: LayerLookup, owner: object) -> None:
        self._layers = layers
        self._owner = owner
        self._stepped: list[list[int]] | None = None  # ids of the parameters, as they were checked
        self._factors: list[nn.Parameter] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stepped": None, "_factors": []}

    def of(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        """Return P and Q of every layer in turn.

        Args:
            optimizer: the inner one.

        Raises:
            ValueError: an adapter was deleted, another ScaLoRA has taken over, or factors were
                replaced; or the state is not where, or of the dtype that, the factors are.
        """
        stepped = [list(map(id, group["params"])) for group in optimizer.param_groups]
        if stepped != self._stepped or not self._layers.has_same_factors:
            self._stepped = None
            self._factors = _checked(self._layers.pairs, optimizer, self._owner)
            self._layers.found()
            self._stepped = stepped
        if self._factors:
            _check_state(self._factors[0], optimizer)
        return self._factors


def check_adapters(pairs: Iterable[LoRAPair]) -> None:
    """Raise a ValueError if the adapter of a layer was deleted."""
    for pair in pairs:
        if not pair.exists:
            raise ValueError(
                f"{pair.name!r} has no adapter {pair.adapter!r} any more: it was deleted. Make a "
                "new optimizer over the adapter to train, or put this one aside."
            )


def _checked(
    pairs: Sequence[LoRAPair], optimizer: torch.optim.Optimizer, owner: object
) -> list[nn.Parameter]:
    """Return P and Q of every layer in turn, or raise if the optimizer no longer fits."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    factors: list[nn.Parameter] = []
    check_adapters(pairs)
    for pair in pairs:
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


@dataclass
class ExpectedWeights:
    """Checksums of a loaded state, which the next step verifies, then drops.

    Attributes:
        base: layer name -> checksum of the base weight, where increments went into it.
        adapter: factor -> checksum, where a carry belongs to it.
        in_file: whether the state itself is in a Trainer's checkpoint, and still to be loaded.
    """

    base: Mapping[str, int] = field(default_factory=dict)
    adapter: Mapping[str, int] = field(default_factory=dict)
    in_file: bool = False

    def expect(self, own: Mapping[str, Any] | None) -> None:
        """Expect what a state of re-basing was saved with; None expects nothing."""
        own = own or {}
        self.base, self.adapter = own.get("base", {}), own.get("adapter", {})
        self.in_file = own.get("in_file", False)

    def verify(self, pairs: Sequence[LoRAPair]) -> None:
        """Check the layers' weights, then expect nothing.  Waits for the device if at all.

        Args:
            pairs: all layers that are re-based.

        Raises:
            ValueError: the weights are not those of the state; they stay expected.
        """
        if self.in_file:
            raise ValueError(
                "this optimizer state is from a Trainer's checkpoint, which has the rest in "
                "scalora.safetensors: call scalora.load_training_state(optimizer, folder) after "
                "load_state_dict and before the first step, or give the Trainer a ScaLoRACallback."
            )
        if self.adapter:
            found = peft_layers.adapter_checksums(pairs)
            if name := _differing(self.adapter, found):
                raise ValueError(
                    f"the model's adapter is not the one this optimizer state was saved with "
                    f"({name!r} differs), and the carry in it belongs to that one: load the "
                    "adapter of the same checkpoint before the first step."
                )
        if self.base:
            found = peft_layers.base_checksums([pair for pair in pairs if pair.name in self.base])
            if name := _differing(self.base, found):
                raise ValueError(
                    f"the base weight of {name!r} is not the one this optimizer state was saved "
                    "with: what had been folded into it would be lost. Load the model's full "
                    "state_dict, or scalora.load_training_state, before the first step (or drop "
                    "the state's 'scalora' entry to begin re-basing anew on this base)."
                )
        self.expect(None)


def _differing(expected: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    return next((name for name, value in expected.items() if found[name] != value), None)
