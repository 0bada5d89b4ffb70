"""ScaLoRA: fine-tuning with LoRA whose updates are not confined to the adapter's rank."""

from scalora.integrations.peft_factory import create_scalora_optimizer
from scalora.integrations.trainer import ScaLoRACallback
from scalora.moments import register_moments
from scalora.optimizer import ScaLoRA
from scalora.saving.finished import save_adapter, save_merged
from scalora.saving.spectrum import delta_spectrum, effective_rank, plot_spectrum
from scalora.saving.training_state import (
    load_rebased_weights,
    load_training_state,
    save_training_state,
)
from scalora.scaling import optimal_scaling

__version__ = "0.1.0"

__all__ = [
    "ScaLoRA",
    "ScaLoRACallback",
    "create_scalora_optimizer",
    "delta_spectrum",
    "effective_rank",
    "load_rebased_weights",
    "load_training_state",
    "optimal_scaling",
    "plot_spectrum",
    "register_moments",
    "save_adapter",
    "save_merged",
    "save_training_state",
]
