"""Refuse, skip or warn before a step changes anything; `Guard.check` is the one call for all."""
