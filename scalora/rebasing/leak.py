"""The default rule: P decays into the weight, so that an adapter remembers its last K steps.

Held by tests/rebasing/test_forgetting.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from scalora.moments import Moments
from scalora.options import RebasingOptions
from scalora.peft_layers import LoRAPair
from scalora.rebasing.batches import LayerBatch, at_once
from scalora.rebasing.coordinates import Q_RANK_AXIS, Rebased, with_P_scaled
from scalora.scaling.memory import leak
from scalora.step_length.rates import LearnedSteps


class Leak:
    """Moves what an adapter learned long ago into the weight, a share of P per step.

    Args:
        options: the user's.
        moments: how the optimizer's state depends on the gradient.
        learned: counts what each layer has learned since it was last re-based.
    """

    def __init__(self, options: RebasingOptions, moments: Moments, learned: LearnedSteps) -> None:
        self.options = options
        self.moments = moments
        self.learned = learned

    def step_key(self, pair: LoRAPair, group_P: int) -> float | None:
        """Return the steps that a layer has learned for: layers that agree share one alpha.

        None if they are counted on a device.
        """
        steps = self.learned.since(pair.name, group_P)
        return None if isinstance(steps, Tensor) else steps

    def rebased(
        self, batches: Sequence[LayerBatch], optimizer: torch.optim.Optimizer
    ) -> Iterator[Rebased]:
        """Yield the batches in new coordinates.

        A batch counts as re-based when the next is asked for.
        """
        for together in at_once(batches):
            due: list[LayerBatch] = []
            others: list[LayerBatch] = []
            for batch in together:
                (due if self._has_learned(batch) else others).append(batch)
            if due:
                histories = [self.moments.history(optimizer, batch.Q, Q_RANK_AXIS) for batch in due]
                for found in with_P_scaled(due, histories, self._alpha(due)):
                    yield found
                    self._mark(found.batch)
            for batch in others:
                self._mark(batch)

    def _mark(self, batch: LayerBatch) -> None:
        self.learned.mark([pair.name for pair in batch.pairs], batch.index_P)

    def _has_learned(self, batch: LayerBatch) -> bool:
        """Return whether the layers have taken a step since they were last re-based."""
        steps = self._steps(batch)
        return steps is None or steps > 0

    def _steps(self, batch: LayerBatch) -> float | None:
        """Return `step_key` of all layers of a batch."""
        return self.step_key(batch.pairs[0], batch.index_P)

    def _alpha(self, batches: Sequence[LayerBatch]) -> Tensor:
        """Return (layers, 1): all columns of a layer have the same.

        In the dtype that factors are scaled in: their moments move with the very same number.
        """
        least = 1 / self.options.bound  # a column must not vanish
        memory, device = self.options.memory_steps, batches[0].P[0].device
        dtype = torch.promote_types(batches[0].P[0].dtype, torch.float32)
        known = [self._steps(batch) for batch in batches]
        counts = [len(batch.pairs) for batch in batches]
        steps = [steps for steps in known if steps is not None]
        if len(steps) == len(known):  # a fill does not wait for the device
            alphas = [max(least, float(leak(memory, count))) for count in steps]
            if len(set(alphas)) == 1:
                return torch.full((sum(counts), 1), alphas[0], dtype=dtype, device=device)
            fills = zip(alphas, counts, strict=True)
            return torch.cat([torch.full((n, 1), a, dtype=dtype, device=device) for a, n in fills])
        every = [
            leak(memory, self.learned.since(pair.name, batch.index_P))
            for batch in batches
            for pair in batch.pairs
        ]
        on_device = [torch.as_tensor(alpha, dtype=dtype, device=device) for alpha in every]
        return torch.stack(on_device).clamp_min(least).unsqueeze(-1)
