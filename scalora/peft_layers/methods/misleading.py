"""PEFT's methods whose names promise the pretrained model, on a base that was changed.

Held by tests/peft_layers/test_misleading_names.py.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from scalora.peft_layers.pair import folded_adapters
from scalora.warning import warn

_FOLDED = "ScaLoRA has folded part of what {adapters} learned into the base weights"
_MESSAGES = {
    "disable_adapter_layers": (
        f"{_FOLDED}: with the adapter disabled this is not the pretrained model. Where you need "
        "that, as the reference model of DPO for example, train with accumulator='carry', or keep "
        "a copy of the pretrained model."
    ),
    "disable_adapters": (
        f"{_FOLDED}: with the adapters disabled this is not the pretrained model. Where you need "
        "that, train with accumulator='carry', or keep a copy of the pretrained model."
    ),
    "set_adapter": (
        f"{_FOLDED}, so another adapter does not compute on the pretrained model. Train with "
        "accumulator='carry'; or call scalora.save_adapter(model, path, base=...) and load that "
        "and the other adapter on the pretrained model."
    ),
    "unload": (
        f"{_FOLDED}: what unload returns is neither the pretrained model nor the one that was "
        "trained. Call model.merge_and_unload() for that; load the pretrained model anew, or "
        "train with accumulator='carry'."
    ),
    "delete_adapter": (
        f"{_FOLDED}: deleting the adapter does not take that out. Call scalora.save_adapter(model, "
        "path, base=...) before, and load the pretrained model anew; or train with "
        "accumulator='carry'."
    ),
}
MISLEADING = frozenset(_MESSAGES)
"""Names of these methods."""


def warn_of_changed_base(model: nn.Module) -> None:
    """Make each of these methods warn, once, if increments are in the base weights.

    Args:
        model: a PeftModel, or a model with the methods of transformers' ``add_adapter``.
    """
    tuner: Any = model.base_model if isinstance(model, PeftModel) else model
    for method in MISLEADING:
        if callable(getattr(type(tuner), method, None)) and method not in vars(tuner):
            setattr(tuner, method, _WarnsOnce(tuner, method))


class _WarnsOnce:
    """A method of PEFT's or transformers' model that warns before its first call.

    An object, not a bound method: pickle would restore that as the method of the class.
    """

    def __init__(self, tuner: Any, method: str) -> None:
        self.tuner = tuner
        self.method = method
        self.warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        folded = {name for module in self.tuner.modules() for name in folded_adapters(module)}
        if self.method == "set_adapter":
            names = args[0] if args else kwargs.get("adapter_name", [])
            folded -= {names} if isinstance(names, str) else set(names)
        if folded and not self.warned:
            self.warned = True
            adapters = ", ".join(map(repr, sorted(folded)))
            warn(_MESSAGES[self.method].format(adapters=adapters))
        return getattr(type(self.tuner), self.method)(self.tuner, *args, **kwargs)
