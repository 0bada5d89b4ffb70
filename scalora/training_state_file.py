"""The file that completes a checkpoint, ``scalora.safetensors``: what it holds, and its checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalora import peft_layers
from scalora.files import read_tensors
from scalora.peft_layers import LoRAPair

STATE_FILE = "scalora.safetensors"
_KEYS = (
    *("version", "steps", "asked", "rebase_count", "places", "base", "adapter", "tensors"),
    "step_length",
)
_CARRY = ("up", "down", "cut", "capacity")


@dataclass(frozen=True)
class TrainingStateFile:
    """One that was read.

    Attributes:
        path: of the file.
        tensors: ``base:``, ``carry.up:``, ``carry.down:``, ``carry.cut:``, ``product:`` or
            ``residual:`` and the layer's name, or ``step_length:`` and a name -> the tensor, on the
            CPU.
        values: what `scalora.ScaLoRA.rebasing_state` gave besides, and the checksums.
    """

    path: Path
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> TrainingStateFile:
        """The one in a checkpoint's folder.

        Raises:
            ValueError: it is missing or cut short, or was not written by this package.
        """
        path = Path(folder) / STATE_FILE
        tensors, metadata = read_tensors(path)
        try:
            values = json.loads(metadata["scalora"])
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} was not written by scalora.save_training_state.") from error
        missing = [key for key in _KEYS if key not in values]
        if missing:
            raise ValueError(f"{path} is damaged: its entry {missing[0]!r} is missing.")
        return cls(path, tensors, values)

    @property
    def folded(self) -> dict[str, Tensor]:
        """Layer name -> its base weight, of the layers that have one here."""
        return {
            name.removeprefix("base:"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("base:")
        }

    def carry(self, layer: str) -> dict[str, Tensor] | None:
        """A layer's ``up`` (m, c), ``down`` (c, n), ``cut`` and ``capacity``; None without one."""
        carry = {key: self.tensors.get(f"carry.{key}:{layer}") for key in _CARRY}
        found = {key: tensor for key, tensor in carry.items() if tensor is not None}
        return found if len(found) == len(_CARRY) else None

    def memory(self, layer: str) -> dict[str, Any]:
        """What re-basing remembers of a layer."""
        return {
            "product": self.tensors.get(f"product:{layer}"),
            "residual": self.tensors.get(f"residual:{layer}"),
            "carry": self.carry(layer),
        }

    def step_length(self) -> dict[str, Any]:
        """What the calibration of the step remembers."""
        values = self.values["step_length"]
        return {key: self.tensors.get(f"step_length:{key}", values[key]) for key in values}

    def check(self, pairs: Sequence[LoRAPair]) -> None:
        """Raise a ValueError if the file is damaged or was not saved with these layers' adapter.

        Args:
            pairs: all layers of the model that it speaks of.
        """
        if self.values["tensors"] != peft_layers.checksums(self.tensors):
            raise ValueError(f"{self.path} is damaged: its tensors are not those written with it.")
        if self.values["adapter"] != peft_layers.adapter_checksums(pairs):
            raise ValueError(
                f"the model's adapter is not the one {self.path} was saved with: load the adapter "
                "of the same checkpoint first. Nothing was loaded."
            )
        for pair in pairs:
            weight, carry = self.folded.get(pair.name), self.carry(pair.name)
            if weight is not None or self.values["places"][pair.name] == "dense":
                self._check_weight(pair, weight)
            if carry is not None:
                self._check_carry(pair, carry)

    @torch.no_grad()
    def put_weights(self, pairs: Sequence[LoRAPair]) -> None:
        """Give the layers the base weights that are here; `check` comes first."""
        folded = self.folded
        for pair in pairs:
            if pair.name in folded:
                pair.base_weight.copy_(folded[pair.name])

    def _check_weight(self, pair: LoRAPair, saved: Tensor | None) -> None:
        present = pair.base_weight
        if saved is None:
            raise ValueError(
                f"{self.path} lacks the base weight of {pair.name!r}. Nothing was loaded."
            )
        if present.device.type == "meta":
            raise ValueError(
                f"{self.path} holds a base weight for {pair.name!r}, whose own has no memory "
                "(device meta): load the base first. Nothing was loaded."
            )
        if saved.shape != present.shape or saved.dtype != present.dtype:
            raise ValueError(
                f"{self.path} holds a base weight {tuple(saved.shape)} {saved.dtype} for "
                f"{pair.name!r}, the model has {tuple(present.shape)} {present.dtype}. Nothing was "
                "loaded."
            )

    def _check_carry(self, pair: LoRAPair, carry: dict[str, Tensor]) -> None:
        up, down, cut = carry["up"], carry["down"], carry["cut"]
        columns = up.shape[-1] if up.ndim else 0
        m, n = pair.P_parameter.shape[0], pair.Q_parameter[0].numel()
        if up.shape != (m, columns) or down.shape != (columns, n) or cut.ndim != 0:
            raise ValueError(
                f"{self.path} holds a carry {tuple(up.shape)}, {tuple(down.shape)} for "
                f"{pair.name!r}, whose weight is {(m, n)}. Nothing was loaded."
            )
