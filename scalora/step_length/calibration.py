"""Calibration of step length in the first steps: grown towards the distance, shrunk by a sign.

Let ``u`` be the step just taken and ``g`` the gradient of the next batch, which had no part in
``u``.

*Too short.*  For a convex loss, ``sum <g, path> / |sum g|_1`` is a lower bound on how far an
element has to go, where ``path`` is the sum of all steps so far and both sums have the same
weights.  Steps whose elements move by less than a share of it grow.  The bound is that of
D-adaptation (Defazio and Mishchenko, arXiv 2301.07733) and Prodigy (arXiv 2306.06101).

*Too long.*  ``-<g, u>`` is an unbiased estimate of how the loss at the new point changes when the
last step is made longer.  Where ``<g, u>`` is surely negative, steps shrink.  That is hypergradient
descent (Baydin et al., arXiv 1703.04782) with the cosine in place of the product.

Neither depends on the scale of the loss.  One multiplier is found, for P and Q of all layers, so it
is another one where P and Q share their product differently.  From then on it is held, and the
user's schedule has its meaning back (docs/mathematics.md, the length of a step).

Held by tests/step_length/test_calibration.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from scalora import sharding

_OF_DISTANCE = 0.3  # elements that move by less than that share of the distance move too little
_GROWTH = 1.25  # the factor grows by a quarter a step at most: tenfold in 11 steps
_SHRINKAGE = 0.05  # and shrinks by a twentieth: to a tenth in 46
# Mean over root mean square of the cosine, below which a step is surely too long.  Noise makes long
# steps look bad at once, and a schedule averages it out later.
_TOO_LONG = -0.75
_DECAY = 0.9  # of the averages of the cosine and of its square
_BOUND = 1e3  # the factor stays within [1 / bound, bound]
_NUMBERS = ("factor", "mean", "mean_square", "longest", "moved")  # (), on the parameters' device
_VECTORS = ("last", "path", "total")  # (number of parameters,), while the window lasts


class StepCalibration:
    """Scales an optimizer's steps by a factor that the first steps find.

    Args:
        steps: steps during which the factor is adapted, counted from the one at which the learning
            rate was highest: a warm-up always belongs to them.  0: never.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._left = steps
        self._peak = 0.0
        self._numbers: dict[str, Tensor] | None = None
        self._last: Tensor | None = None  # (number of parameters,) the newest step, unscaled
        self._path: Tensor | None = None  # likewise, all steps so far, as they were taken
        self._total: Tensor | None = None  # likewise, the weighted sum of gradients
        self._rounded: tuple[Tensor, Tensor] | None = None  # the factor, and in another dtype

    @property
    def factor(self) -> Tensor | None:
        """Factor that scales the steps, (); ``None`` before the first step."""
        return None if self._numbers is None else self._numbers["factor"]

    def kept_tensors(self) -> list[Tensor]:
        """Return the tensors that are kept between steps."""
        vectors = (self._last, self._path, self._total)
        return [*(self._numbers or {}).values(), *(v for v in vectors if v is not None)]

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
        if last is None or self._path is None or self._total is None:
            return
        assert self._numbers is not None
        gradient = _flat([sharding.local(_gradient(p)) for p in parameters], last.device)
        if gradient.shape != last.shape:  # the layers are others now
            return
        n, like = self._numbers, parameters[0]
        along, squared_gradient, squared, absolute, onward = _over_shards(
            [
                torch.dot(gradient, last),
                gradient.square().sum(),
                last.square().sum(),
                last.abs().sum(),
                torch.dot(gradient, self._path),
            ],
            like,
        )
        cosine = along / (squared_gradient.sqrt() * squared.sqrt())
        mean = _DECAY * n["mean"] + (1 - _DECAY) * cosine
        mean_square = _DECAY * n["mean_square"] + (1 - _DECAY) * cosine.square()
        sign = mean / mean_square.sqrt().clamp_min(1e-30)  # within [-1, 1]
        # Of the elements that moved at all, weighted by how far: an Adam's learning rate.
        length = squared / absolute.clamp_min(1e-30)
        longest = torch.maximum(n["longest"], length)
        weight = (n["factor"] * length).square()
        total = self._total + weight * gradient
        moved = n["moved"] + weight * onward
        [total_length] = _over_shards([total.abs().sum()], like)
        distance = moved / total_length.clamp_min(1e-30)
        wanted = torch.minimum(_OF_DISTANCE * distance / longest, _GROWTH * n["factor"])
        shrunk = n["factor"] * torch.exp(_SHRINKAGE * torch.where(sign < _TOO_LONG, sign, 0.0))
        factor = torch.maximum(shrunk, wanted).clamp(1 / _BOUND, _BOUND)
        # A gradient of zeros, or one that is not finite, teaches nothing.
        known = (cosine + distance).isfinite()
        new = (factor, mean, mean_square, longest, moved)
        self._numbers = {
            name: torch.where(known, value, n[name])
            for name, value in zip(_NUMBERS, new, strict=True)
        }
        self._total = torch.where(known, total, self._total)

    @contextmanager
    def scaled(
        self,
        parameters: Sequence[Tensor],
        groups: Sequence[dict[str, Any]] = (),
        linear: bool = False,
    ) -> Iterator[None]:
        """Scale the step that is taken within, of these parameters alone.

        If the step raises, half taken, the parameters are put back to where they were, but not
        where the factor is held and can be given to the optimizer in its learning rates.

        Args:
            parameters: the factors.
            groups: of the optimizer that steps.
            linear: whether its steps are proportional to the learning rate.
        """
        if self.steps == 0 or not parameters:
            yield
            return
        if linear and self._left == 0 and self._numbers is not None:
            alone = _groups_of_these_alone(parameters, groups)
            if alone is not None:
                with _rates_times(self._numbers["factor"], alone):
                    yield
                return
        own = [sharding.local(p) for p in parameters]
        is_held = self._left == 0 and self._numbers is not None
        alike = len({(p.device, p.dtype) for p in own}) == 1
        with self._held(own) if is_held and alike else self._observed(own):
            yield

    @contextmanager
    def _held(self, own: list[Tensor]) -> Iterator[None]:
        """Scale the step by the factor that was found, in place and in the parameters' dtype.

        Lists of one device and dtype take few launches, and only with a factor of that dtype.
        """
        assert self._numbers is not None
        found, like = self._numbers["factor"], own[0]
        if self._rounded is None or self._rounded[0] is not found:
            self._rounded = found, found.to(like.device, like.dtype)
        with torch.no_grad():
            before = list(torch._foreach_mul(own, 1.0))  # a copy
        try:
            yield
            with torch.no_grad():
                torch._foreach_sub_(own, before)
                torch._foreach_mul_(own, self._rounded[1])
                torch._foreach_add_(own, before)
        except BaseException:
            with torch.no_grad():
                torch._foreach_copy_(own, before)
            raise

    @contextmanager
    def _observed(self, own: list[Tensor]) -> Iterator[None]:
        """Scale the step by the factor so far, and keep what the next gradient is compared with."""
        with torch.no_grad():
            device = own[0].device
            before = _flat(own, device)
            if self._numbers is None:
                zero, one = before.new_zeros(()), before.new_ones(())
                self._numbers = {name: zero.clone() for name in _NUMBERS} | {"factor": one}
        target = before
        try:
            yield
            with torch.no_grad():
                self._numbers = {name: value.to(device) for name, value in self._numbers.items()}
                step = before - _flat(own, device)
                taken = self._numbers["factor"] * step
                target = before - taken
                _put(target, own)
        except BaseException:
            with torch.no_grad():
                _put(target, own)
            raise
        self._left = max(0, self._left - 1)
        self._remember(step, taken)

    @torch.no_grad()
    def _remember(self, step: Tensor, taken: Tensor) -> None:
        if self._left == 0:
            self._last = self._path = self._total = None
            return
        if self._path is None or self._path.shape != step.shape:
            self._path, self._total = taken, torch.zeros_like(step)
            assert self._numbers is not None
            self._numbers["moved"] = torch.zeros_like(self._numbers["moved"])
        else:
            self._path = self._path + taken
        self._last = step

    @torch.no_grad()
    def saved(self, parameters: Sequence[Tensor] = ()) -> dict[str, Any]:
        """Return what `load` needs to go on, of all processes together.

        Args:
            parameters: as for `observe`.
        """
        numbers = self._numbers or dict.fromkeys(_NUMBERS)
        vectors = {name: getattr(self, f"_{name}") for name in _VECTORS}
        kept = {name: vector for name, vector in vectors.items() if vector is not None}
        if kept and parameters and sharding.is_sharded(parameters[0]):
            vectors |= zip(kept, _gathered(list(kept.values()), parameters), strict=True)
        return {"left": self._left, "peak": self._peak, **numbers, **vectors}

    @torch.no_grad()
    def load(
        self,
        saved: dict[str, Any] | None,
        device: torch.device,
        parameters: Sequence[Tensor] = (),
    ) -> None:
        """Take up what `saved` returned; ``None``: begin anew."""
        if saved is None:
            saved = StepCalibration(self.steps).saved()
        self._left, self._peak = saved["left"], saved["peak"]
        numbers = {name: saved[name] for name in _NUMBERS if saved[name] is not None}
        self._numbers = {name: _copy(value, device) for name, value in numbers.items()} or None
        vectors = (saved[name] for name in _VECTORS)
        self._last, self._path, self._total = (
            None if value is None else _own_part(_copy(value, device), parameters)
            for value in vectors
        )


