"""State of a run: what a resumed one takes up besides weights and the inner optimizer.

And what the two must agree on.

Held by tests/resuming/test_training_state.py and tests/resuming/test_optimizer_state.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scalora import peft_layers
from scalora.guards.layers import ExpectedWeights
from scalora.options import RebasingOptions
from scalora.rebasing.rebaser import Rebaser
from scalora.resuming.encoding import STATE_VERSION, check_version
from scalora.step_length.calibration import StepCalibration


class RunState:
    """Counts the steps and re-basings of a run, and saves and restores what re-basing remembers.

    Args:
        options: the user's.
        rebaser: re-bases the layers, and remembers something of each.

    Attributes:
        calibration: of the length of a step.
        steps: done so far.
        rebase_count: re-basings so far; one step is one at most.
        expected: the weights that a loaded state was saved with.
    """

    def __init__(self, options: RebasingOptions, rebaser: Rebaser) -> None:
        self.options = options
        self.rebaser = rebaser
        self.calibration = StepCalibration(options.calibration_steps)
        self.steps = self.rebase_count = 0
        self.expected = ExpectedWeights()

    @property
    def is_due(self) -> bool:
        """Return whether the coming step re-bases."""
        return self.next_rebasing == 1

    @property
    def next_rebasing(self) -> int | None:
        """Steps until the next re-basing, the step that re-bases included; None for never."""
        interval = self.options.interval_steps
        return interval - self.steps % interval if self.rebaser.pairs else None

    def kind(self) -> dict[str, Any]:
        """Return what must agree for one run to continue another.

        ``ranks``, ``shapes`` and ``places`` map layer names, the rest are single values.
        """
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

    def check_same_run(self, saved: Mapping[str, Any]) -> None:
        """Raise a ValueError that says what differs if this run cannot continue a saved one.

        Args:
            saved: what `saved` or `kind` returned.
        """
        check_version(saved.get("version"))
        for name, value in self.kind().items():
            found = saved.get(name)
            if found == value:
                continue
            if name == "ranks":
                raise ValueError(_other_layers(found or {}, value))
            if name == "shapes":
                raise ValueError(_other_shapes(found or {}, value))
            if name == "places":
                raise ValueError(_other_place(found or {}, value))
            raise ValueError(
                f"the checkpoint was written with {name}={found!r}, this optimizer has "
                f"{name}={value!r}. Create it with the same {name} to resume. Nothing was loaded."
            )

    def saved(self) -> dict[str, Any]:
        """Return numbers and small tensors, of all processes together."""
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
            "frozen": self.rebaser.frozen.state(),
        }

    def load(self, own: Mapping[str, Any]) -> None:
        """Take up what `saved` returned.

        Raises:
            ValueError: this run cannot continue that one; nothing is loaded then.
        """
        self.check_same_run(own)
        self.steps, self.rebase_count = own["steps"], own["rebase_count"]
        self.expected.expect(own)
        self.rebaser.load_layers(own["layers"], rebased=own["base"])
        self.rebaser.learned.load(own["learned"])
        self.rebaser.frozen.load(own.get("frozen"), self.rebase_count)
        self._load_calibration(own["step_length"])

    def forget(self) -> None:
        """Return to where a run begins."""
        self.steps = self.rebase_count = 0
        self.expected.expect(None)
        self.rebaser.forget()
        self.rebaser.frozen.load(None)
        self._load_calibration(None)

    def _factors(self) -> list[Tensor]:
        """Return all layers' factors, whose steps share one length."""
        return [p for pair in self.rebaser.pairs for p in (pair.P_parameter, pair.Q_parameter)]

    def _load_calibration(self, state: dict[str, Any] | None) -> None:
        factors = self._factors()
        device = factors[0].device if factors else torch.device("cpu")
        self.calibration.load(state, device, factors)


def _other_layers(saved: Mapping[str, int], ranks: Mapping[str, int]) -> str:
    differing = sorted(k for k in {*saved, *ranks} if saved.get(k) != ranks.get(k))
    return (
        f"the checkpoint's LoRA layers are not this model's: {len(differing)} differ in presence "
        f"or rank, for example {differing[0]!r} (checkpoint: rank {saved.get(differing[0])}, "
        f"model: rank {ranks.get(differing[0])}). Nothing was loaded."
    )


def _other_shapes(saved: Mapping[str, Any], shapes: Mapping[str, Any]) -> str:
    layer = next(name for name, shape in shapes.items() if saved.get(name) != shape)
    return (
        f"the checkpoint belongs to another model: the weight of {layer!r} is "
        f"{tuple(saved.get(layer, ()))} there and {tuple(shapes[layer])} here. Nothing was loaded."
    )


def _other_place(saved: Mapping[str, str], places: Mapping[str, str]) -> str:
    layer = next(name for name, place in places.items() if saved.get(name) != place)
    return (
        f"the checkpoint keeps the increments of {layer!r} in its accumulator "
        f"{saved.get(layer)!r}, this optimizer in {places[layer]!r}: create it with the same "
        "accumulator, over the same kind of base. Nothing was loaded."
    )
