"""One re-basing: which layers, by which rule, and where the increments go."""
