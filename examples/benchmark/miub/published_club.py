"""The CLUB estimators as their paper describes them (Cheng et al. 2020, arXiv 2006.12013)."""

from __future__ import annotations

import torch
from torch import Tensor

_HIDDEN, _STEPS, _RATE = 64, 300, 5e-3


def vclub(u: Tensor, v: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the paper's vCLUB (section 3.2) and vCLUB-S (section 3.3) of batches, in nats.

    The variational q(v|u) is a Gaussian with diagonal covariance.  Its mean and its log variance
    are networks of one hidden layer of 64 rectified units, the log variance through a tanh.  It is
    trained by maximum likelihood on all samples, 300 steps of Adam at 5e-3, and evaluated on the
    same samples.  vCLUB takes all pairs as negative ones, vCLUB-S one permutation.

    Args:
        u, v: (batch, N, d_u), (batch, N, d_v); each of the batch has networks of its own.
        seed: of the networks and of the permutation.

    Returns:
        Both, (batch,).
    """
    generator = torch.Generator(u.device).manual_seed(seed)
    mean = _network(u, v, generator)
    spread = _network(u, v, generator)
    optimizer = torch.optim.Adam([*mean, *spread], lr=_RATE)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        log_variance = _output(spread, u).tanh()
        loss = (v - _output(mean, u)).square() / log_variance.exp() + log_variance
        loss.sum(-1).mean(-1).sum().backward()
        optimizer.step()
    order = torch.randperm(u.shape[-2], generator=generator, device=u.device)
    with torch.no_grad():
        centre, precision = _output(mean, u), (-_output(spread, u).tanh()).exp()
        # The log determinant is that of u_i in both terms, and cancels.
        positive = ((v - centre).square() * precision).sum(-1)
        mean_v, mean_square = (x.mean(-2, keepdim=True) for x in (v, v.square()))
        all_pairs = ((mean_square - 2 * centre * mean_v + centre.square()) * precision).sum(-1)
        permuted = ((v[..., order, :] - centre).square() * precision).sum(-1)
        return (all_pairs - positive).mean(-1) / 2, (permuted - positive).mean(-1) / 2


def _network(u: Tensor, v: Tensor, generator: torch.Generator) -> list[Tensor]:
    batch = u.shape[:-2]
    weights = []
    for inputs, outputs in ((u.shape[-1], _HIDDEN), (_HIDDEN, v.shape[-1])):
        for shape in ((*batch, inputs, outputs), (*batch, 1, outputs)):
            # Uniform within 1 / sqrt(inputs), as torch's linear layers begin.
            uniform = torch.rand(shape, generator=generator, device=u.device)
            weights.append(((2 * uniform - 1) / inputs**0.5).requires_grad_())
    return weights


def _output(weights: list[Tensor], u: Tensor) -> Tensor:
    return (u @ weights[0] + weights[1]).relu() @ weights[2] + weights[3]
