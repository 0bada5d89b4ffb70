"""All guards of a step, in one call.

Held by tests/guards/test_situations.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.guards.layers import (
    CheckedFactors,
    ExpectedWeights,
    check_adapters,
    check_engine,
    check_processes,
)
from scalora.guards.skipped_steps import (
    DummyStep,
    can_skip,
    not_finite,
    step_unless,
    warn_without_gradients,
)
from scalora.guards.watches import watch_factors, watch_reference
from scalora.moments import Moments
from scalora.options import RebasingOptions
from scalora.peft_layers import LayerLookup, LoRAPair
from scalora.warning import warn


class CheckedStep(NamedTuple):
    """A step that may be taken.

    Attributes:
        factors: P and Q of every layer that is re-based, in turn.
        overflow: () bool, whether a gradient is not finite; None without gradients.
    """

    factors: list[nn.Parameter]
    overflow: Tensor | None


class Guard:
    """Lets an optimizer take the steps that are what they seem; claims the layers when made.

    Args:
        optimizer: the inner one.
        model: the model that it trains.
        places: layer -> "dense" or "carry", where its increments go.
        options: the user's.
        moments: how the optimizer's state depends on the gradient.
        expected: the weights that a loaded state was saved with.
        layers: finds the layers' tensors.

    Attributes:
        skipped: (), steps that were skipped for a gradient that was not finite; None for no step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        places: Mapping[LoRAPair, str],
        options: RebasingOptions,
        moments: Moments,
        expected: ExpectedWeights,
        layers: LayerLookup,
    ) -> None:
        self.optimizer = optimizer
        self.model = model
        self.places = places
        self.options = options
        self.moments = moments
        self.expected = expected
        self.skipped: Tensor | None = None
        self._dummy_step = DummyStep()
        # Until the first step is checked, a wrapper may still shard the model.
        self._sharding_is_final = False
        self._sharded: list[Any] = []
        self._factor_watch = watch_factors(places)
        self._reference_watch = watch_reference(places)
        owner = object()
        for pair in places:
            pair.claim(owner)
        self._factors = CheckedFactors(layers, owner)

    def check(self) -> CheckedStep | None:
        """Check the coming step before it changes anything.

        Returns:
            What the step needs; None to skip it, with all that would have followed.

        Raises:
            ValueError: the step would not be what it seems; the message says why, and what to do.
        """
        optimizer = self.optimizer
        if not self._sharding_is_final:
            check_engine(self.model)
        self._dummy_step.drop_state(optimizer)
        self.reshard()
        factors = self._factors.of(optimizer)
        if self._dummy_step.take(optimizer):
            return None
        if self._reference_watch is not None:
            self._reference_watch.check()
        if not self._sharding_is_final:
            check_processes(optimizer, self.places, self.options, self.moments)
            self._sharding_is_final = True
        self.expected.verify(list(self.places))
        overflow = not_finite(optimizer)
        if overflow is None:
            warn_without_gradients(optimizer.param_groups)
        elif overflow.device.type == "cpu" and bool(overflow):
            self._count_skipped(overflow)
            warn("a gradient is not finite: this step was skipped, and nothing was changed.")
            return None
        if self._factor_watch is not None:
            self._factor_watch.check(wait=False)
            self._factor_watch.suspend()
        return CheckedStep(factors, overflow)

    def step_inner(self, overflow: Tensor | None) -> None:
        """Step the inner optimizer; a fused one skips the step by itself on overflow.

        Args:
            overflow: of the `CheckedStep`.
        """
        first = not self.optimizer.state
        try:
            if overflow is None or overflow.device.type == "cpu" or not can_skip(self.optimizer):
                self.optimizer.step()
                return
            self._count_skipped(overflow)
            step_unless(overflow, self.optimizer)
        except BaseException:
            # The first step allocates, so it is where memory runs out.  What torch has made half of
            # by then it takes for whole the next time, and finds no moments in it.
            if first:
                self.optimizer.state.clear()
            raise

    def note_step(self, rebase_count: int) -> None:
        """Note the factors as a step has left them.

        Args:
            rebase_count: re-basings so far.
        """
        if self._factor_watch is not None:
            self._factor_watch.note(rebase_count)

    def check_adapters(self) -> None:
        """Raise a ValueError if the adapter of a layer was deleted."""
        check_adapters(self.places)

    def check_factors(self) -> None:
        """Warn or raise if factors were exchanged since the newest step.  Waits for the device."""
        if self._factor_watch is not None:
            self._factor_watch.check(wait=True)

    def forget_factors(self) -> None:
        """Expect no factors until the next step is done: another state was loaded."""
        if self._factor_watch is not None:
            self._factor_watch.forget()

    def reshard(self) -> None:
        """Let a sharded model hold its shards, whatever a forward pass has left gathered."""
        if not self._sharding_is_final:
            self._sharded = sharding.sharded_modules(self.model)
        for module in self._sharded:
            module.reshard()

    def kept_tensors(self) -> list[Tensor]:
        """Return the tensors that are kept between steps."""
        return [] if self._factor_watch is None else self._factor_watch.kept_tensors()

    def _count_skipped(self, overflow: Tensor) -> None:
        skipped = self.skipped
        self.skipped = overflow.to(torch.int64) if skipped is None else skipped + overflow
