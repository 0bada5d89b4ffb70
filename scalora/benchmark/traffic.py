"""What one process receives from the others in a step of FSDP2, as a formula: bytes.

A gathering of a tensor spread over p processes receives p - 1 parts of ``ceil(rows / p)`` rows: a
factor of fewer rows than processes is padded to one row each.  A sum over p processes, as a ring
does it, receives 2 (p - 1) / p of the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, int]

_WORD = 4  # bytes of a float32: of flags and of sums


@dataclass(frozen=True)
class Plan:
    """A model, its adapter and how many processes share it.

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
        """Of one gathering of a (rows, columns) tensor."""
        return (self.processes - 1) * -(-rows // self.processes) * columns * item

    def summed(self, count: int, item: int = _WORD) -> float:
        """Of one sum over processes."""
        return 2 * (self.processes - 1) / self.processes * count * item

    def adapter(self, item: int) -> int:
        """Of gathering all factors once, or of giving out the sums of their gradients."""
        r = self.rank
        return sum(self.gathered(m, r, item) + self.gathered(r, n, item) for m, n in self.adapted)

    def training(self) -> int:
        """FSDP2's own: weights for the forward and the backward pass, gradients of the factors."""
        item = self.base_bytes
        blocks = sum(self.gathered(*shape, item) for shape in (*self.adapted, *self.block_rest))
        root = sum(self.gathered(*shape, item) for shape in self.root)
        factors = self.adapter(self.gathered_factor_bytes)
        return 2 * (blocks + factors) + root + self.adapter(_WORD)

    def every_step(self, calibrating: bool) -> float:
        """Whether a gradient overflowed, and the sums that calibration asks for."""
        return self.summed(1) + (self.summed(5) + self.summed(1) if calibrating else 0)

    def renewal(self, columns: int = 1) -> float:
        """Of a step in which ``columns`` of every layer are renewed."""
        item = self.factor_bytes
        return sum(
            self.gathered(m, columns, item) + self.summed(columns * n, item)
            for m, n in self.adapted
        )

    def rebasing(self, with_direction: bool) -> float:
        """Of a step with ``rule="exact"``.

        Gathered are the factors and their gradients for the model, and the factors for what is
        frozen.  ``with_direction``: the model of the inner optimizer's step as well, which a CPU
        needs at the first re-basing alone.
        """
        times = 6 if with_direction else 3
        return times * self.adapter(self.factor_bytes) + self.summed(len(self.adapted))


def llama_70b(processes: int, rank: int = 16) -> Plan:
    """Llama 3 70B with an adapter on every linear layer of its 80 blocks, in bfloat16."""
    d, hidden, keys, vocabulary = 8192, 28672, 1024, 128256
    block = [(d, d), (keys, d), (keys, d), (d, d), (hidden, d), (hidden, d), (d, hidden)]
    return Plan(
        adapted=block * 80,
        block_rest=[(d, 1)] * 160,
        root=[(vocabulary, d), (vocabulary, d), (d, 1)],
        rank=rank,
        processes=processes,
    )
