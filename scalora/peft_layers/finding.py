"""Finding the LoRA layers of a model, their names, and who shares their weights."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import layer as lora_layers
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scalora.peft_layers.pair import LoRAPair

PREFIX = "base_model.model."
_MOVING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_pairs(model: nn.Module, adapter: str) -> list[LoRAPair]:
    """All LoRA layers of ``model`` that hold ``adapter``, whether they can be re-based or not."""
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
    """Of every adapter."""
    return [pair for name in sorted(adapter_names(model)) for pair in lora_pairs(model, name)]


def _layer_name(module_name: str) -> str:
    """The name in the model under PEFT's and any other wrapper's."""
    return module_name.partition(PREFIX)[2] or module_name


def _inside(module_name: str, paths: list[str]) -> str:
    """The name in the adapted model that the module is part of; ``paths`` are those models'."""
    starts = [f"{path}." if path else "" for path in paths]
    return next(
        (module_name.removeprefix(start) for start in starts if module_name.startswith(start)),
        module_name,
    )


def adapter_names(model: nn.Module) -> set[str]:
    """Names of every LoRA adapter in ``model``."""
    return {
        name
        for module in model.modules()
        if isinstance(module, lora_layers.LoraLayer)
        for name in module.r
    }


def active_adapter(model: nn.Module) -> str:
    """Name of the active LoRA adapter.

    Raises:
        ValueError: none or several are active.
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
    """A weight's name in the model under PEFT's wrapper."""
    return _layer_name(name).replace(".base_layer.", ".")


def base_model(model: nn.Module) -> nn.Module:
    """The model that the adapter was put on, LoRA layers inside."""
    adapted = peft_model(model)
    if isinstance(adapted, PeftModel):
        return adapted.get_base_model()
    return model if adapted is None else adapted


def base_layer_at(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` of the model that the adapter was put on, PEFT's wrappers left out."""
    module: Any = base_model(model)
    for name in filter(None, path.split(".")):
        module = getattr(_unwrapped(module), name)
    return _unwrapped(module)


def _unwrapped(module: Any) -> Any:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return getattr(module, "original_module", module)  # modules_to_save


def moves_base_at_creation(model: nn.Module, adapter: str) -> bool:
    """Whether PEFT's initialisation of the adapter took its product out of the base weights."""
    adapted: Any = peft_model(model)
    return adapted is not None and config_moves_base(adapted.peft_config.get(adapter))


def config_moves_base(config: Any) -> bool:
    """Whether an adapter of this config takes its first product out of the base weights."""
    return str(getattr(config, "init_lora_weights", "")).startswith(_MOVING_INITIALISATIONS)


def is_saved_with_adapter(model: nn.Module, name: str) -> bool:
    """Whether a weight of the base is part of the active adapter's files (``modules_to_save``)."""
    adapted: Any = peft_model(model)
    config: Any = None if adapted is None else adapted.peft_config.get(active_adapter(model))
    modules = getattr(config, "modules_to_save", None) or ()
    return any(f".{module}." in f".{name}" for module in modules)


def sharing_modules(model: nn.Module) -> dict[int, list[str]]:
    """Address of each parameter's storage -> names of the modules that use it."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.device.type != "meta":
                users.setdefault(storage_address(parameter), []).append(_layer_name(name))
    return users


@torch.no_grad()
def untie_adapted_weights(model: nn.Module) -> None:
    """Give every adapted base weight that other modules share a memory of its own.

    Merging into it would change those too.
    """
    users = sharing_modules(model)
    for module in model.modules():
        if not isinstance(module, lora_layers.LoraLayer):
            continue
        base: Any = module.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is None or len(users.get(storage_address(weight), [])) < 2:
            continue
        base.weight = nn.Parameter(weight.clone(), requires_grad=weight.requires_grad)


def storage_address(tensor: Tensor) -> int:
    """Return where the tensor's memory begins: equal for tied weights.

    A tensor made of others (torchao's quantized weights) has no memory of its own: the first one's.
    A fake tensor has none at all, and its storage object's address stands for it.
    """
    inner: Any = tensor
    while is_traceable_wrapper_subclass(inner):
        inner = getattr(inner, inner.__tensor_flatten__()[0][0])
    storage = inner.untyped_storage()
    return storage._cdata if isinstance(inner, FakeTensor) else storage.data_ptr()


def peft_model(model: nn.Module) -> nn.Module | None:
    """The first of `adapted_models`: it has the adapters' configs, by name, in ``peft_config``."""
    return next(iter(adapted_models(model).values()), None)


def adapted_models(model: nn.Module) -> dict[str, nn.Module]:
    """Path in ``model`` -> every model that adapters were put on.

    A PeftModel; or the very model that ``add_adapter`` (of transformers, or of what is built on it)
    or ``peft.inject_adapter_in_model`` put LoRA layers into.  It may be ``model`` itself, or inside
    a wrapper such as DDP or a ``SentenceTransformer``.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(not outer or path.startswith(f"{outer}.") for outer in found):
            continue
        injected = isinstance(vars(module).get("peft_config"), dict)
        if isinstance(module, PeftModel) or (injected and not isinstance(module, BaseTuner)):
            found[path] = module
    return found
