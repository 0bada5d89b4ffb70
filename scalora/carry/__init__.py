"""Where the frozen increment goes when the base must not be touched: low-rank factors beside it."""

from scalora.carry.carry import Carry
from scalora.carry.factors import (
    absorbed,
    compress,
    frozen,
    relative_cut,
    rounded,
    rounding_energy,
)
from scalora.carry.modules import put_carry

__all__ = [
    "Carry",
    "absorbed",
    "compress",
    "frozen",
    "put_carry",
    "relative_cut",
    "rounded",
    "rounding_energy",
]
