"""The one place that knows which transformers model an adapter goes on, and how to load it."""

from __future__ import annotations

import json
from typing import Any

import torch
import transformers
from peft import PeftConfig
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_QUANTIZATION = "quantization_config"


def model_class(adapter: PeftConfig, recorded: str | None = None) -> Any:
    """The class that loads the model an adapter was put on: by its task type.

    Where it has none, PEFT has noted the class itself; failing that, a model without a head.

    Args:
        adapter: its config.
        recorded: the class's name, where there is a better note than PEFT's: a task type says
            nothing of the model that ``add_adapter`` was called on.
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
    """The model's config as JSON has it; None where it has none that JSON can express."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    try:
        return dict(json.loads(json.dumps(config.to_diff_dict())))
    except TypeError:
        return None


def has_other_vocabulary(model: nn.Module, source: str) -> bool:
    """Whether a model's vocabulary has another size than at ``source``, a folder or a hub id.

    False where that cannot be told: the model has no vocabulary, or no config is found there.
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
    """Of a model of text, or of the text in one of several kinds of input."""
    if not isinstance(config, PretrainedConfig):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def config_from(recorded: dict[str, Any]) -> PretrainedConfig:
    """What `recorded_config` gave, as the config of a model that is not quantized.

    Raises:
        ValueError: it is of a kind that transformers does not know.
    """
    values = {key: value for key, value in recorded.items() if key != _QUANTIZATION}
    return type(AutoConfig.for_model(str(values.get("model_type")))).from_dict(values)


def model_without_weights(
    kind: Any, source: str, recorded: dict[str, Any] | None = None
) -> PreTrainedModel:
    """A model of zeros that take no memory: names and shapes are all that is in it.

    Not on the meta device: PEFT would take an adapter that is loaded there along.

    Args:
        kind: its class, of `model_class`.
        source: a folder or a hub id that has its config.
        recorded: the config; ``source`` is not looked at then.

    Raises:
        ValueError, OSError: there is no config, or it is of a kind that transformers does not know.
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
    """Whether it is one of the zeros of `model_without_weights`."""
    return weight.numel() > 1 and not any(weight.stride())


def pretrained_model(
    kind: Any,
    source: str,
    recorded: dict[str, Any] | None = None,
    *,
    quantized: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """A pretrained model, and the names of the weights that ``source`` lacks or has otherwise.

    Args:
        kind: its class, of `model_class`.
        source: a folder or a hub id.
        recorded: the config that it is to have; None for its own.
        quantized: whether to quantize it as was recorded.  Weights that are stored quantized stay
            that in any case.
        dtype: of the weights; None for the recorded one, and failing that for that of the files.

    Raises:
        ValueError, OSError, ImportError, RuntimeError: it cannot be loaded, or does not fit the
            recorded config.
    """
    config = AutoConfig.from_pretrained(source)
    # A head of another size is often replaced before training; the caller decides what may lack.
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


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of the encoder-decoder model in ``model``; None where there is no such model."""
    whole = _encoder_decoder(model)
    if whole is None:
        return None
    decoder: Any = whole.get_decoder()
    # A model of several kinds of input gives its language model, which may have both again.
    while (inner := _encoder_decoder(decoder)) is decoder and inner.get_decoder() is not inner:
        decoder = inner.get_decoder()
    return None if decoder is whole else decoder


def padding_of(model: nn.Module) -> int | None:
    """The token that pads what a decoder reads, and nothing else; None where there is none."""
    config: Any = getattr(_encoder_decoder(model), "config", None)
    padding = getattr(config, "pad_token_id", None)
    end = getattr(config, "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    return None if padding in ends else padding


def _encoder_decoder(model: nn.Module) -> Any:
    """The outermost model of transformers in ``model`` that says that it is both."""
    return next(
        (
            module
            for module in model.modules()
            if isinstance(module, PreTrainedModel) and module.config.is_encoder_decoder
        ),
        None,
    )
