"""Places for the frozen increments of a re-basing: the base weight, or a carry beside it.

Held by tests/rebasing/test_carry_training.py and tests/rebasing/test_all_or_nothing.py.
"""

from scalora.rebasing.accumulators.carry import CarryAccumulator
from scalora.rebasing.accumulators.dense import DenseAccumulator

__all__ = ["CarryAccumulator", "DenseAccumulator"]
