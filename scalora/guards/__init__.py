"""Refuse, skip or warn before a step changes anything; compute nothing."""
