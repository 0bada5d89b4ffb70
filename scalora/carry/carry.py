"""The carry of one layer: frozen increments as two factors, and what was cut from them."""

from __future__ import annotations

import torch
from torch import Tensor

from scalora.carry.factors import inner_product, relative_cut
from scalora.sharding.rows import HERE, Rows


class Carry:
    """``up @ down`` in units of the adapter's product, so that PEFT's scaling applies to both.

    All columns up to the capacity take part in every forward pass, so that shapes and addresses
    stay; those that are not used yet are zero.

    Where a layer is sharded, every process keeps its rows of ``up`` and its share of the columns of
    ``down`` alone.  A linear layer's forward and backward pass gather both for as long as they
    compute with them; a convolution's and an embedding's are whole until the backward pass.

    Args:
        m, n: the layer's weight is (m, n).
        capacity: the most columns.
        device: of the factors.
        dtype: of the factors; whoever rounds to a narrow one answers for what rounding cuts.
        rows: which process holds which of the m rows, and likewise of the n columns.

    Attributes:
        up: (m, capacity), the rows held here.
        down: (capacity, n), the columns held here.
        columns: how many are used.
        cut: 0-d, float32 at least: the energy (squared Frobenius norm) of all that was cut so far.
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
        self.cut = torch.zeros((), device=device, dtype=self.wide_dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the factors are kept."""
        return self.up.dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype in which sums of the factors are taken: float32 at least."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def capacity(self) -> int:
        """The most columns."""
        return self.down.shape[0]

    @property
    def used_up(self) -> Tensor:
        """Used columns of ``up``: (m, columns), the rows held here."""
        return self.up[:, : self.columns]

    @property
    def used_down(self) -> Tensor:
        """Used rows of ``down``: (columns, n), the columns held here."""
        return self.down[: self.columns]

    def on(self, device: torch.device) -> Carry:
        """Return this carry, moved to the device if the model was moved there since."""
        if self.up.device != device:
            self.up, self.down = self.up.to(device), self.down.to(device)
            self.cut = self.cut.to(device)
        return self

    def among(self, rows: Rows) -> Carry:
        """Return this carry, sharded if its layer was sharded since; it is never unsharded."""
        if rows.processes > 1 and self.rows.processes == 1:
            self.up = self.up[rows.own(self.m)].clone()
            self.down = self.down[:, rows.own(self.n)].clone()
            self.rows = rows
        return self

    def whole_up(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return (m, capacity), gathered: every process that has a share must call this.

        Args:
            dtype: of the result; None for `wide_dtype`.
        """
        return self.rows.gathered(self.up, 0, self.m).to(dtype or self.wide_dtype)

    def whole_down(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return (capacity, n), likewise."""
        return self.rows.gathered(self.down, 1, self.n).to(dtype or self.wide_dtype)

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` columns in all; nothing that is there changes."""
        more = capacity - self.capacity
        self.up = torch.nn.functional.pad(self.up, (0, more))
        self.down = torch.nn.functional.pad(self.down, (0, 0, 0, more))

    def widen(self, dtype: torch.dtype) -> None:
        """Keep the factors in ``dtype`` at least; nothing that is there changes."""
        dtype = torch.promote_types(self.dtype, dtype)
        self.up, self.down = self.up.to(dtype), self.down.to(dtype)
        self.cut = self.cut.to(self.wide_dtype)

    def clear(self) -> None:
        """Empty it."""
        for tensor in (self.up, self.down, self.cut):
            tensor.zero_()
        self.columns = 0

    def relative_cut(self, P: Tensor, Q: Tensor) -> Tensor:
        """Return the energy cut so far over that of all that was learned beside the base: 0-d.

        Args:
            P: (m, r), the adapter's, the rows held here.
            Q: (r, n), likewise, the columns held here.
        """
        up, down = self.up.to(self.wide_dtype), self.down.to(self.wide_dtype)
        own = inner_product(up, down, up, down, self.rows)
        return relative_cut(self.cut, own, up, down, P, Q, self.rows)

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs, gathered; if sharded, on the host, where there is room.

        ``up`` (m, columns), ``down`` (columns, n), ``cut`` and ``capacity``, both 0-d.
        """
        up = self.rows.gathered(self.used_up, 0, self.m)
        down = self.rows.gathered(self.used_down, 1, self.n)
        if self.rows.processes > 1:
            up, down = up.cpu(), down.cpu()
        return {"up": up, "down": down, "cut": self.cut, "capacity": torch.tensor(self.capacity)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` returned, of this very carry too; with no less room or precision."""
        up, down, cut = (state[name].clone() for name in ("up", "down", "cut"))
        self.widen(up.dtype)
        if int(state["capacity"]) > self.capacity:
            self.grow(int(state["capacity"]))
        self.clear()
        self.columns = up.shape[1]
        self.used_up.copy_(up[self.rows.own(self.m)])
        self.used_down.copy_(down[:, self.rows.own(self.n)])
        self.cut.copy_(cut)
