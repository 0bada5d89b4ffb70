"""Length of the inner optimizer's steps: rates read, steps counted, the length calibrated."""
