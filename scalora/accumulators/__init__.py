"""Where the frozen increments of a re-basing go: into the base weight, or beside it."""

from scalora.accumulators.accumulator import Accumulator
from scalora.accumulators.beside import CarryAccumulator
from scalora.accumulators.increment import increment, increment_columns, increment_of_P
from scalora.accumulators.into_base import DenseAccumulator
from scalora.accumulators.memory import LayerMemory

__all__ = [
    "Accumulator",
    "CarryAccumulator",
    "DenseAccumulator",
    "LayerMemory",
    "increment",
    "increment_columns",
    "increment_of_P",
]
