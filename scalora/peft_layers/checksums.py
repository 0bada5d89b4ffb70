"""Checksums of weights and adapters, which tell whether two belong together.

Held by tests/sharding/test_distributed.py and tests/resuming/test_training_state.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scalora import sharding
from scalora.peft_layers.pair import LoRAPair


@torch.no_grad()
def base_checksums(pairs: Sequence[LoRAPair]) -> dict[str, int]:
    """Return layer name -> sum of the base weight's bits.  Waits for the device once."""
    return checksums({pair.name: pair.base_weight for pair in pairs})


@torch.no_grad()
def adapter_checksums(pairs: Sequence[LoRAPair]) -> dict[str, int]:
    """Return ``lora_B:`` or ``lora_A:`` and layer name -> sum of the factor's bits in float32.

    Float32, because PEFT loads half-precision adapters as such.  Waits for the device once.
    """
    factors: dict[str, Tensor] = {f"lora_B:{pair.name}": pair.P_parameter for pair in pairs}
    factors |= {f"lora_A:{pair.name}": pair.Q_parameter for pair in pairs}
    return checksums({name: factor.float() for name, factor in factors.items()})


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return name -> sum of the tensor's bits over all processes.  Waits for the device once."""
    if not tensors:
        return {}
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        sharding.local(t).detach().view(words[t.element_size()]).sum(dtype=torch.int64)
        for t in tensors.values()
    ]
    for like in sharding.layouts(tensors.values()):
        alike = [
            i for i, t in enumerate(tensors.values()) if sharding.layout(t) == sharding.layout(like)
        ]
        total = sharding.rows_of(like).sum(torch.stack([sums[i] for i in alike]))
        for i, value in zip(alike, total.unbind(), strict=True):
            sums[i] = value
    return dict(
        zip(tensors, torch.stack([s.to(sums[0].device) for s in sums]).tolist(), strict=True)
    )
