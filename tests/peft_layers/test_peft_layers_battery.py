"""Patterns of PEFT's own tests, over its kinds of layers, with ScaLoRA in their optimizer's place.

Each kind is trained once, dense and with a carry, and beside another adapter.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from layer_cases import CASES, Case
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from training import optimizer_of

import scalora

STEPS = 5


def quantized(bits: int) -> nn.Module:
    """Two linear layers of bitsandbytes'."""
    from bitsandbytes import nn as layers

    torch.manual_seed(0)
    base: Any = models.Perceptron(64, 64, 32)
    for name in ("first", "second"):
        plain = base.get_submodule(name)
        shape = plain.in_features, plain.out_features
        layer = (
            layers.Linear4bit(*shape, quant_type="nf4")
            if bits == 4
            else layers.Linear8bitLt(*shape, has_fp16_weights=False)
        )
        layer.load_state_dict(plain.state_dict())
        setattr(base, name, layer.to("cpu"))  # which quantizes
    setattr(base, f"is_loaded_in_{bits}bit", True)  # PEFT looks for it
    return base


def _inputs() -> Tensor:
    return models.vectors(16, 64)


QUANTIZED = {
    "4 bits": Case(lambda: quantized(4), _inputs, ("first", "second")),
    "8 bits": Case(lambda: quantized(8), _inputs, ("first", "second")),
}
if importlib.util.find_spec("bitsandbytes") is None:
    QUANTIZED = {}
KINDS = CASES | QUANTIZED
# What PEFT itself does not do with several adapters of these.
WITHOUT_ROWS = {*(name for name in KINDS if "DoRA" in name), "modules_to_save"}
BASE_MOVED = {"PiSSA, which moves the base itself"}
# And it scales a sum of rsLoRA by the root of its rank.
WITHOUT_SUM = {*WITHOUT_ROWS, *BASE_MOVED, "lora_bias", "rsLoRA"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:.*LoRA layers stay plain LoRA"),  # DoRA with a carry
]


@dataclass
class Tuned:
    """A trained model with another adapter beside it, and what it was before."""

    model: Any
    optimizer: scalora.ScaLoRA
    inputs: Tensor
    pretrained: nn.Module
    atol: float

    def copy(self) -> Any:
        """The model, for a test that does something to it."""
        return copy.deepcopy(self.model)

    def answers(self, model: Any) -> Tensor:
        return models.answers(model, self.inputs)

    def assert_close(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=self.atol)


@functools.cache
def tuned(name: str, accumulator: Any) -> Tuned:
    case = KINDS[name]
    dtype = torch.float32 if name in QUANTIZED else torch.float64
    torch.manual_seed(0)
    model = case.model() if name in QUANTIZED else case.model(dtype)
    pretrained = copy.deepcopy(model).unload()
    other = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=list(case.layers),
        init_lora_weights=False,
        fan_in_fan_out=case.config.get("fan_in_fan_out", False),
    )
    model.add_adapter("other", other)
    model.set_adapter("default")
    optimizer = optimizer_of(model, accumulator=accumulator)
    inputs = case.batch(dtype)
    losses = models.train(model, optimizer, inputs, STEPS)
    assert losses[-1] < losses[0]
    moved = {row.layer for row in optimizer.report() if row.accumulator == accumulator}
    assert moved == {pair.name for pair in optimizer.rebased_pairs}
    atol = 1e-5 if name in QUANTIZED else 1e-10
    return Tuned(model.eval(), optimizer, inputs, pretrained.eval(), atol)


def every_kind(*, dense: bool = True, without: Iterable[str] = ()) -> Any:
    """Every kind of layer with every place for its increments; a quantized one with a carry."""
    both = [
        (name, accumulator)
        for name in KINDS
        for accumulator in ("dense", "carry")
        if name not in without and (accumulator == "carry" or (dense and name not in QUANTIZED))
    ]
    return pytest.mark.parametrize(("name", "accumulator"), both)


@every_kind(without=QUANTIZED)
def test_trained_layers_merge_unmerge_and_merge_for_good(name: str, accumulator: str) -> None:
    run = tuned(name, accumulator)
    expected, model = run.answers(run.model), run.copy()
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        run.assert_close(run.answers(model), expected)
        model.unmerge_adapter()
        run.assert_close(run.answers(model), expected)
    merged = model.merge_and_unload()
    assert not any("lora" in n for n, _ in merged.named_modules())
    run.assert_close(run.answers(merged), expected)


