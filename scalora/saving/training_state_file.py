"""The file that completes a checkpoint, ``scalora.safetensors``: what it holds, and its checks."""

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
_BESIDE = "base beside the adapter"  # the file, and layer name -> the weight's name in it


@dataclass(frozen=True)
class TrainingStateFile:
    """One that was read.

    Its checksum is of everything in it, so what is not as it was written is not read.  It keeps
    accidents out, not an attacker, who can compute it anew.

    Attributes:
        path: of the file.
        tensors: on the CPU; ``base:`` and a layer's name -> its base weight, be it here or in the
            adapter's file, and those of `scalora.resuming.encoding.flattened`.
        values: what `scalora.ScaLoRA.rebasing_state` gave besides; ``adapter``, the checksums of
            the factors; and ``pretrained``, of the base weights that are not here because nothing
            has been folded into them: layer name -> dtype and checksum.
    """

    path: Path
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @staticmethod
    def write(
        folder: str | PathLike[str], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> Path:
        """Write one, whole or not at all, and return its path; the arguments are the attributes.

        Base weights that ``values`` says are beside the adapter are not written again.
        """
        path = Path(folder) / STATE_FILE
        everything, metadata = sealed(tensors, values)
        beside = {f"base:{name}" for name in values.get(_BESIDE, {"layers": ()})["layers"]}
        here = {name: tensor for name, tensor in everything.items() if name not in beside}
        write_tensors(path, here, metadata)
        return path

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> TrainingStateFile:
        """The one in a checkpoint's folder.

        Raises:
            ValueError: it is missing, cut short or changed, or was not written by this version of
                this package.
        """
        path = Path(folder) / STATE_FILE
        check_folder(path.parent, "nothing was loaded")
        if not path.is_file():
            raise ValueError(
                f"{path.parent} has no {STATE_FILE}, which ScaLoRACallback and "
                "scalora.save_training_state write: nothing was loaded."
            )
        tensors, metadata = read_tensors(path)
        beside = noted(metadata).get(_BESIDE)
        if beside is not None:
            file = path.parent / beside["file"]
            weights = peft_layers.base_weights_at(file, beside["layers"])
            tensors |= {f"base:{name}": weight for name, weight in weights.items()}
        values = opened(tensors, metadata, path)
        if "pretrained" not in values:
            raise ValueError(f"{path} is damaged: its entry 'pretrained' is missing.")
        return cls(path, tensors, values)

    @property
    def folded(self) -> dict[str, Tensor]:
        """Layer name -> its base weight, of the layers that have one here."""
        return {
            name.removeprefix("base:"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("base:")
        }

    @property
    def base_dtype(self) -> torch.dtype | None:
        """Of the base weights that increments go into, here or not; None if there are none."""
        here = next((weight.dtype for weight in self.folded.values()), None)
        others = (getattr(torch, dtype) for dtype, _ in self.values["pretrained"].values())
        return here or next(others, None)

    @property
    def state(self) -> dict[str, Any]:
        """What `scalora.ScaLoRA.rebasing_state` gave."""
        return restored(self.tensors, self.values)

    def carry(self, layer: str) -> dict[str, Tensor] | None:
        """A layer's ``up`` (m, c), ``down`` (c, n), ``cut`` and ``capacity``; None without one."""
        return saved_carry(self.tensors, layer)

    def check(self, pairs: Sequence[LoRAPair]) -> None:
        """Raise a ValueError if the file was not saved with these layers' adapter and base.

        Args:
            pairs: all layers of the model that it speaks of.
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
        self._check_memory(pair)
        if saved.shape != present.shape or saved.dtype != present.dtype:
            raise ValueError(
                f"{self.path} holds a base weight {tuple(saved.shape)} {saved.dtype} for "
                f"{pair.name!r}, the model has {tuple(present.shape)} {present.dtype}. Nothing was "
                "loaded."
            )

    def _check_memory(self, pair: LoRAPair) -> None:
        if pair.base_weight.device.type == "meta":
            raise ValueError(
                f"{self.path} needs the base weight of {pair.name!r}, which has no memory (device "
                "meta): load the base first. Nothing was loaded."
            )

    def _check_pretrained(self, pairs: Sequence[LoRAPair]) -> None:
        """The base weights that are not here must be there as they were."""
        for pair in pairs:
            self._check_memory(pair)
        found = pretrained_weights(pairs)
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
        up, down, cut = carry["up"], carry["down"], carry["cut"]
        columns = up.shape[-1] if up.ndim else 0
        m, n = pair.shape
        if up.shape != (m, columns) or down.shape != (columns, n) or cut.ndim != 0:
            raise ValueError(
                f"{self.path} holds a carry {tuple(up.shape)}, {tuple(down.shape)} for "
                f"{pair.name!r}, whose weight is {(m, n)}. Nothing was loaded."
            )


def pretrained_weights(pairs: Sequence[LoRAPair]) -> dict[str, list[Any]]:
    """Layer name -> dtype and checksum of its base weight.  Waits for the device once."""
    dtypes = {pair.name: str(pair.base_weight.dtype).removeprefix("torch.") for pair in pairs}
    sums = peft_layers.base_checksums(pairs)
    return {name: [dtypes[name], sums[name]] for name in dtypes}


def noted_beside_adapter(pairs: Sequence[LoRAPair], folder: Path, adapter: str) -> dict[str, Any]:
    """The entry of a state's values for the base weights that the adapter's file has already."""
    file, layers = peft_layers.weights_beside_adapter(pairs, folder, adapter)
    return {_BESIDE: {"file": file, "layers": layers}} if layers else {}
