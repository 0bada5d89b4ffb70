"""Benchmarks that print their own tables: ``python -m miub.benchmark``."""
