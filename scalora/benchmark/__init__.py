"""Benchmarks that print their own tables: ``python -m scalora.benchmark``."""
