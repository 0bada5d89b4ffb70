"""Optimizer state under a re-basing: its degrees, its transfer, and the coming direction."""

from scalora.moments.moments import Moments
from scalora.moments.table import moments_of, register_moments

__all__ = ["Moments", "moments_of", "register_moments"]
