"""How far a run has come: what a resumed one takes up besides weights and the inner optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scalora import peft_layers
from scalora.options import RebasingOptions
from scalora.rebasing.rebaser import Rebaser
from scalora.resuming.same_run import STATE_VERSION, ExpectedWeights, check_same_kind
from scalora.step_length.calibration import StepCalibration


class RunState:
    """Counts a run's steps and re-basings, and saves and takes up all that re-basing remembers.

    Args:
        options: the user's.
        rebaser: of the layers, with what it remembers of each.
        calibration: of the length of a step.

    Attributes:
        steps: done so far.
        rebase_count: re-basings so far.
        expected: the weights that a loaded state was saved with, until the next step.
    """

    def __init__(
        self, options: RebasingOptions, rebaser: Rebaser, calibration: StepCalibration
    ) -> None:
        self.options = options
        self.rebaser = rebaser
        self.calibration = calibration
        self.steps = self.rebase_count = 0
        self.expected = ExpectedWeights()

    def kind(self) -> dict[str, Any]:
        """What must agree for one run to continue another."""
        pairs = self.rebaser.pairs
        return {
            "version": STATE_VERSION,
            "rule": self.options.rule,
            "memory": self.options.memory_steps if self.options.scales_P_alone else None,
            "calibration": self.options.calibration_steps,
            "rounding": self.options.rounding,
            "seed": self.options.seed,
            "ranks": {pair.name: pair.rank for pair in pairs},
            "shapes": {pair.name: list(pair.shape) for pair in pairs},
            "places": self.rebaser.places,
        }

    def check(self, own: Mapping[str, Any]) -> None:
        """Raise a ValueError, which says what differs, if ``own`` is not of this kind of run."""
        check_same_kind(own, self.kind())

    def saved(self) -> dict[str, Any]:
        """Numbers and small tensors, of all processes together."""
        pairs = self.rebaser.pairs
        return {
            **self.kind(),
            "steps": self.steps,
            "rebase_count": self.rebase_count,
            # What a loaded state still expects is not forgotten by saving it again.
            "base": peft_layers.base_checksums([p for p in pairs if p.was_rebased])
            | dict(self.expected.base),
            "adapter": peft_layers.adapter_checksums([p for p in pairs if p.carry is not None])
            | dict(self.expected.adapter),
            "layers": self.rebaser.saved_layers(),
            "learned": self.rebaser.learned.saved(),
            "step_length": self.calibration.saved(self._factors()),
        }

    def load(self, own: Mapping[str, Any]) -> None:
        """Take up what `saved` returned.

        Raises:
            ValueError: it is of another kind of run; nothing is loaded then.
        """
        self.check(own)
        self.steps, self.rebase_count = own["steps"], own["rebase_count"]
        self.expected = ExpectedWeights.of(own)
        self.rebaser.load_layers(own["layers"], rebased=own["base"])
        self.rebaser.learned.load(own["learned"])
        self._load_calibration(own["step_length"])

    def forget(self) -> None:
        """As if no step had been taken."""
        self.steps = self.rebase_count = 0
        self.expected = ExpectedWeights()
        self.rebaser.forget()
        self._load_calibration(None)

    def _factors(self) -> list[Tensor]:
        """All layers' factors, whose steps share one length."""
        return [p for pair in self.rebaser.pairs for p in (pair.P_parameter, pair.Q_parameter)]

    def _load_calibration(self, state: dict[str, Any] | None) -> None:
        factors = self._factors()
        device = factors[0].device if factors else torch.device("cpu")
        self.calibration.load(state, device, factors)
