"""The carry of one layer: frozen increments as two factors, and what was cut from them."""

from __future__ import annotations

import torch
from torch import Tensor

from scalora.carry.factors import inner_product, relative_cut
from scalora.sharding.rows import HERE, Rows


class Carry:
    """``up @ down``, in units of the adapter's product: PEFT's scaling applies to both.

    All of its capacity takes part in every forward pass, so that shapes and addresses stay; columns
    that are not used yet are zero.

    Of a sharded layer every process keeps its rows of ``up`` and its share of the columns of
    ``down`` alone.  A linear layer's forward and backward pass gather both for as long as they
    compute with them; a convolution's and an embedding's are whole until the backward pass.

    Args:
        m, n: of the layer's weight.
        capacity: the most columns.
        device: of the factors.
        dtype: likewise, float32 at least: an increment must not be rounded to the dtype of a
            half-precision adapter, and a sum of many even less.
        rows: who holds the m rows, and likewise the n columns.

    Attributes:
        up: (m, capacity), the rows held here.
        down: (capacity, n), the columns held here.
        columns: how many are used.
        cut: 0-d, the energy (squared Frobenius norm) of all that was cut so far.
    """

    def __init__(
        self,
        m: int,
        n: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        rows: Rows = HERE,
    ) -> None:
        self.m, self.n, self.rows = m, n, rows
        own_m, own_n = (len(range(count)[rows.own(count)]) for count in (m, n))
        self.up = torch.zeros(own_m, capacity, device=device, dtype=dtype)
        self.down = torch.zeros(capacity, own_n, device=device, dtype=dtype)
        self.columns = 0
        self.cut = torch.zeros((), device=device, dtype=dtype)

    @property
    def capacity(self) -> int:
        """The most columns."""
        return self.down.shape[0]

    @property
    def used_up(self) -> Tensor:
        """(m, columns), the rows held here."""
        return self.up[:, : self.columns]

    @property
    def used_down(self) -> Tensor:
        """(columns, n), the columns held here."""
        return self.down[: self.columns]

    def on(self, device: torch.device) -> Carry:
        """Itself, moved there if it was elsewhere (the model was moved since)."""
        if self.up.device != device:
            self.up, self.down = self.up.to(device), self.down.to(device)
            self.cut = self.cut.to(device)
        return self

    def among(self, rows: Rows) -> Carry:
        """Itself, dealt out if its layer was sharded since; never put together again."""
        if rows.processes > 1 and self.rows.processes == 1:
            self.up = self.up[rows.own(self.m)].clone()
            self.down = self.down[:, rows.own(self.n)].clone()
            self.rows = rows
        return self

    def whole_up(self, dtype: torch.dtype | None = None) -> Tensor:
        """(m, capacity), on every process that has a share, all of which must call this."""
        return self.rows.gathered(self.up.to(dtype or self.up.dtype), 0, self.m)

    def whole_down(self, dtype: torch.dtype | None = None) -> Tensor:
        """(capacity, n), likewise."""
        return self.rows.gathered(self.down.to(dtype or self.down.dtype), 1, self.n)

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
            P: (m, r), the adapter's, the rows held here.
            Q: (r, n), likewise, the columns held here.
        """
        own = inner_product(self.up, self.down, self.up, self.down, self.rows)
        return relative_cut(self.cut, own, self.up, self.down, P, Q, self.rows)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, whole; of a sharded layer on the host, where there is room."""
        up = self.rows.gathered(self.used_up, 0, self.m)
        down = self.rows.gathered(self.used_down, 1, self.n)
        if self.rows.processes > 1:
            up, down = up.cpu(), down.cpu()
        return {"up": up, "down": down, "cut": self.cut, "capacity": torch.tensor(self.capacity)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` was taken of, this very carry included; never with less room."""
        up, down, cut = (state[name].clone() for name in ("up", "down", "cut"))
        if int(state["capacity"]) > self.capacity:
            self.grow(int(state["capacity"]))
        self.clear()
        self.columns = up.shape[1]
        self.used_up.copy_(up[self.rows.own(self.m)])
        self.used_down.copy_(down[:, self.rows.own(self.n)])
        self.cut.copy_(cut)
