"""The transformers model that an adapter goes on: its class, its config and its loading.

Held by tests/cli/test_export.py and test_export_refusals.py.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

if TYPE_CHECKING:
    from peft import PeftConfig

_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_QUANTIZATION = "quantization_config"


def model_class(adapter: PeftConfig, recorded: str | None = None) -> Any:
    """Return the class that loads the model an adapter was put on.

    In this order: the class that was recorded, that of the adapter's task type, the one that PEFT
    noted in the adapter's config, and a model without a head.

    Args:
        adapter: the adapter's config.
        recorded: the class's name, if known better than from the config: after ``add_adapter`` a
            task type says nothing of the model.
    """
    task = getattr(adapter, "task_type", None)
    by_task = _BY_TASK.get(str(getattr(task, "value", task)))
    noted = getattr(adapter, "auto_mapping", None) or {}
    named = recorded or (None if by_task else noted.get("base_model_class"))
    found = getattr(transformers, str(named), None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    return getattr(transformers, by_task or "AutoModel")


def recorded_config(model: nn.Module) -> dict[str, Any] | None:
    """Return the model's config as JSON values; None without a config that JSON can express."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    try:
        return dict(json.loads(json.dumps(config.to_diff_dict())))
    except TypeError:
        return None


def has_other_vocabulary(model: nn.Module, source: str) -> bool:
    """Return whether a model's vocabulary has another size than that of ``source``.

    Return False where that cannot be told: the model has no vocabulary, or no config is found.

    Args:
        model: a transformers model.
        source: a folder or a hub id.
    """
    config: Any = getattr(model, "config", None)
    size = _vocabulary_size(config)
    if size is None:
        return False
    try:
        stored = _vocabulary_size(type(config).from_pretrained(source))
    except (OSError, ValueError):
        return False
    return stored is not None and stored != size


def _vocabulary_size(config: Any) -> int | None:
    """Return a text model's vocabulary size, or that of a multimodal model's text; None without."""
    if not isinstance(config, PretrainedConfig):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def config_from(recorded: dict[str, Any]) -> PretrainedConfig:
    """Return what `recorded_config` gave as the config of a model that is not quantized.

    Raises:
        ValueError: transformers does not know this type of model.
    """
    values = {key: value for key, value in recorded.items() if key != _QUANTIZATION}
    return type(AutoConfig.for_model(str(values.get("model_type")))).from_dict(values)


def model_without_weights(
    kind: Any, source: str, recorded: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Return a model of zeros that take no memory, for its names and shapes.

    It is not on the meta device, where PEFT would also put the adapter that is loaded into it.

    Args:
        kind: the model's class, of `model_class`.
        source: a folder or a hub id that has the config.
        recorded: the config; ``source`` is not read then.

    Raises:
        ValueError, OSError: there is no config, or transformers does not know its type of model.
    """
    config = AutoConfig.from_pretrained(source) if recorded is None else config_from(recorded)
    with torch.device("meta"):
        model = getattr(kind, "from_config", kind)(config)
    zeros: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                zero = torch.zeros((), dtype=torch.float32).expand(weight.shape)
                made = zeros.setdefault(weight, nn.Parameter(zero, requires_grad=False))
                module._parameters[name] = made
    return model


def is_stand_in(weight: Tensor) -> bool:
    """Return whether a weight is one of the zeros of `model_without_weights`."""
    return weight.numel() > 1 and not any(weight.stride())


def pretrained_model(
    kind: Any,
    source: str,
    recorded: dict[str, Any] | None = None,
    *,
    quantized: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """Return a pretrained model, and the names of weights that ``source`` lacks or has otherwise.

    Args:
        kind: the model's class, of `model_class`.
        source: a folder or a hub id.
        recorded: the config to give it; None for its own.
        quantized: whether to quantize it as ``recorded`` says.  Weights that are stored quantized
            stay so in any case.
        dtype: dtype of the weights; None for the recorded one, or else that of the files.

    Raises:
        ValueError, OSError, ImportError, RuntimeError: it cannot be loaded, or does not fit the
            recorded config.
    """
    config = AutoConfig.from_pretrained(source)
    # Heads are often replaced by ones of another size; the caller decides what may be missing.
    options: dict[str, Any] = {"dtype": dtype or "auto", "ignore_mismatched_sizes": True}
    if recorded is not None:
        stored, config = getattr(config, _QUANTIZATION, None), config_from(recorded)
        if stored is not None:
            config.quantization_config = stored
        elif quantized and recorded.get(_QUANTIZATION):
            values = dict(recorded[_QUANTIZATION])
            options[_QUANTIZATION] = AutoQuantizationConfig.from_dict(values)
    model, loading = kind.from_pretrained(
        source, config=config, output_loading_info=True, **options
    )
    mismatched = {name for name, *_ in loading["mismatched_keys"]}
    return model, set(loading["missing_keys"]) | mismatched
