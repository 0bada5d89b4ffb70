"""Where the frozen increment goes when the base must not be touched: low-rank factors beside it."""

from scalora.carry.factors import Compressed, compress

__all__ = ["Compressed", "compress"]
