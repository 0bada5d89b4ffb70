"""The report: rows and totals that print, draw and write themselves."""

from __future__ import annotations

import os
from pathlib import Path

from miub.report.files import as_csv, as_json, read_json
from miub.report.plot import picture
from miub.report.rows import LayerRow, LayerRows
from miub.report.table import as_table
from scalora.files import write_bytes


class MIUBReport(LayerRows):
    """All that a monitor measured; ``print`` it for a table.

    A layer's row is its measurement at the newest step; `averaged` is the mean over all steps.
    Measurements of one layer at one step (of several processes or batches) are of different
    tokens: they are averaged, weighted by their tokens, and their standard errors combined as
    those of independent samples.

    ``report["model.layers.0.self_attn.q_proj"]`` is a layer's row, ``report[layer, adapter]``
    where several adapters were measured.  The names that ``model.named_modules()`` gives are found
    as well, with the prefixes of PEFT and other wrappers.  Iteration is over the rows.

    Arguments, attributes and errors as for `rows.LayerRows`.
    """

    def __str__(self) -> str:
        return as_table(self)

    def __repr__(self) -> str:
        return (
            f"<MIUBReport: {len(self.layers)} layers, estimator={self.estimator!r}, "
            f"noise={self.noise:g}, mean {self.mean:.4g} nats>"
        )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per layer and step, whole or not at all."""
        write_bytes(Path(path), as_csv(self))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write rows, history and totals, whole or not at all."""
        write_bytes(Path(path), as_json(self))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> MIUBReport:
        """Return the report that `to_json` wrote; infinite values come back as nan.

        Raises:
            ValueError: the file is not such a report.
        """
        rows, estimator, noise = read_json(path)
        try:
            return cls._from_rows([LayerRow(**row) for row in rows], estimator, noise)
        except TypeError as error:
            raise ValueError(f"{path} is not a report that MIUBReport.to_json wrote.") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a heat map of blocks against kinds, and lines over steps where there are several.

        Args:
            path: its suffix says the format (png, pdf, svg); png without one.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: matplotlib does not know the format.
        """
        write_bytes(Path(path), picture(self, path))
