"""An adapter as files, and what ``save_pretrained`` of a re-based model says."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from scalora.callers import level_of_caller
from scalora.peft_layers.finding import PREFIX, all_lora_pairs, lora_pairs, peft_model
from scalora.peft_layers.misleading import warn_of_changed_base
from scalora.peft_layers.pair import LoRAPair


def adapter_with_factors(
    model: PeftModel,
    adapter: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    keep_dora: bool = False,
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter's files with other factors in it: tensors by PEFT's names, and the config.

    Args:
        model: where everything else (``modules_to_save``, biases) comes from.
        adapter: its name.
        factors: layer name -> P (m, k), Q (n, k), the change being ``P Q^T``.  A layer that is not
            named keeps its own.
        keep_dora: whether ``P Q^T`` is the product under DoRA's magnitude, which is kept, and not
            the change of the weight, which it is part of.

    Raises:
        ValueError: such a layer has a LoRA variant, which the others' config cannot express.
    """
    config: Any = copy.deepcopy(model.peft_config[adapter])
    tensors = dict(
        get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    )
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for pair in lora_pairs(model, adapter):
        pattern = f"^{re.escape(_name_in_patterns(pair))}"
        if pair.name not in factors:
            if pair.has_variant and not keep_dora:
                raise ValueError(
                    f"{pair.name!r} has a LoRA variant and cannot be saved as plain LoRA; use "
                    "scalora.save_merged."
                )
            ranks[pattern], alphas[pattern] = pair.rank, pair.scaling * pair.rank
            continue
        P, Q = factors[pair.name]
        k = P.shape[-1]
        ranks[pattern] = alphas[pattern] = k
        if pair.is_embedding:
            names = (
                f"{PREFIX}{pair.name}.lora_embedding_B",
                f"{PREFIX}{pair.name}.lora_embedding_A",
            )
        else:
            names = (f"{PREFIX}{pair.name}.lora_B.weight", f"{PREFIX}{pair.name}.lora_A.weight")
        tensors[names[0]] = P.reshape(P.shape[0], k, *pair.P_parameter.shape[2:])
        tensors[names[1]] = Q.T.reshape(k, *pair.Q_parameter.shape[1:])
        if not keep_dora:
            tensors.pop(f"{PREFIX}{pair.name}.lora_magnitude_vector.weight", None)
        bias = f"{PREFIX}{pair.name}.lora_B.bias"
        if bias in tensors:
            tensors[bias] = tensors[bias] * pair.scaling
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    config.use_rslora = False
    config.use_dora = config.use_dora and keep_dora
    config.init_lora_weights = config.inference_mode = True
    for pair in lora_pairs(model, adapter):
        _check_found(pair, config, tensors)
    return tensors, config


def _check_found(pair: LoRAPair, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless PEFT makes the layer of this config as large as the factors that are loaded."""
    name = _name_in_patterns(pair)
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    leaf = "lora_embedding_B" if pair.is_embedding else "lora_B.weight"
    written = tensors[f"{PREFIX}{pair.name}.{leaf}"].shape[1]
    if written * pair.rank != rank * pair.P_parameter.shape[1]:
        raise ValueError(
            f"the adapter of {pair.name!r} cannot be written so that PEFT loads it: it would make "
            f"a layer of rank {rank} for {written} columns. Use scalora.save_merged."
        )


def _name_in_patterns(pair: LoRAPair) -> str:
    """What PEFT matches ``rank_pattern`` and ``alpha_pattern`` against.

    Of ``target_parameters`` that is the parameter's name.  PEFT's layers over several of one module
    are inside one another there, under ``base_layer``.
    """
    if not isinstance(pair.module, ParamWrapper):
        return pair.name
    owner = pair.name
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    return f"{owner}.{pair.module.parameter_name}"


def warn_when_saved_alone(model: nn.Module) -> None:
    """Make ``save_pretrained`` of a re-based PeftModel say what it leaves out.

    And what else would mislead by its name (`scalora.peft_layers.misleading`).
    """
    wrapped = peft_model(model)
    if wrapped is None or "save_pretrained" in vars(wrapped):
        return
    wrapped.save_pretrained = _SavePretrained(wrapped)
    wrapped.load_adapter = _LoadAdapter(wrapped)
    warn_of_changed_base(wrapped)


def complete_checkpoints(
    model: nn.Module, completing: Callable[[Path], AbstractContextManager[None]] | None
) -> None:
    """Write what an adapter lacks together with it, where a Trainer writes a checkpoint.

    Args:
        model: the PEFT model, or a module around it.
        completing: given a checkpoint's folder; entered before the adapter is written there.  None:
            no more.
    """
    warn_when_saved_alone(model)
    wrapped = peft_model(model)
    if wrapped is not None:
        wrapped.save_pretrained.completing = completing


def _is_rebased(pair: LoRAPair) -> bool:
    return pair.was_rebased or (pair.carry is not None and pair.carry.columns > 0)


class _SavePretrained:
    """``PeftModel.save_pretrained`` with a warning, or where checkpoints are completed without one.

    An object, not a bound method: pickle would restore that as the method of the class.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.completing: Callable[[Path], AbstractContextManager[None]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What completes the checkpoints of a model completes none of its copy's.
        return {"model": self.model, "completing": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        folder = Path(str(args[0] if args else kwargs.get("save_directory", "")))
        completed: AbstractContextManager[None] = nullcontext()
        if self.completing is not None and re.fullmatch(r"checkpoint-\d+", folder.name):
            if kwargs.get("is_main_process", True):
                completed = self.completing(folder)
        elif any(map(_is_rebased, all_lora_pairs(self.model))):
            # With the folder, or Python would show it once for all that a Trainer saves.
            warnings.warn(
                f"save_pretrained writes the adapter alone to {str(folder)!r}, but ScaLoRA has put "
                "part of what was learned into the base weights, or into a carry beside them: "
                "loaded on the original base, this adapter is not your model. Call "
                "scalora.save_merged(model, path) or scalora.save_adapter(model, path, base=...) "
                "instead.",
                UserWarning,
                stacklevel=level_of_caller(),
            )
        with completed:
            return type(self.model).save_pretrained(self.model, *args, **kwargs)


class _LoadAdapter:
    """``PeftModel.load_adapter`` with a warning where increments belong to what it replaces."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        pairs = all_lora_pairs(self.model)
        replaced = any(pair.adapter == adapter_name and _is_rebased(pair) for pair in pairs)
        # A callback that completes checkpoints brings back what belongs to the one it loads; that
        # of a run that is resumed comes later.
        completing = getattr(self.model.save_pretrained, "completing", None)
        resumed = kwargs.get("is_trainable", False) and any(Path(model_id).glob("scalora*"))
        if replaced and completing is None and not resumed:
            warnings.warn(
                f"load_adapter replaces the adapter {adapter_name!r} alone: what ScaLoRA has put "
                "into the base weights, or into a carry beside them, belongs to the one that was "
                f"there, and this is neither model. Call scalora.load_training_state(optimizer, "
                f"{str(model_id)!r}) after it; in a Trainer (load_best_model_at_end) pass a "
                "scalora.ScaLoRACallback, which does that.",
                UserWarning,
                stacklevel=level_of_caller(),
            )
        return type(self.model).load_adapter(self.model, model_id, adapter_name, *args, **kwargs)
