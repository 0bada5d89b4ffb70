"""Optimizer state under a re-basing: its degrees, its transfer, and the coming direction."""

from scalora.moments.moments import Moments
from scalora.moments.table import moments_of, register_moments
from scalora.moments.transfer import transfer, transfer_reduced

__all__ = ["Moments", "moments_of", "register_moments", "transfer", "transfer_reduced"]
