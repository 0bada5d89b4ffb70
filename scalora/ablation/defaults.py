"""Defaults of the command, apart from what they are for: ``--help`` imports nothing heavier."""

SUITE = "short"
SEEDS = 3
SMOKE_STEPS = 4
