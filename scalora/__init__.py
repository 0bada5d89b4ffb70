"""ScaLoRA: an optimizer for LoRA fine-tuning whose updates are not confined to the adapter's rank."""

from scalora.moments import register_moments
from scalora.optimizer import ScaLoRA, create_scalora_optimizer
from scalora.scaling import optimal_scaling

__version__ = "0.1.0"

__all__ = [
    "ScaLoRA",
    "create_scalora_optimizer",
    "optimal_scaling",
    "register_moments",
]