def _groups_of_these_alone(
    parameters: Sequence[Tensor], groups: Sequence[dict[str, Any]]
) -> list[dict[str, Any]] | None:
    """Return the groups of these parameters if they hold no others and the rates are numbers.

    On a device only those of a fused optimizer, whose kernels read the rate there: nobody waits.
    """
    first = parameters[0]
    found = list(groups)
    if sum(len(group["params"]) for group in found) != len(parameters):  # a head is trained as well
        these = set(map(id, parameters))
        found = [group for group in groups if any(id(p) in these for p in group["params"])]
        if sum(len(group["params"]) for group in found) != len(these):
            return None
    if first.device.type != "cpu":
        fused = first.device.type == "cuda" and all(group.get("fused") for group in found)
        spread = sharding.is_sharded(first) or any(p.device != first.device for p in parameters)
        if not fused or spread:
            return None
    numbers = all(isinstance(group["lr"], (int, float)) for group in found)
    return found if numbers else None


@contextmanager
def _rates_times(factor: Tensor, groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Multiply the groups' learning rates by a factor () while entered."""
    on_host = float(factor) if factor.device.type == "cpu" else None
    rates = [group["lr"] for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        # The kernels take a float32.
        group["lr"] = (factor * rate).float() if on_host is None else on_host * rate
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().clone().to(device)


def _over_shards(sums: Sequence[Tensor], like: Tensor) -> Sequence[Tensor]:
    """Return sums over all elements, given those over the elements that this process holds."""
    return sharding.rows_of(like).sum(torch.stack(list(sums))).unbind()


def _gathered(vectors: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return each vector with the elements of all processes, in the order of a single process.

    One collective for all parameters of one shape.
    """
    own = [sharding.local(p) for p in parameters]
    pieces = torch.stack(list(vectors)).split([p.numel() for p in own], 1)
    alike: dict[torch.Size, list[int]] = {}
    for i, parameter in enumerate(parameters):
        alike.setdefault(parameter.shape, []).append(i)
    gathered: dict[int, Tensor] = {}
    for indices in alike.values():
        stacked = torch.cat([pieces[i].reshape(len(vectors), *own[i].shape) for i in indices])
        like = parameters[indices[0]]
        everything = sharding.rows_of(like).gathered(stacked, 1, like.shape[0])
        gathered |= zip(indices, everything.flatten(1).split(len(vectors)), strict=True)
    return [torch.cat([gathered[i][k] for i in range(len(own))]) for k in range(len(vectors))]


def _own_part(flat: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
    """Return this process's elements of a vector of all; None if it is of other parameters."""
    if not parameters or not sharding.is_sharded(parameters[0]):
        return flat
    sizes = [p.numel() for p in parameters]
    if flat.numel() != sum(sizes):
        return None
    pieces = [x.view(p.shape) for x, p in zip(flat.split(sizes), parameters, strict=True)]
    own = [x[sharding.own_rows(p)] for x, p in zip(pieces, parameters, strict=True)]
    return _flat(own, flat.device)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return all elements as one vector, in float32 at least: the matrices are small."""
    row = _flatten_dense_tensors([t if t.device == device else t.to(device) for t in tensors])
    view = len(tensors) == 1  # that is all it makes of one alone, and its elements will change
    return row.to(torch.promote_types(row.dtype, torch.float32), copy=view)


def _put(flat: Tensor, tensors: list[Tensor]) -> None:
    pieces = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [x.view_as(t) for x, t in zip(pieces, tensors, strict=True)])
