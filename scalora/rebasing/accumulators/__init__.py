"""Where the frozen increments of a re-basing go: into the base weight, or beside it.

Held by tests/rebasing/test_carry_training.py and tests/optimizer/test_optimizer.py.
"""

from scalora.rebasing.accumulators.accumulator import Accumulator
from scalora.rebasing.accumulators.carry import CarryAccumulator
from scalora.rebasing.accumulators.dense import DenseAccumulator
from scalora.rebasing.accumulators.increment import increment, increment_columns, increment_of_P
from scalora.rebasing.accumulators.memory import LayerMemory

__all__ = [
    "Accumulator",
    "CarryAccumulator",
    "DenseAccumulator",
    "LayerMemory",
    "increment",
    "increment_columns",
    "increment_of_P",
]
