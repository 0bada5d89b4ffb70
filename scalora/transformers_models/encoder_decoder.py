"""The decoder of an encoder-decoder model, and what pads its input.

Held by tests/miub/test_encoder_decoder_masks.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: nn.Module) -> nn.Module | None:
    """Return the decoder of the encoder-decoder model in ``model``; None if there is none."""
    whole = _encoder_decoder(model)
    if whole is None:
        return None
    decoder: Any = whole.get_decoder()
    # A model of several kinds of input gives its language model, which may have both again.
    while (inner := _encoder_decoder(decoder)) is decoder and inner.get_decoder() is not inner:
        decoder = inner.get_decoder()
    return None if decoder is whole else decoder


def padding_of(model: nn.Module) -> int | None:
    """Return the token that pads a decoder's input; None without one, or if it also ends texts."""
    config: Any = getattr(_encoder_decoder(model), "config", None)
    padding = getattr(config, "pad_token_id", None)
    end = getattr(config, "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    return None if padding in ends else padding


def _encoder_decoder(model: nn.Module) -> Any:
    """Return the outermost encoder-decoder model of transformers in ``model``, or None."""
    return next(
        (
            module
            for module in model.modules()
            if isinstance(module, PreTrainedModel) and module.config.is_encoder_decoder
        ),
        None,
    )
