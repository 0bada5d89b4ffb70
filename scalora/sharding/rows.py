"""The rows of a tall matrix, which this process holds or several processes divide.

Held by tests/sharding/test_sharded_training.py and test_sharded_carry.py.

The mathematics asks a `Rows` for what it needs of all rows (a sum, a maximum) and never asks how
many processes there are.  `scalora.sharding.dtensors.SharedRows` is the case of several.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Rows:
    """Rows that are all in this process.  One object serves matrices of any number of rows.

    Attributes:
        processes: number of processes among which the rows are divided.
        index: position of this process among them.
    """

    processes: int = 1
    index: int = 0

    def slices(self, count: int) -> list[slice]:
        """Return which of ``count`` rows each process holds, in the order of the processes."""
        return [slice(0, count)]

    def own(self, count: int) -> slice:
        """Return which of ``count`` rows are here."""
        return self.slices(count)[self.index]

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' ``part``, on each of them."""
        return part

    def max(self, part: Tensor) -> Tensor:
        """Return the elementwise maximum of all processes' ``part``, on each of them."""
        return part

    def each(self, part: Tensor) -> Tensor:
        """Return all processes' ``part``, of one shape, as (processes, ...), on each of them."""
        return part.unsqueeze(0)

    def gathered(self, part: Tensor, axis: int, count: int) -> Tensor:
        """Return all ``count`` rows along ``axis``, of which ``part`` has the ones held here."""
        return part

    def rows_to_columns(self, part: Tensor, held: Sequence[int]) -> Tensor:
        """Exchange rows held here for columns held here.

        Args:
            part: (layers, rows held here, n).
            held: number of rows that each process holds.

        Returns:
            (layers, all rows, columns held here), the rows in the order of the processes.
        """
        return part


HERE = Rows()
"""The rows of every matrix that is not sharded."""
