"""Column scalings: pure functions of tensors that know no optimizer and no PEFT."""

from scalora.scaling.optimal import DEFAULT_BOUND, optimal_scaling

__all__ = ["DEFAULT_BOUND", "optimal_scaling"]
