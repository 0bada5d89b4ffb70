"""Who holds the rows of a tall matrix: this process all of them, or each process some.

The mathematics asks for what it needs of all rows (a sum, a largest entry), and does not know how
many processes there are: `scalora.sharding` has the case of many.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Rows:
    """All rows are here.  Any number of matrices, of any number of rows, is held alike.

    Attributes:
        processes: how many hold rows.
        index: of this process among them.
    """

    processes: int = 1
    index: int = 0

    def slices(self, count: int) -> list[slice]:
        """Which of ``count`` rows each process holds."""
        return [slice(0, count)]

    def own(self, count: int) -> slice:
        """Which of ``count`` rows are here."""
        return self.slices(count)[self.index]

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every process's ``part``, on all of them."""
        return part

    def max(self, part: Tensor) -> Tensor:
        """The largest of every process's ``part``, element by element, on all of them."""
        return part

    def each(self, part: Tensor) -> Tensor:
        """(processes, ...): every process's ``part``, of one shape, on all of them."""
        return part.unsqueeze(0)

    def gathered(self, part: Tensor, axis: int, count: int) -> Tensor:
        """All ``count`` rows, on every process, from the rows along ``axis`` that each holds."""
        return part

    def rows_to_columns(self, part: Tensor, held: Sequence[int]) -> Tensor:
        """Deal out the columns instead of the rows.

        Args:
            part: (layers, rows held here, n).
            held: how many rows each process holds.

        Returns:
            (layers, all rows, columns held here), the rows in the order of the processes.
        """
        return part


HERE = Rows()
"""Not sharded."""
