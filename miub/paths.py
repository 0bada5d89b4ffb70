"""The two paths of a LoRA layer as samples, one row per token.

Held by tests/miub/test_monitor.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scalora.peft_layers import LoRAPair
from scalora.saving.pretrained import change_since

# A change that was folded over many re-basings has no fixed rank; this many coordinates hold it.
MOST_COORDINATES = 64
# Inputs in float32 that are held at once: 2 MiB, 128 tokens of a layer with 4096 inputs.
_AT_ONCE = 2**19


def adapter_code(pair: LoRAPair, inputs: Tensor, index: Tensor) -> Tensor:
    """Return ``s P Q^T x`` in an orthonormal basis of P's columns: (k, c), or (k, m) if c > m.

    P and Q hold the c columns of the adapter and of its carry: everything that was learned beside
    the base.  Mutual information does not change under injective maps, and the noise is isotropic,
    so any such basis will do.
    """
    # P = O R. A QR, unlike an SVD, does not wait for the device.
    triangle = torch.linalg.qr(pair.learned_P.float(), mode="r")[1]
    tokens = max(1, _AT_ONCE // inputs.shape[-1])
    codes = torch.cat([pair.code(inputs, part).float() for part in index.split(tokens)])
    return pair.scaling * (codes @ triangle.T)


def learned_since(
    pair: LoRAPair,
    weights: Mapping[str, Tensor],
    inputs: Tensor,
    outputs: Tensor,
    index: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the pretrained path (k, m), and all that was learned since in at most 64 coordinates.

    Waits for the device where the weights are on another.

    Args:
        pair: a layer whose base has taken in increments.
        weights: name -> pretrained weight.
        inputs: of the layer.
        outputs: (k, m), of its base layer now.
        index: (k,), the positions.
        generator: for the range finder (Halko, Martinsson and Tropp 2011) of the change's columns.
    """
    change = pair.as_matrix(change_since(pair, weights)).float()
    base_now = pair.as_matrix(pair.base_weight).float()
    folded = change - (pair.as_matrix(pair.effective_weight()).float() - base_now)
    coordinates = min(*change.shape, 8 * pair.rank, MOST_COORDINATES)
    probes = torch.randn(change.shape[1], coordinates, generator=generator, device=change.device)
    basis = torch.linalg.qr(change @ probes)[0]
    frozen = outputs - pair.mapped(folded, inputs, index)
    return frozen, pair.mapped(basis.T @ change, inputs, index)
