"""ScaLoRA: fine-tuning with LoRA whose updates are not confined to the adapter's rank.

Train:

* `ScaLoRA`: wraps an optimizer; re-bases the LoRA layers of a PEFT model as it steps.
* `create_scalora_optimizer`: makes both at once, as PEFT's factories do.
* `ScaLoRACallback`: does the same in any ``transformers.Trainer``, TRL's included.
* `register_moments`: tells how another inner optimizer's state depends on the gradient.

Save:

* `save_merged`: writes a plain transformers model.
* `save_adapter`: writes a plain PEFT adapter.
* `save_training_state`, `load_training_state`: complete a checkpoint, and resume from it.
* `load_rebased_weights`: makes a model with a checkpoint's adapter the model that was trained.

Look:

* `effective_rank`, `delta_spectrum`: of the whole change of every layer.
* `optimal_scaling`: the mathematics of the paper's rules, on tensors.
"""

from scalora.integrations.peft_factory import create_scalora_optimizer
from scalora.integrations.trainer import ScaLoRACallback
from scalora.moments import register_moments
from scalora.optimizer import ScaLoRA
from scalora.saving.finished import save_adapter, save_merged
from scalora.saving.spectrum import delta_spectrum, effective_rank
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
    "register_moments",
    "save_adapter",
    "save_merged",
    "save_training_state",
]
