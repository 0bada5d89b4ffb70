"""Everything that is written to disk or read from it: adapters, merged models, training states."""

from scalora.saving.adapter import save_adapter
from scalora.saving.export import Export, export_checkpoint
from scalora.saving.merged import save_merged
from scalora.saving.pretrained import Base, change_since, pretrained_weights
from scalora.saving.sharded_checkpoint import load_sharded, save_sharded
from scalora.saving.spectrum import delta_spectrum, effective_rank, entropy_rank, plot_spectrum
from scalora.saving.training_state import (
    load_rebased_weights,
    load_training_state,
    save_training_state,
)
from scalora.saving.training_state_file import STATE_FILE

__all__ = [
    "STATE_FILE",
    "Base",
    "Export",
    "change_since",
    "delta_spectrum",
    "effective_rank",
    "entropy_rank",
    "export_checkpoint",
    "load_rebased_weights",
    "load_sharded",
    "load_training_state",
    "plot_spectrum",
    "pretrained_weights",
    "save_adapter",
    "save_merged",
    "save_sharded",
    "save_training_state",
]
