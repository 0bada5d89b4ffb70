"""One re-basing of all LoRA layers: batch, scale, fold, carry the moments; all or nothing.

Held by tests/optimizer/test_optimizer.py and tests/rebasing/test_all_or_nothing.py.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from scalora.moments import Moments
from scalora.options import RebasingOptions
from scalora.peft_layers import LayerLookup, LoRAPair
from scalora.rebasing.accumulators import CarryAccumulator, DenseAccumulator
from scalora.rebasing.batches import Batching
from scalora.rebasing.column_lengths import BoundedLengths
from scalora.rebasing.leak import Leak
from scalora.rebasing.optimal_step import OptimalStep
from scalora.rebasing.sketch import FrozenSketches
from scalora.step_length.rates import LearnedSteps


class Rebaser:
    """Re-bases LoRA layers under an optimizer.

    Args:
        pairs: the layers that can be re-based -> where their increments go, "dense" or "carry".
        options: the user's choices.
        moments: how the optimizer's state depends on the gradient.

    Attributes:
        pairs: the layers.
        layers: finds their tensors.
        places: layer name -> "dense" or "carry".
        measured: layer name -> what the rule measured of it: the smoothness constant L times the
            learning rate, 0-d, matched at its first re-basing; or means of descents, (2, r).
        learned: what each layer has learned since it was last re-based.
        frozen: sketches of what was frozen, for reports and logs alone.
    """

    def __init__(
        self, pairs: Mapping[LoRAPair, str], options: RebasingOptions, moments: Moments
    ) -> None:
        self.pairs = list(pairs)
        self.places = {pair.name: place for pair, place in pairs.items()}
        self.options = options
        self.moments = moments
        self.measured: dict[str, Tensor] = {}
        self._dense_accumulator = DenseAccumulator(options, self.pairs)
        self._carry_accumulator = CarryAccumulator(options)
        self.learned = LearnedSteps()
        self._rule: Leak | BoundedLengths | OptimalStep
        if options.resolved_rule == "leak":
            self._rule = Leak(options, moments, self.learned)
        elif options.scales_P_alone:
            self._rule = BoundedLengths(options, moments, self.learned, self.measured)
        else:
            self._rule = OptimalStep(options, moments, self.measured)
        self.frozen = FrozenSketches(pairs)
        self.layers = LayerLookup(self.pairs)
        self._batching = Batching(self.layers, self._key)
        self._last: list[tuple[list[str], Tensor, Tensor | None]] = []

    @property
    def last_scaling(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name -> (alpha, beta), each (r,), of the newest re-basing."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for names, alpha, beta in self._last:
            beta = torch.ones_like(alpha) if beta is None else beta
            found |= zip(names, zip(alpha, beta, strict=True), strict=True)
        return found

    def kept_tensors(self) -> list[Tensor]:
        """Return all that is kept between steps."""
        kept = [factor for _, *both in self._last for factor in both if factor is not None]
        for pair in self.pairs:
            if (carry := pair.carry) is not None:
                kept += [carry.up, carry.down, carry.cut]
        return [*kept, *self.measured.values(), *self._dense_accumulator.residuals.values()]

    def forget(self) -> None:
        """Begin anew, as if nothing had been re-based."""
        self.measured.clear()
        self._dense_accumulator.residuals.clear()
        self.learned.load(None)
        self._last = []
        self._batching.forget()

    def saved_layers(self) -> dict[str, dict[str, Any]]:
        """Return, for every layer name, what `load_layers` needs."""
        residuals = self._dense_accumulator.residuals
        return {
            pair.name: {
                "measured": self.measured.get(pair.name),
                "residual": residuals.get(pair.name),
                "carry": None if (carry := pair.carry) is None else carry.state(),
            }
            for pair in self.pairs
        }

    def load_layers(
        self, layers: Mapping[str, Mapping[str, Any]], rebased: Collection[str]
    ) -> None:
        """Take up what was saved of each layer, on the layer's device.

        Args:
            layers: what `saved_layers` returned.
            rebased: names of the layers whose base weights have taken in increments.
        """
        held = {"measured": self.measured, "residual": self._dense_accumulator.residuals}
        for kept in held.values():
            kept.clear()
        for pair in self.pairs:
            saved, device = layers[pair.name], pair.P_parameter.device
            for name, kept in held.items():
                if saved[name] is not None:
                    kept[pair.name] = saved[name].detach().clone().to(device)
            if pair.name in rebased:
                pair.mark_rebased()
            self._load_carry(pair, saved.get("carry"))
        self._batching.forget()  # a carry may have another dtype now

    def _load_carry(self, pair: LoRAPair, saved: dict[str, Tensor] | None) -> None:
        if saved is not None:
            self._carry_accumulator.carry_of(pair).load(saved)
        elif pair.carry is not None:
            pair.carry.clear()

    @torch.no_grad()
    def rebase(self, optimizer: torch.optim.Optimizer, count: int) -> None:
        """Re-base every layer that has gradients.

        Every layer is re-based whole or not at all, whatever is raised in between: first
        everything new is computed, then the base takes its increment, then the rest is written.

        Args:
            optimizer: the inner optimizer; its state and the gradients change coordinates.
            count: the number of this re-basing, part of the rounding noise's seed.
        """
        self._last = []
        seen = []
        takes = self._takes if self.options.when_full == "hold" else None
        agree = self.options.resolved_rule != "leak"  # which asks for no direction
        batches = self._batching.of_step(optimizer, self._rule.step_key, takes, agree)
        try:
            for found in self._rule.rebased(batches, optimizer):
                pairs = found.batch.pairs
                accumulator = self._accumulator(pairs[0])
                accumulator.commit(pairs, found.left, found.right, found.writes, count)
                seen.append(self.frozen.project(pairs, found.left, found.right))
                self._last.append(([pair.name for pair in pairs], found.alpha, found.beta))
        finally:
            self.frozen.add(seen)

    def _takes(self, pair: LoRAPair) -> bool:
        """Return whether the layer is still re-based: a carry that is held may be full."""
        return self.places[pair.name] == "dense" or self._carry_accumulator.has_room(pair)

    def _accumulator(self, pair: LoRAPair) -> DenseAccumulator | CarryAccumulator:
        is_dense = self.places[pair.name] == "dense"
        return self._dense_accumulator if is_dense else self._carry_accumulator

    def _key(self, pair: LoRAPair) -> Hashable:
        """Return what must agree for layers to be served by one call of an accumulator."""
        return self.places[pair.name], self._accumulator(pair).key(pair)
