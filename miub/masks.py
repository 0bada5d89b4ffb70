"""The mask that tells tokens from padding at a layer's positions: the encoder's or decoder's.

Held by tests/miub/test_encoder_decoder_masks.py and test_token_sample.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from miub.token_sample import mask_of
from scalora.peft_layers import base_model, peft_model, storage_address
from scalora.transformers_models import padding_of

_IGNORED = -100  # the label that transformers' losses leave out


class Masks:
    """The masks of one forward pass.

    The model's ``attention_mask`` holds for a layer that runs before the decoder.  From the decoder
    on, the decoder's mask holds, except for layers whose input is the encoder's states (the keys
    and values of cross attention).

    Args:
        model: the model that is called; a wrapper, or one with a decoder alone, where only its
            ``attention_mask`` matters.
        args, kwargs: its arguments.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _arguments(model, args, kwargs)
        self._encoder = _matrix(call.get("attention_mask"))
        self._given = _matrix(call.get("decoder_attention_mask"))
        self._labels = _matrix(call.get("labels"))
        self._cached = call.get("past_key_values") is not None
        self._padding = padding_of(model)
        self._in_decoder = False
        self._decoder: Tensor | None = None
        self._positions: torch.Size | None = None
        self._states: Tensor | None = None

    def decoder_begins(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note the decoder's arguments; a forward pre-hook."""
        call = _arguments(decoder, args, kwargs)
        ids, embedded = call.get("input_ids"), call.get("inputs_embeds")
        self._in_decoder = True
        self._states = call.get("encoder_hidden_states")
        given = _matrix(call.get("encoder_attention_mask"))
        self._encoder = self._encoder if given is None else given
        self._cached = call.get("past_key_values") is not None
        if isinstance(ids, Tensor):
            self._positions = ids.shape
        elif isinstance(embedded, Tensor):
            self._positions = embedded.shape[:2]
        self._decoder = self._decoder_mask(_matrix(call.get("attention_mask")), _matrix(ids))

    def of(self, inputs: Tensor, leading: torch.Size) -> tuple[str, Tensor | None]:
        """Return the name of a layer's mask, and the mask (positions,), None where none is known.

        Args:
            inputs: of the layer.
            leading: shape of its outputs without the last axis; see `token_sample.mask_of`.
        """
        if not self._in_decoder or self._reads_encoder(inputs, leading):
            # Of the two only a decoder caches: its mask may be longer than its inputs.
            cached = self._cached and not self._in_decoder
            return "encoder", mask_of(self._encoder, leading, cached=cached)
        return "decoder", mask_of(self._decoder, leading, cached=self._cached)

    def _reads_encoder(self, inputs: Tensor, leading: torch.Size) -> bool:
        states = self._states
        if isinstance(states, Tensor) and _same(inputs, states):
            return True
        # The decoder may have worked on the states; then their number tells, where it differs.
        mask = self._encoder
        return mask is not None and leading == mask.shape and leading != self._positions

    def _decoder_mask(self, made: Tensor | None, ids: Tensor | None) -> Tensor | None:
        """Return the mask that was given, or that of the labels, or that of the inputs' padding.

        Args:
            made: the mask that the model itself has made of its inputs.
            ids: the decoder's inputs.
        """
        if self._given is not None:
            return self._given
        labels = self._labels
        if labels is not None and labels.shape == self._positions:
            is_token = labels != _IGNORED
            return is_token if self._padding is None else is_token & (labels != self._padding)
        if made is not None or ids is None:
            return made
        if self._padding is None or self._cached:
            return None
        is_token = ids != self._padding
        # Many decoders are started with the token of padding.
        return is_token | (torch.arange(ids.shape[1], device=ids.device) == 0)


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether they are one tensor, perhaps as two objects: a checkpoint makes new ones."""
    if one is other:
        return True
    return one.shape == other.shape and storage_address(one) == storage_address(other)


def _matrix(value: Any) -> Tensor | None:
    """Return a (batch, sequence) tensor; None for anything else."""
    return value if isinstance(value, Tensor) and value.ndim == 2 else None


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a model's arguments by name, however they were passed; None is left out."""
    found: dict[str, Any] = {}
    by_position = dict(zip(_positional_names(model), args, strict=False))
    batches = [argument for argument in args if isinstance(argument, Mapping)]
    for source in (kwargs, by_position, *batches):
        for name, value in source.items():
            if value is not None:
                found.setdefault(name, value)
    return found


def _positional_names(model: nn.Module) -> list[str]:
    """Return the names of the outermost forward that has them; a wrapper's are ``*args``."""
    for module in (model, peft_model(model), base_model(model)):
        if module is None:
            continue
        parameters = inspect.signature(module.forward).parameters.values()
        if all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters):
            return [parameter.name for parameter in parameters]
    return []
