"""Optimizer state under a re-basing: its degrees, its transfer, and the coming direction."""

from scalora.moments.table import Moments, moments_of, register_by_name, register_moments
from scalora.moments.transfer import transfer, transfer_reduced

__all__ = [
    "Moments",
    "moments_of",
    "register_by_name",
    "register_moments",
    "transfer",
    "transfer_reduced",
]
