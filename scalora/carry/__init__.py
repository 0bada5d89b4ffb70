"""Low-rank factors beside a base that must not be touched: they hold the frozen increments."""

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
