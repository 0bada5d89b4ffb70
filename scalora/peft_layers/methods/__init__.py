"""PEFT's own methods on a re-based model: made right, refused, or warned about."""

from scalora.peft_layers.methods.save_pretrained import (
    complete_checkpoints,
    complete_what_is_saved,
    restore_methods,
)

__all__ = ["complete_checkpoints", "complete_what_is_saved", "restore_methods"]
