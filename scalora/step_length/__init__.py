"""How long a step of the inner optimizer is: rates read, steps counted, the length calibrated."""
