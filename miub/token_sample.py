"""A random sample of the tokens of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSample:
    """Some positions of a batch, flattened.

    Attributes:
        index: (k,), on the device of the samples.
        valid: (k, 1), which of them are tokens; None: all are.
        count: the number of tokens among them, or a tensor () where counting would wait for the
            device.
    """

    index: Tensor
    valid: Tensor | None
    count: int | Tensor

    def columns_of(self, matrix: Tensor) -> Callable[[int, int], Tensor]:
        """Return a reader of the sampled rows of a matrix (positions, d), some columns at a time.

        It takes the first column and the end, and returns a new tensor (k, end - first), float32.
        """

        def read(start: int, end: int) -> Tensor:
            return self.fill(matrix[:, start:end].index_select(0, self.index).float())

        return read

    def fill(self, rows: Tensor) -> Tensor:
        """Put the mean of the tokens' rows (k, d), float32, in the place of padding's, in place.

        Such a row has no deviation: it scales all covariances of the samples alike, down by its
        share, and their ratios, and so the mutual information of their moments, not at all.  For
        estimates that are not of moments alone this is an approximation: `l1out` and `infonce` fall
        with the share of padding.
        """
        if self._padding is None:
            return rows
        padding, indicator, shares = self._padding
        rows.masked_fill_(padding, 0)
        return rows.addmm_(indicator, shares @ rows)

    @cached_property
    def _padding(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return which rows are padding, (k, 1), as bool and float32; shares of the mean, (1, k).

        Made once for all layers of the sample.
        """
        if self.valid is None:
            return None
        padding = ~self.valid
        # Not of two integers: that quotient is in torch's default dtype.
        return padding, padding.float(), self.valid.mT.float() / self.valid.sum().clamp_min(1)

    def interleaved(self) -> TokenSample:
        """Return the same positions, every second one first: each half has its share of tokens."""
        if self.valid is None:
            return self
        return TokenSample(_interleaved(self.index), _interleaved(self.valid), self.count)


def _interleaved(rows: Tensor) -> Tensor:
    return torch.cat([rows[0::2], rows[1::2]])


def sample_tokens(
    mask: Tensor | None,
    positions: int,
    tokens: int,
    device: torch.device,
    generator: torch.Generator,
) -> TokenSample:
    """Sample ``tokens`` of the positions without replacement; all if there are fewer.

    A mask on the CPU is counted, and padding is never sampled.  A mask on another device is not:
    the count would wait for it.  There too padding is sampled only where there are too few tokens,
    and then `TokenSample.fill` makes it neutral.

    Args:
        mask: (positions,), nonzero for tokens; None: all are.
        positions: the number of positions.
        tokens: the number to sample.
        device: of the samples.
        generator: on that device.
    """
    k = min(tokens, positions)
    score = torch.rand(positions, generator=generator, device=device)
    if mask is None:
        return TokenSample(score.topk(k).indices, None, k)
    is_token = mask > 0
    if mask.device.type != "cpu":
        return sample_uncounted(is_token.to(device), score, k)
    k = min(k, int(is_token.sum()))
    # Not blocking, which would wait for all that the device has yet to do.
    score.masked_fill_(~is_token.to(device, non_blocking=True), -1.0)
    return TokenSample(score.topk(k).indices, None, k)


def sample_uncounted(is_token: Tensor, score: Tensor, k: int) -> TokenSample:
    """Return the k positions of the highest scores, tokens first; nothing is read on the host.

    Args:
        is_token: (positions,), bool.
        score: (positions,), in [0, 1), on the same device; overwritten.
        k: at most the number of positions.
    """
    index = score.masked_fill_(~is_token, -1.0).topk(k).indices
    valid = is_token.index_select(0, index).unsqueeze(-1)
    return TokenSample(index, valid, valid.sum())


def mask_of(mask: Tensor | None, leading: torch.Size, *, cached: bool = False) -> Tensor | None:
    """Return the attention mask of a layer's positions, flattened; None where it has no say.

    Args:
        mask: (batch, sequence) or None.
        leading: shape of the layer's outputs without the last axis: (batch, sequence), the two the
            other way round or flattened.  Any other, such as a pooled (batch,), the tokens routed
            to one expert, fewer positions than a sound wave has samples, or an image's (batch,
            height, width), is taken to have no padding.
        cached: whether a cache holds what came before: then (batch, part of the sequence) is the
            sequence's end.
    """
    if mask is None or mask.ndim != 2:
        return None
    if leading == mask.shape or leading in ((mask.numel(),), (1, mask.numel())):
        return mask.flatten()
    if leading == mask.shape[::-1]:
        return mask.T.flatten()
    if cached and len(leading) == 2 and leading[0] == mask.shape[0] and leading[1] < mask.shape[1]:
        return mask[:, -leading[1] :].flatten()
    return None
