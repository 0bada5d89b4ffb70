"""Low-rank increments added to dense base weights in place; tensors only."""

from scalora.fold.dense import ROUNDINGS, fold, write_whole
from scalora.fold.rounding import is_rounded, noise_bits, noise_seed, round_stochastically

__all__ = [
    "ROUNDINGS",
    "fold",
    "is_rounded",
    "noise_bits",
    "noise_seed",
    "round_stochastically",
    "write_whole",
]
