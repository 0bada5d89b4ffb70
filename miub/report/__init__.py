"""What was measured: rows, totals, tables, files, pictures."""

from miub.report.report import MIUBReport

__all__ = ["MIUBReport"]
