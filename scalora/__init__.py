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

* `effective_rank`, `delta_spectrum`, `plot_spectrum`: of the whole change of every layer.
* `optimal_scaling`: the mathematics of the paper's rules, on tensors.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scalora.integrations.peft_factory import create_scalora_optimizer
    from scalora.integrations.trainer import ScaLoRACallback
    from scalora.moments import register_moments
    from scalora.optimizer import ScaLoRA
    from scalora.saving import (
        delta_spectrum,
        effective_rank,
        load_rebased_weights,
        load_training_state,
        plot_spectrum,
        save_adapter,
        save_merged,
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

# Imported when first asked for (PEP 562): torch, transformers and PEFT take seconds to import, and
# `scalora --help` needs none of them.
_MODULES = {
    "ScaLoRA": "scalora.optimizer",
    "ScaLoRACallback": "scalora.integrations.trainer",
    "create_scalora_optimizer": "scalora.integrations.peft_factory",
    "delta_spectrum": "scalora.saving",
    "effective_rank": "scalora.saving",
    "load_rebased_weights": "scalora.saving",
    "load_training_state": "scalora.saving",
    "optimal_scaling": "scalora.scaling",
    "plot_spectrum": "scalora.saving",
    "register_moments": "scalora.moments",
    "save_adapter": "scalora.saving",
    "save_merged": "scalora.saving",
    "save_training_state": "scalora.saving",
}

if not TYPE_CHECKING:  # a type checker would take any name for one of this module's

    def __getattr__(name: str) -> Any:
        """Import a public name from the module that defines it, and keep it; or a submodule."""
        if name in _MODULES:
            found = globals()[name] = getattr(import_module(_MODULES[name]), name)
            return found
        # A name with a dot would be looked for in a package that may not be there.
        is_public = name.isidentifier() and not name.startswith("_")
        if is_public and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Return the module's names, those that are not imported yet included."""
        return sorted({*globals(), *__all__})
