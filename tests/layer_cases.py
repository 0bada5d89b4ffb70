"""Every kind of PEFT layer that can be re-based, in a model with inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import models
import torch
from torch import Tensor, nn

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Case:
    base: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    layers: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False

    def model(self, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        options = {"target_modules": list(self.layers), **self.config, **config}
        model = models.with_lora(self.base(), **options).to(dtype)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def batch(self, dtype: torch.dtype = torch.float32) -> Tensor:
        inputs = self.inputs()
        return inputs.to(dtype) if inputs.is_floating_point() else inputs


def _perceptron(**config: Any) -> Case:
    return Case(
        models.Perceptron, lambda: models.vectors(64, 12), ("first", "second"), dict(config)
    )


def _embedder(**config: Any) -> Case:
    return Case(models.Embedder, lambda: models.token_ids(16, 7), ("tokens", "head"), dict(config))


def _image_case(convolution: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(
        lambda: models.Convolutions(convolution()),
        lambda: models.vectors(12, 3, 9, 8),
        ("convolution", "head"),
        **options,
    )


def _signal_case(convolution: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(
        lambda: models.Convolutions(convolution()),
        lambda: models.vectors(24, 3, 17),
        ("convolution", "head"),
        **options,
    )


def gpt2(**config: Any) -> Case:
    return Case(
        models.gpt2,
        lambda: models.token_ids(12, 9),
        GPT2_LAYERS,
        {"fan_in_fan_out": True, **config},
    )


GPT2_LAYERS = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj")
BERT_LAYERS = ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense")
DORA: dict[str, Any] = {"use_dora": True}

CASES = {
    "linear": _perceptron(),
    "linear in BERT": Case(models.bert, lambda: models.token_ids(16, 9), BERT_LAYERS),
    "Conv1D in GPT-2": gpt2(),
    "embedding": _embedder(),
    "conv2d 3x3": _image_case(lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1)),
    "conv2d 1x1": _image_case(lambda: nn.Conv2d(3, 6, 1)),
    "conv2d 3x1, padding same": _image_case(lambda: nn.Conv2d(3, 6, (3, 1), padding="same")),
    "conv2d channels_last": _image_case(
        lambda: nn.Conv2d(3, 6, 3, stride=(1, 2), padding=(0, 1)), channels_last=True
    ),
    "conv1d": _signal_case(lambda: nn.Conv1d(3, 6, 4, stride=2, padding=1)),
    "conv3d": Case(
        lambda: models.Convolutions(nn.Conv3d(2, 5, 2)),
        lambda: models.vectors(12, 2, 4, 5, 4),
        ("convolution", "head"),
    ),
    "rsLoRA": _perceptron(use_rslora=True, r=4),
    "lora_bias": _perceptron(lora_bias=True),
    "ranks and alphas by pattern": _perceptron(
        rank_pattern={"first": 5}, alpha_pattern={"second": 1}
    ),
    "DoRA linear": _perceptron(**DORA),
    "DoRA Conv1D in GPT-2": gpt2(**DORA),
    "DoRA embedding": _embedder(**DORA),
    "DoRA conv2d 3x3": _image_case(lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), config=DORA),
    "DoRA conv1d": _signal_case(lambda: nn.Conv1d(3, 6, 4), config=DORA),
    "modules_to_save": Case(
        models.bert,
        lambda: models.token_ids(16, 9),
        BERT_LAYERS,
        config={"modules_to_save": ["classifier"]},
    ),
    "PiSSA, which moves the base itself": _perceptron(init_lora_weights="pissa"),
}