@every_kind()
def test_disabled_adapter_is_off_and_comes_back(name: str, accumulator: str) -> None:
    run = tuned(name, accumulator)
    expected, model = run.answers(run.model), run.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if accumulator == "dense" else "error")
        with model.disable_adapter():
            without = run.answers(model)
        assert (without - expected).abs().max() > 1e-4
        assert torch.equal(run.answers(model), expected)
    if accumulator == "carry" and name != "modules_to_save":
        run.assert_close(without, run.answers(run.pretrained))


@every_kind(dense=False, without=BASE_MOVED)
def test_other_adapter_computes_on_the_pretrained_model(name: str, accumulator: str) -> None:
    run = tuned(name, accumulator)
    model = run.copy()
    factors = {n: p for n, p in model.named_parameters() if ".other" in n}
    fresh = copy.deepcopy(run.pretrained)
    alone = PeftModel(fresh, model.peft_config["other"], adapter_name="other")
    alone.load_state_dict(factors, strict=False)
    alone.to(next(iter(factors.values())).dtype)
    model.set_adapter("other")
    run.assert_close(run.answers(model), run.answers(alone))
    model.delete_adapter("default")
    run.assert_close(run.answers(model), run.answers(alone))


@every_kind(without=WITHOUT_ROWS)
def test_rows_of_a_batch_have_adapters_of_their_own(name: str, accumulator: str) -> None:
    run = tuned(name, accumulator)
    model = run.copy()
    expected = {"default": run.answers(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_adapter("other")
        expected["other"] = run.answers(model)
        with model.disable_adapter():
            expected["__base__"] = run.answers(model)
    names = [["default", "other", "__base__"][i % 3] for i in range(len(run.inputs))]
    with torch.no_grad():
        mixed = model(run.inputs, adapter_names=names)
    mixed = mixed if isinstance(mixed, Tensor) else mixed.logits
    for row, adapter in enumerate(names):
        run.assert_close(mixed[row], expected[adapter][row])


def pretrained(run: Tuned, name: str) -> nn.Module:
    """Anew, as a script would load it."""
    if name not in BASE_MOVED:
        return copy.deepcopy(run.pretrained)
    torch.manual_seed(0)
    return KINDS[name].base().double()


def loaded(run: Tuned, name: str, folder: Path) -> Any:
    model = PeftModel.from_pretrained(pretrained(run, name), folder)
    return model if name in QUANTIZED else model.double()


@every_kind()
def test_saved_adapter_answers_on_the_pretrained_model(
    name: str, accumulator: str, tmp_path: Path
) -> None:
    run = tuned(name, accumulator)
    base = None if name in QUANTIZED else pretrained(run, name)
    errors = scalora.save_adapter(run.copy(), tmp_path, base=base)
    assert max(errors.values()) <= 1e-4
    found = run.answers(loaded(run, name, tmp_path))
    torch.testing.assert_close(found, run.answers(run.model), rtol=0, atol=1e-3)


@every_kind(without=BASE_MOVED)
def test_checkpoint_of_training_answers_without_an_optimizer(
    name: str, accumulator: str, tmp_path: Path
) -> None:
    run = tuned(name, accumulator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="save_pretrained writes the adapter alone")
        run.model.save_pretrained(tmp_path, selected_adapters=["default"])
    scalora.save_training_state(run.optimizer, tmp_path)
    model = loaded(run, name, tmp_path)
    scalora.load_rebased_weights(model, tmp_path)
    run.assert_close(run.answers(model), run.answers(run.model))


@every_kind()
def test_run_resumes_to_the_same_bits(name: str, accumulator: Any) -> None:
    run = tuned(name, accumulator)
    model, optimizer = copy.deepcopy((run.model.train(), run.optimizer))
    other = run.copy()
    for one in (model, other):
        # bitsandbytes packs 4 bits to evaluate on a CPU, and takes it back where they are saved.
        one.state_dict()
    resumed = training.optimizer_of(other, accumulator=accumulator)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = models.train(model, optimizer, run.inputs, 3)
    assert models.train(other, resumed, run.inputs, 3) == expected
    models.assert_same_bits(other, models.bits(model))


@every_kind(without=WITHOUT_SUM)
def test_sum_of_adapters_is_both_of_them(name: str, accumulator: str) -> None:
    run = tuned(name, accumulator)
    model = run.copy()
    with warnings.catch_warnings():
        # Over a base that one was folded into it says so, and with both weights 1 is right.
        warnings.simplefilter("ignore" if accumulator == "dense" else "error")
        model.base_model.set_adapter(["default", "other"])
        expected = run.answers(model)
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "cat")
        model.set_adapter("both")
        run.assert_close(run.answers(model), expected)
        model.set_adapter("default")
        model.delete_adapter("both")
        model.base_model.set_adapter(["default", "other"])
        assert torch.equal(run.answers(model), expected)
