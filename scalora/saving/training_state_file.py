"""The file ``scalora.safetensors``, which completes a checkpoint: its content and its checks.

Held by tests/resuming/test_training_state.py and test_base_left_out.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalora import peft_layers
from scalora.arguments import check_folder
from scalora.files import read_tensors, write_tensors
from scalora.peft_layers import LoRAPair
from scalora.resuming.encoding import noted, opened, restored, saved_carry, sealed

STATE_FILE = "scalora.safetensors"
_BESIDE = "base beside the adapter"  # value: the file, and layer name -> the weight's name in it


@dataclass(frozen=True)
class TrainingStateFile:
    """The content of a training state's file.

    A checksum covers everything in it, so a file that is not as it was written is refused.  That
    keeps out accidents, not an attacker, who can compute the checksum anew.

    Attributes:
        path: the file's path.
        tensors: CPU tensors: those of `scalora.resuming.encoding.flattened`, and per folded layer
            its base weight as ``base:`` and the layer's name, wherever it is stored.
        values: the values of `flattened`, and beside them ``adapter``, the factors' checksums, and
            ``pretrained``: layer name -> [dtype, checksum] of the base weights that nothing has
            been folded into, which are therefore not stored.
    """

    path: Path
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @staticmethod
    def write(
        folder: str | PathLike[str], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> Path:
        """Write a file, whole or not at all, and return its path.

        Args:
            folder: an existing folder.
            tensors, values: the attributes.  Base weights that are in the adapter's file according
                to `noted_in_adapter_file` are covered by the checksum but not written again.
        """
        path = Path(folder) / STATE_FILE
        everything, metadata = sealed(tensors, values)
        elsewhere = {f"base:{name}" for name in values.get(_BESIDE, {"layers": ()})["layers"]}
        here = {name: tensor for name, tensor in everything.items() if name not in elsewhere}
        write_tensors(path, here, metadata)
        return path

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> TrainingStateFile:
        """Read the file in a checkpoint's folder, and the base weights in its adapter's file.

        Raises:
            ValueError: it is missing, cut short or changed, or has another version's format.
        """
        path = Path(folder) / STATE_FILE
        check_folder(path.parent, "nothing was loaded")
        if not path.is_file():
            raise ValueError(
                f"{path.parent} has no {STATE_FILE}, which ScaLoRACallback and "
                "scalora.save_training_state write: nothing was loaded."
            )
        tensors, metadata = read_tensors(path)
        elsewhere = noted(metadata).get(_BESIDE)
        if elsewhere is not None:
            file = path.parent / elsewhere["file"]
            weights = peft_layers.base_weights_at(file, elsewhere["layers"])
            tensors |= {f"base:{name}": weight for name, weight in weights.items()}
        values = opened(tensors, metadata, path)
        if "pretrained" not in values:
            raise ValueError(f"{path} is damaged: its entry 'pretrained' is missing.")
        return cls(path, tensors, values)

    @property
    def folded(self) -> dict[str, Tensor]:
        """Layer name -> base weight, for the layers whose base weight was stored."""
        return {
            name.removeprefix("base:"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("base:")
        }

    @property
    def base_dtype(self) -> torch.dtype | None:
        """Dtype of the base weights that increments go into, stored or not; None if none do."""
        here = next((weight.dtype for weight in self.folded.values()), None)
        others = (getattr(torch, dtype) for dtype, _ in self.values["pretrained"].values())
        return here or next(others, None)

    @property
    def rebasing_state(self) -> dict[str, Any]:
        """The value of `scalora.ScaLoRA.rebasing_state` that was saved."""
        return restored(self.tensors, self.values)

    def carry(self, layer: str) -> dict[str, Tensor] | None:
        """Return a layer's ``up`` (m, c), ``down`` (c, n), ``cut`` and ``capacity``, or None."""
        return saved_carry(self.tensors, layer)

    def check(self, pairs: Sequence[LoRAPair]) -> None:
        """Raise a ValueError if the file was not saved with these layers' adapter and base.

        Args:
            pairs: all layers that the file names.
        """
        if self.values["adapter"] != peft_layers.adapter_checksums(pairs):
            raise ValueError(
                f"the model's adapter is not the one {self.path} was saved with: load the adapter "
                "of the same checkpoint first. Nothing was loaded."
            )
        for pair in pairs:
            weight, carry = self.folded.get(pair.name), self.carry(pair.name)
            left_out = pair.name in self.values["pretrained"]
            if weight is not None or (self.values["places"][pair.name] == "dense" and not left_out):
                self._check_weight(pair, weight)
            if carry is not None:
                self._check_carry(pair, carry)
        self._check_pretrained([pair for pair in pairs if pair.name in self.values["pretrained"]])

    @torch.no_grad()
    def put_weights(self, pairs: Sequence[LoRAPair]) -> None:
        """Copy the stored base weights into the layers; call `check` first."""
        folded = self.folded
        for pair in pairs:
            if pair.name in folded:
                pair.base_weight.copy_(folded[pair.name])

    def _check_weight(self, pair: LoRAPair, saved: Tensor | None) -> None:
        """Raise a ValueError unless a stored base weight fits the layer."""
        present = pair.base_weight
        if saved is None:
            raise ValueError(
                f"{self.path} lacks the base weight of {pair.name!r}. Nothing was loaded."
            )
        self._check_memory(pair)
        if saved.shape != present.shape or saved.dtype != present.dtype:
            raise ValueError(
                f"{self.path} holds a base weight {tuple(saved.shape)} {saved.dtype} for "
                f"{pair.name!r}, the model has {tuple(present.shape)} {present.dtype}. Nothing was "
                "loaded."
            )

    def _check_memory(self, pair: LoRAPair) -> None:
        """Raise a ValueError if the layer's base weight is on the meta device."""
        if pair.base_weight.device.type == "meta":
            raise ValueError(
                f"{self.path} needs the base weight of {pair.name!r}, which has no memory (device "
                "meta): load the base first. Nothing was loaded."
            )

    def _check_pretrained(self, pairs: Sequence[LoRAPair]) -> None:
        """Raise a ValueError unless base weights that are not stored are as they were at saving."""
        for pair in pairs:
            self._check_memory(pair)
        found = base_fingerprints(pairs)
        for name, expected in found.items():
            saved = self.values["pretrained"][name]
            if saved != expected:
                raise ValueError(
                    f"{self.path} belongs to another base weight of {name!r} ({saved[0]}; here "
                    f"{expected[0]}), or that has moved since: nothing had been folded into it yet "
                    "when the file was written, so it is not in there. Load the pretrained model "
                    "of that run anew; to go back in one process, save with "
                    "all_base_weights=True. Nothing was loaded."
                )

    def _check_carry(self, pair: LoRAPair, carry: dict[str, Tensor]) -> None:
        """Raise a ValueError unless a carry fits the layer's weight."""
        up, down, cut = carry["up"], carry["down"], carry["cut"]
        columns = up.shape[-1] if up.ndim else 0
        m, n = pair.shape
        if up.shape != (m, columns) or down.shape != (columns, n) or cut.ndim != 0:
            raise ValueError(
                f"{self.path} holds a carry {tuple(up.shape)}, {tuple(down.shape)} for "
                f"{pair.name!r}, whose weight is {(m, n)}. Nothing was loaded."
            )


def base_fingerprints(pairs: Sequence[LoRAPair]) -> dict[str, list[Any]]:
    """Return layer name -> [dtype, checksum] of the base weight.  Waits for the device once."""
    dtypes = {pair.name: str(pair.base_weight.dtype).removeprefix("torch.") for pair in pairs}
    sums = peft_layers.base_checksums(pairs)
    return {name: [dtypes[name], sums[name]] for name in dtypes}


def noted_in_adapter_file(pairs: Sequence[LoRAPair], folder: Path, adapter: str) -> dict[str, Any]:
    """Return the entry of `values` that names the base weights in the adapter's file, if any."""
    file, layers = peft_layers.weights_in_adapter_file(pairs, folder, adapter)
    return {_BESIDE: {"file": file, "layers": layers}} if layers else {}
