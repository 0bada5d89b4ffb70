"""The length of a step, found in the first steps: where the next gradient no longer asks for more.

Let ``u`` be the step just taken and ``g`` the gradient of the next batch, which had no part in
``u``.  Then ``-<g, u>`` is an unbiased estimate of how the loss at the new point changes when that
step is made longer.  Positive ``<g, u>``: the step was too short; negative: too long; zero: neither
longer nor shorter would have been better.  While calibrating, the factor on every step follows that
sign where it is clear; a step of about the right length is left alone.  That is hypergradient
descent (Baydin et al., arXiv 1703.04782) with the cosine in place of the product, so that neither
the scale of the loss nor that of the parameters matters.  From then on the factor is held, and the
user's schedule has its meaning back (docs/mathematics.md, the length of a step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_RATE = 0.05  # the factor changes by a twentieth a step at most: tenfold in 46 steps
# Mean over root mean square of the cosine, beyond which a step is surely too short or too long.
# Noise makes long steps look bad at once, and a schedule averages it out later: hence the second.
_TOO_SHORT, _TOO_LONG = 0.5, -0.75
_DECAY = 0.9  # of the averages of the cosine and of its square
_BOUND = 1e3  # the factor stays within [1 / bound, bound]
_KEPT = ("factor", "mean", "mean_square", "last")


class StepCalibration:
    """Scales an optimizer's steps by a factor that the first steps find.

    Args:
        steps: for how many steps the factor is adapted, counted from the step at which the learning
            rate was highest, so that a warm-up is always part of it; 0: never.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._left = steps
        self._peak = 0.0
        self._factor: Tensor | None = None  # (), like the averages: on the parameters' device
        self._mean: Tensor | None = None
        self._mean_square: Tensor | None = None
        self._last: Tensor | None = None  # (number of parameters,) the newest step, unscaled

    @property
    def factor(self) -> Tensor | None:
        """What steps are scaled by, (); ``None`` before the first."""
        return self._factor

    @property
    def peak(self) -> float:
        """The highest learning rate so far."""
        return self._peak

    def kept_tensors(self) -> list[Tensor]:
        """What is kept between steps."""
        kept = (self._factor, self._mean, self._mean_square, self._last)
        return [tensor for tensor in kept if tensor is not None]

    @torch.no_grad()
    def observe(self, parameters: Sequence[Tensor], learning_rate: float | None) -> None:
        """Adapt the factor to the gradients after the newest step.

        Args:
            parameters: with their gradients, as after the newest step.
            learning_rate: of the coming step, ``None`` if it is on a device.
        """
        if learning_rate is not None and learning_rate > self._peak:
            self._peak, self._left = learning_rate, self.steps
        # A step that is tried again after a failure is not observed twice.
        last, self._last = self._last, None
        if self._left == 0 or last is None or self._factor is None:
            return
        gradient = _flat([_gradient(p) for p in parameters], self._factor.device)
        if gradient.shape != last.shape:  # the layers are others now
            return
        cosine = torch.dot(gradient, last) / (gradient.norm() * last.norm())
        known = cosine.isfinite()
        cosine = torch.where(known, cosine, 0.0)
        assert self._mean is not None and self._mean_square is not None
        self._mean = torch.where(known, _DECAY * self._mean + (1 - _DECAY) * cosine, self._mean)
        self._mean_square = torch.where(
            known, _DECAY * self._mean_square + (1 - _DECAY) * cosine.square(), self._mean_square
        )
        sign = self._mean / self._mean_square.sqrt().clamp_min(1e-30)  # within [-1, 1]
        sure = known & ((sign > _TOO_SHORT) | (sign < _TOO_LONG))
        grown = self._factor * torch.exp(_RATE * torch.where(sure, sign, 0.0))
        self._factor = grown.clamp(1 / _BOUND, _BOUND)

    @contextmanager
    def scaled(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Scale whatever step is taken within, of these parameters.

        Nothing is changed if the step raises.
        """
        if self.steps == 0 or not parameters:
            yield
            return
        with torch.no_grad():
            device = parameters[0].device
            before = _flat(parameters, device)
            if self._factor is None:
                self._factor = torch.ones((), device=device)
                self._mean = torch.zeros((), device=device)
                self._mean_square = torch.zeros((), device=device)
        yield
        with torch.no_grad():
            self._factor = self._factor.to(device)
            step = before - _flat(parameters, device)
            _put(before - self._factor * step, parameters)
            self._left = max(0, self._left - 1)
            self._last = step if self._left else None

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on."""
        tensors = {name: getattr(self, f"_{name}") for name in _KEPT}
        return {"left": self._left, "peak": self._peak, **tensors}

    def load(self, state: dict[str, Any] | None, device: torch.device) -> None:
        """Take up what `state` returned; ``None``: begin anew."""
        if state is None:
            state = StepCalibration(self.steps).state()
        self._left, self._peak = state["left"], state["peak"]
        for name in _KEPT:
            value = state[name]
            setattr(self, f"_{name}", None if value is None else value.detach().clone().to(device))


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """All elements in a row, in float32 at least, on one device: the matrices are small."""
    wide = [t.detach().flatten().to(device) for t in tensors]
    return torch.cat([t.to(torch.promote_types(t.dtype, torch.float32)) for t in wide])


def _put(flat: Tensor, parameters: Sequence[Tensor]) -> None:
    sizes = [p.numel() for p in parameters]
    pieces = [x.view_as(p) for x, p in zip(flat.split(sizes), parameters, strict=True)]
    for piece, parameter in zip(pieces, parameters, strict=True):
        parameter.copy_(piece)
