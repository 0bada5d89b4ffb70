"""State of a run as it is saved, and what a run that continues it must agree on."""
