"""Rows and totals of what was measured, as tables, files and pictures.

Held by tests/miub/test_layer_report.py.
"""

from miub.report.report import MIUBReport

__all__ = ["MIUBReport"]
