"""The carry of one layer: frozen increments as two factors, and what was cut from them."""

from __future__ import annotations

import torch
from torch import Tensor

from scalora.carry.factors import inner_product, relative_cut


class Carry:
    """``up @ down``, in units of the adapter's product: PEFT's scaling applies to both.

    All of its capacity takes part in every forward pass, so that shapes and addresses stay; columns
    that are not used yet are zero.

    Args:
        m, n: of the layer's weight.
        capacity: the most columns.
        device: of the factors.
        dtype: likewise, float32 at least: an increment must not be rounded to the dtype of a
            half-precision adapter, and a sum of many even less.

    Attributes:
        up: (m, capacity).
        down: (capacity, n).
        columns: how many are used.
        cut: 0-d, the energy (squared Frobenius norm) of all that was cut so far.
    """

    def __init__(
        self, m: int, n: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.up = torch.zeros(m, capacity, device=device, dtype=dtype)
        self.down = torch.zeros(capacity, n, device=device, dtype=dtype)
        self.columns = 0
        self.cut = torch.zeros((), device=device, dtype=dtype)

    @property
    def capacity(self) -> int:
        """The most columns."""
        return self.down.shape[0]

    @property
    def used_up(self) -> Tensor:
        """(m, columns)."""
        return self.up[:, : self.columns]

    @property
    def used_down(self) -> Tensor:
        """(columns, n)."""
        return self.down[: self.columns]

    def on(self, device: torch.device) -> Carry:
        """Itself, moved there if it was elsewhere (the model was moved since)."""
        if self.up.device != device:
            self.up, self.down = self.up.to(device), self.down.to(device)
            self.cut = self.cut.to(device)
        return self

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` columns in all; nothing that is there changes."""
        more = capacity - self.capacity
        self.up = torch.nn.functional.pad(self.up, (0, more))
        self.down = torch.nn.functional.pad(self.down, (0, 0, 0, more))

    def clear(self) -> None:
        """Empty it."""
        for tensor in (self.up, self.down, self.cut):
            tensor.zero_()
        self.columns = 0

    def relative_cut(self, P: Tensor, Q: Tensor) -> Tensor:
        """0-d: the energy cut so far over that of all that was learned beside the base.

        Args:
            P: (m, r), the adapter's.
            Q: (r, n), likewise.
        """
        own = inner_product(self.up, self.down, self.up, self.down)
        return relative_cut(self.cut, own, self.up, self.down, P, Q)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        capacity = torch.tensor(self.capacity)
        return {"up": self.used_up, "down": self.used_down, "cut": self.cut, "capacity": capacity}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` was taken of, this very carry included; never with less room."""
        up, down, cut = (state[name].clone() for name in ("up", "down", "cut"))
        if int(state["capacity"]) > self.capacity:
            self.grow(int(state["capacity"]))
        self.clear()
        self.columns = up.shape[1]
        self.used_up.copy_(up)
        self.used_down.copy_(down)
        self.cut.copy_(cut)
