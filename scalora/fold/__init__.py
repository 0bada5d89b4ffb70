"""Where the frozen increment of a re-basing goes: into the dense base weight."""

from scalora.fold.dense import ROUNDINGS, fold
from scalora.fold.rounding import noise_bits, noise_seed, round_stochastically

__all__ = ["ROUNDINGS", "fold", "noise_bits", "noise_seed", "round_stochastically"]
