"""The LoRA layers of a model, their names, their adapters, and who shares their weights.

Held by tests/peft_layers/test_layers.py, test_injected_adapters.py and
tests/saving/test_merged_ties.py.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.lora import layer as lora_layers
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from scalora.peft_layers.pair import LoRAPair
from scalora.storage import storage_address

PREFIX = "base_model.model."
"""Start of the names in a PeftModel's state dict and in an adapter's files."""
_MOVING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_pairs(model: nn.Module, adapter: str) -> list[LoRAPair]:
    """Return all LoRA layers of ``model`` that hold ``adapter``, re-based or not."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, lora_layers.LoraLayer) and adapter in module.r
    ]
    paths = list(adapted_models(model))
    short = [_layer_name(_inside(name, paths)) for name, _ in found]
    # Two PEFT models in one module may have layers of one name.
    names = short if len(set(short)) == len(short) else [name for name, _ in found]
    return [LoRAPair(name, module, adapter) for name, (_, module) in zip(names, found, strict=True)]


def all_lora_pairs(model: nn.Module) -> list[LoRAPair]:
    """Return the LoRA layers of every adapter in ``model``."""
    return [pair for name in sorted(adapter_names(model)) for pair in lora_pairs(model, name)]


def _layer_name(module_name: str) -> str:
    """Return a module's name in the model that PEFT and other wrappers are around."""
    return module_name.partition(PREFIX)[2] or module_name


def _inside(module_name: str, paths: list[str]) -> str:
    """Return a module's name inside the adapted model it is part of, given these models' paths."""
    starts = [f"{path}." if path else "" for path in paths]
    return next(
        (module_name.removeprefix(start) for start in starts if module_name.startswith(start)),
        module_name,
    )


def adapter_names(model: nn.Module) -> set[str]:
    """Return the names of all LoRA adapters in ``model``."""
    return {
        name
        for module in model.modules()
        if isinstance(module, lora_layers.LoraLayer)
        for name in module.r
    }


def active_adapter(model: nn.Module) -> str:
    """Return the name of the active LoRA adapter.

    Raises:
        ValueError: no adapter is active, or several are.
    """
    active = {
        name
        for module in model.modules()
        if isinstance(module, lora_layers.LoraLayer)
        for name in module.active_adapters
        if name in module.r
    }
    if len(active) != 1:
        raise ValueError(
            f"one LoRA adapter must be active, found {sorted(active)}; pass adapter_name."
        )
    return active.pop()


def base_weight_name(name: str) -> str:
    """Return a weight's name in the model that PEFT's wrapper is around."""
    return _layer_name(name).replace(".base_layer.", ".")


def base_model(model: nn.Module) -> nn.Module:
    """Return the model that the adapter was put on, with the LoRA layers in it."""
    adapted = peft_model(model)
    if isinstance(adapted, PeftModel):
        return adapted.get_base_model()
    return model if adapted is None else adapted


def base_layer_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at ``path`` of the model as it was before PEFT wrapped its modules."""
    module: Any = base_model(model)
    for name in filter(None, path.split(".")):
        module = getattr(_unwrapped(module), name)
    return _unwrapped(module)


def _unwrapped(module: Any) -> Any:
    """Return the module inside PEFT's wrapper, or the module itself."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return getattr(module, "original_module", module)  # modules_to_save


def moves_base_at_creation(model: nn.Module, adapter: str) -> bool:
    """Return whether initialising the adapter took its first product out of the base weights."""
    adapted: Any = peft_model(model)
    return adapted is not None and config_moves_base(adapted.peft_config.get(adapter))


def config_moves_base(config: Any) -> bool:
    """Return whether an adapter of this config takes its first product out of the base weights."""
    return str(getattr(config, "init_lora_weights", "")).startswith(_MOVING_INITIALISATIONS)


def is_saved_with_adapter(model: nn.Module, name: str) -> bool:
    """Return whether the active adapter's files hold a weight of the base (``modules_to_save``)."""
    adapted: Any = peft_model(model)
    config: Any = None if adapted is None else adapted.peft_config.get(active_adapter(model))
    modules = getattr(config, "modules_to_save", None) or ()
    return any(f".{module}." in f".{name}" for module in modules)


def sharing_modules(model: nn.Module) -> dict[int, list[str]]:
    """Return address of each parameter's storage -> names of the modules that hold it."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.device.type != "meta":
                users.setdefault(storage_address(parameter), []).append(_layer_name(name))
    return users


def peft_model(model: nn.Module) -> nn.Module | None:
    """Return the first of `adapted_models`, or None.

    Its ``peft_config`` has the adapters' configs by name.
    """
    return next(iter(adapted_models(model).values()), None)


def adapted_models(model: nn.Module) -> dict[str, nn.Module]:
    """Return path in ``model`` -> model with adapters, for every such model.

    That is a PeftModel, or the model into which ``add_adapter`` (of transformers, or of what is
    built on it) or ``peft.inject_adapter_in_model`` put LoRA layers.  It may be ``model`` itself or
    be inside a wrapper such as DDP or a ``SentenceTransformer``.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(not outer or path.startswith(f"{outer}.") for outer in found):
            continue
        injected = isinstance(vars(module).get("peft_config"), dict)
        if isinstance(module, PeftModel) or (injected and not isinstance(module, BaseTuner)):
            found[path] = module
    return found


def one_adapted_model(model: nn.Module) -> nn.Module:
    """Return the one of `adapted_models`, or raise a ValueError if there is none or several."""
    adapted = adapted_models(model)
    if not adapted:
        raise ValueError(
            f"{type(model).__name__} is no model with PEFT's adapters, nor a module around one."
        )
    if len(adapted) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(adapted)} models with adapters, at "
            f"{sorted(adapted)}: save each by itself."
        )
    return next(iter(adapted.values()))
