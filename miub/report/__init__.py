"""Rows and totals of what was measured, as tables, files and pictures."""

from miub.report.report import MIUBReport

__all__ = ["MIUBReport"]
