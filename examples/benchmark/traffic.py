"""Bytes that one process receives from the others per step of FSDP2, as a formula.

A gathering of a tensor spread over p processes receives p - 1 parts of ``ceil(rows / p)`` rows: a
factor of fewer rows than processes is padded to one row each.  A sum over p processes, as a ring
does it, receives 2 (p - 1) / p of the tensor.  Where rows are exchanged for columns, a process
receives its columns of all the rows that it has not.  Where processes receive different amounts it
is the largest that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, int]

_WORD, _WIDE = 4, 8  # bytes of a float32: of flags and of sums; of a float64: of small matrices


@dataclass(frozen=True)
class Plan:
    """A model, its adapter, and the number of processes that share it.

    Attributes:
        adapted: (m, n) of every weight with an adapter, all of them in blocks.
        block_rest: shapes of the other parameters that FSDP2 gathers twice a step, in blocks.
        root: shapes of those it gathers once, in the root.
        rank: of the adapter.
        processes: that the parameters are spread over.
        base_bytes: of an element of the base when it is gathered.
        factor_bytes: of an element of a factor as it is stored.
        gathered_factor_bytes: of an element of a factor when FSDP2 gathers it to compute with.
    """

    adapted: Sequence[Shape]
    block_rest: Sequence[Shape]
    root: Sequence[Shape]
    rank: int
    processes: int
    base_bytes: int = 2
    factor_bytes: int = 4
    gathered_factor_bytes: int = 2

    def gathered(self, rows: int, columns: int, item: int) -> int:
        """Return the bytes of one gathering of a (rows, columns) tensor."""
        return (self.processes - 1) * -(-rows // self.processes) * columns * item

    def summed(self, count: int, item: int = _WORD) -> float:
        """Return the bytes of one sum over processes."""
        return 2 * (self.processes - 1) / self.processes * count * item

    def adapter(self, item: int) -> int:
        """Return the bytes of gathering all factors, or of scattering their gradients' sums."""
        r = self.rank
        return sum(self.gathered(m, r, item) + self.gathered(r, n, item) for m, n in self.adapted)

    def training(self) -> int:
        """Return FSDP2's own bytes: weights for forward and backward pass, gradients of factors."""
        item = self.base_bytes
        blocks = sum(self.gathered(*shape, item) for shape in (*self.adapted, *self.block_rest))
        root = sum(self.gathered(*shape, item) for shape in self.root)
        factors = self.adapter(self.gathered_factor_bytes)
        return 2 * (blocks + factors) + root + self.adapter(_WORD)

    def every_step(self, calibrating: bool) -> float:
        """Return the bytes of the overflow flag, and of the sums that calibration asks for."""
        return self.summed(1) + (self.summed(5) + self.summed(1) if calibrating else 0)

    def rebasing_of_P(self) -> float:
        """Return the bytes of a re-basing of the default that folds: Q is gathered for it."""
        return sum(
            self.summed(1)  # whether all is finite
            + self.rows_to_columns(n, self.rank, self._least_rows, self.factor_bytes)
            + self.gathered(n, self.rank, self.factor_bytes)
            for _, n in self.adapted
        )

    def rebasing(self, with_direction: bool, dense: bool = True) -> float:
        """Return the bytes of a re-basing with ``rule="exact"``.

        Of Q, its gradient and what is frozen of it every process gets some columns; of P, m long,
        nothing is moved but sums over m.

        Args:
            with_direction: with the model of the inner optimizer's step as well, which is needed
                until the length of a layer's step is known: at the first re-basing.
            dense: fold into the base, for which every process needs all columns of Q.
        """
        r, item = self.rank, self.factor_bytes
        # The largest entry of each matrix: the gradient is two, the direction two more.
        units = self.summed(2) + (self.summed(4) if with_direction else 0)
        models = 2 if with_direction else 1
        exchanges = 6 if with_direction else 3
        return sum(
            units
            + models * self.summed(8 * r * r + 2 * r, _WIDE)
            + self.summed(1)
            + exchanges * self.rows_to_columns(n, r, self._least_rows, item)
            + (self.gathered(n, r, item) if dense else 0)
            for _, n in self.adapted
        )

    @property
    def _least_rows(self) -> int:
        """Return the rows of Q that the process with the fewest holds."""
        return self.rank // self.processes if self.rank % self.processes == 0 else 0

    def rows_to_columns(self, n: int, rows: int, held: int, item: int) -> int:
        """Return the bytes of exchanging rows for columns, where a process holds ``held`` rows."""
        return -(-n // self.processes) * (rows - held) * item

    def carrying(self, columns: int) -> int:
        """Return the bytes of forward and backward pass of carries with room for these columns."""
        item = self.gathered_factor_bytes
        return sum(
            2 * (self.gathered(m, columns, item) + self.gathered(n, columns, item))
            for m, n in self.adapted
        )


def llama_70b(processes: int, rank: int = 16) -> Plan:
    """Return the plan of Llama 3 70B in bfloat16, an adapter on all linear layers of 80 blocks."""
    d, hidden, keys, vocabulary = 8192, 28672, 1024, 128256
    block = [(d, d), (keys, d), (keys, d), (d, d), (hidden, d), (hidden, d), (d, hidden)]
    return Plan(
        adapted=block * 80,
        block_rest=[(d, 1)] * 160,
        root=[(vocabulary, d), (vocabulary, d), (d, 1)],
        rank=rank,
        processes=processes,
    )
