"""Benchmarks that print their own tables: ``python -m examples.benchmark``."""
