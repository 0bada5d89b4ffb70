"""Which positions of a forward pass are sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """Some positions of a batch, flattened.

    Attributes:
        index: (k,), on the device of what is sampled.
        valid: (k, 1), which of them are tokens, or None: all are.
        count: how many are: a number, or a tensor () where counting would wait for the device.
    """

    index: Tensor
    valid: Tensor | None
    count: int | Tensor

    def fill(self, rows: Tensor) -> Tensor:
        """Put the mean of the tokens' rows (k, d) in the place of rows that are padding.

        Such a row has no deviation: it scales all covariances of the samples alike, down by its
        share, and their ratios, and so the mutual information of their moments, not at all.
        """
        if self.valid is None:
            return rows
        kept = torch.where(self.valid, rows, 0)
        mean = kept.sum(0) / self.valid.sum().clamp_min(1)
        return torch.where(self.valid, kept, mean)


def draw(
    mask: Tensor | None,
    positions: int,
    tokens: int,
    device: torch.device,
    generator: torch.Generator,
) -> Draw:
    """``tokens`` of the positions at random, without replacement; all if there are fewer.

    A mask on the CPU is counted, and padding is never drawn.  A mask on another device is not: the
    count would wait for it.  There too padding is drawn only where there are too few tokens, and
    then `Draw.fill` makes it neutral.

    Args:
        mask: (positions,), nonzero for tokens; None: all are.
        positions: how many there are.
        tokens: how many to draw.
        device: of the samples.
        generator: on that device.
    """
    k = min(tokens, positions)
    score = torch.rand(positions, generator=generator, device=device)
    if mask is None:
        return Draw(score.topk(k).indices, None, k)
    is_token = mask.to(device, non_blocking=True) > 0
    score = torch.where(is_token, score, -1.0)
    if mask.device.type == "cpu":
        k = min(k, int((mask > 0).sum()))
        return Draw(score.topk(k).indices, None, k)
    index = score.topk(k).indices
    valid = is_token.index_select(0, index).unsqueeze(-1)
    return Draw(index, valid, valid.sum())


def mask_of(mask: Tensor | None, leading: torch.Size) -> Tensor | None:
    """The attention mask of a layer's positions, flattened; None where it says nothing of them.

    Args:
        mask: (batch, sequence) or None.
        leading: shape of the layer's outputs without the last axis: (batch, sequence), the two
            flattened, or (batch, part of the sequence) when a cache holds what came before.  Any
            other, such as a pooled (batch,) or an image's (batch, height, width), has no padding.
    """
    if mask is None or mask.ndim != 2:
        return None
    if leading.numel() == mask.numel() and len(leading) <= 2:
        return mask.flatten()
    if len(leading) == 2 and leading[0] == mask.shape[0] and leading[1] < mask.shape[1]:
        return mask[:, -leading[1] :].flatten()
    return None
