"""A linear layer that has to move by more ranks than an adapter has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from scalora.ablation.task import Split, Task

_SIZE, _RANKS, _BATCH = 64, 16, 32
Pairs = tuple[Tensor, Tensor]


class Linear(nn.Module):
    """``x -> W x`` without a bias; a module around the layer, so that PEFT has one to replace."""

    def __init__(self, weight: Tensor) -> None:
        """Copy a weight, (outputs, inputs)."""
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (batch, inputs) to outputs (batch, outputs)."""
        y: Tensor = self.linear(x)
        return y


class Regression(Task):
    """Least squares: W, 64 x 64, moves towards a target that is 16 equal ranks away.

    Inputs are Gaussian with a spread that falls evenly from 2 in the first coordinate to 0.2 in
    the last. The target is the pretrained W plus a multiple of U V^T with Gaussian U, V: (64, 16);
    the multiple makes the loss 209 before training. The expected loss is known in closed form, so
    validation and test are one number, without sampling noise.

    Scores: ``loss``, the mean over inputs of the squared error summed over coordinates; twice the
    nats of a Gaussian of spread 1. It is without the noise of the labels.

    Attributes:
        noise: spread of the noise that is added to every coordinate of a training output.
    """

    name = "regression"
    steps = 400
    short_steps = 100
    learning_rates = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    rank = 4
    targets = ["linear"]  # noqa: RUF012 -- what PEFT takes; nobody writes to it

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = float(noise)
        if not self.noise >= 0:
            raise ValueError(f"noise is {noise}; it is a spread, so it cannot be negative")
        generator = torch.Generator().manual_seed(0)
        self._spread = torch.linspace(2, 0.2, _SIZE)
        self._weight = torch.randn(_SIZE, _SIZE, generator=generator) / _SIZE**0.5
        change = torch.randn(_SIZE, _RANKS, generator=generator) @ torch.randn(
            _RANKS, _SIZE, generator=generator
        )
        scale = (209 / (change * self._spread).square().sum()).sqrt()
        self._target = self._weight + scale * change

    def model(self, seed: int) -> nn.Module:
        """Return the pretrained layer; nothing in it is drawn by the seed."""
        return Linear(self._weight)

    def batches(self, seed: int, steps: int) -> Iterator[Pairs]:
        """Yield inputs and outputs, (32, 64) each."""
        generator = torch.Generator().manual_seed(1000 + seed)
        for _ in range(steps):
            yield self._draw(generator)

    def loss(self, model: nn.Module, batch: Pairs) -> Tensor:
        """Return the squared error of the batch, (), summed over coordinates."""
        device = next(model.parameters()).device
        inputs, outputs = (part.to(device) for part in batch)
        error: Tensor = model(inputs) - outputs
        return error.square().sum(1).mean()

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split, *, quick: bool = False) -> dict[str, float]:
        """Return the expected loss without label noise, in closed form."""
        device = next(model.parameters()).device
        transposed = model(torch.eye(_SIZE, device=device)).cpu().double()
        missing = (transposed - self._target.T) * self._spread[:, None]
        return {"loss": missing.square().sum().item()}

    def probes(self) -> list[Pairs]:
        """Return four batches that no training draws, (32, 64) inputs and outputs each."""
        generator = torch.Generator().manual_seed(2)
        return [self._draw(generator) for _ in range(4)]

    def _draw(self, generator: torch.Generator) -> Pairs:
        inputs = torch.randn(_BATCH, _SIZE, generator=generator) * self._spread
        noise = torch.randn(_BATCH, _SIZE, generator=generator) * self.noise
        return inputs, inputs @ self._target.T + noise
