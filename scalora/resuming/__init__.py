"""How far a run has come, as it is saved, and what a run that continues it must agree on."""
