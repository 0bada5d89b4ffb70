"""PEFT's ``add_weighted_adapter`` over adapters that were re-based: right, or refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from training import rebase

import scalora
from scalora.peft_layers import lora_pairs

INPUTS = models.vectors(16, 12).double()
LAYERS = ["first", "second"]


def pretrained() -> nn.Module:
    torch.manual_seed(0)
    return models.Perceptron().double()


def rebased(accumulator: Any = "carry", **options: Any) -> Any:
    """``default`` was trained; ``other`` is random, of another rank."""
    config = dict(r=3, lora_alpha=6, target_modules=LAYERS)
    model = models.with_lora(pretrained(), **config)
    model.add_adapter("other", LoraConfig(**{**config, "r": 2}, init_lora_weights=False))
    model.set_adapter("default")
    model.double()
    rebase(model, INPUTS, 5, accumulator=accumulator, **options)
    return model


def changes(model: Any, adapter: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight, its carry with it."""
    return {pair.name: pair.learned_change() for pair in lora_pairs(model, adapter)}


def assert_sum(model: Any, made: str, **weights: float) -> None:
    expected = {name: changes(model, name) for name in weights}
    for layer, change in changes(model, made).items():
        total = sum(weight * expected[name][layer] for name, weight in weights.items())
        torch.testing.assert_close(change, total, rtol=0, atol=1e-12)
        found = models.layer(model, layer).get_delta_weight(made)  # what PEFT merges
        torch.testing.assert_close(found.detach(), total, rtol=0, atol=1e-12)


@pytest.fixture
def silent() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    "clone", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_concatenation_is_the_weighted_sum_carries_and_all(
    silent: None, clone: Callable[[Any], Any]
) -> None:
    model = clone(rebased())
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", "cat")
    assert_sum(model, "sum", default=0.5, other=-2.0)
    before = changes(model, "default")
    model.add_weighted_adapter(
        adapters=["sum", "default"], weights=[1.0, 1.0], adapter_name="more", combination_type="cat"
    )
    assert_sum(model, "more", default=1.5, other=-2.0)
    for layer, change in changes(model, "default").items():
        assert torch.equal(change, before[layer])


def test_concatenation_is_a_whole_adapter_of_its_own(silent: None, tmp_path: Path) -> None:
    model = rebased()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")
    model.set_adapter("sum")
    model.delete_adapter("default")
    expected = models.answers(model, INPUTS)
    scalora.save_adapter(model, tmp_path)
    again = PeftModel.from_pretrained(pretrained(), tmp_path).double()
    torch.testing.assert_close(models.answers(again, INPUTS), expected, rtol=0, atol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(models.answers(merged, INPUTS), expected, rtol=0, atol=1e-12)
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="writes the adapter alone"):
        model.save_pretrained(tmp_path / "alone")


def test_one_adapter_alone_is_scaled_with_its_carry(silent: None) -> None:
    for kind in ("linear", "svd", "ties"):  # all of them the same, to PEFT
        model = rebased()
        model.add_weighted_adapter(["default"], [0.5], "halved", kind)
        assert_sum(model, "halved", default=0.5)


def test_adapter_without_a_carry_is_combined_as_ever(silent: None) -> None:
    model = rebased()
    model.add_adapter("third", LoraConfig(r=2, lora_alpha=6, target_modules=LAYERS))
    model.add_weighted_adapter(["other", "third"], [0.5, 1.0], "mixed", "cat")
    assert_sum(model, "mixed", other=0.5)
    model.add_weighted_adapter(["other", "third"], [0.5, 1.0], "linear", "linear")
    assert all(pair.carry is None for pair in lora_pairs(model, "mixed"))


def test_singular_values_of_everything_are_kept_with_the_rank_that_is_named(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = rebased()
    with pytest.warns(
        UserWarning, match=r"cut to the adapters' own rank.*up to 12 ranks.*'cat'"
    ) as caught:
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "cut")
    [warning] = [w for w in caught if "ScaLoRA" in str(w.message)]
    assert warning.filename == __file__
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "whole", "svd", svd_rank=8)
    assert (model.peft_config["default"].r, *models.layer(model, "second").weight.shape) == (
        3,
        8,
        20,
    )
    total = 0.5 * changes(model, "default")["second"] - 2.0 * changes(model, "other")["second"]
    torch.testing.assert_close(changes(model, "whole")["second"], total, rtol=0, atol=1e-12)
    assert not [w for w in recwarn if "ScaLoRA" in str(w.message)]


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_mixture_of_factors_is_refused_and_nothing_is_changed(kind: str) -> None:
    model = rebased()
    before, adapters = models.bits(model), set(model.peft_config)
    with pytest.raises(ValueError, match=rf"combination_type='{kind}'.*'default'.*'cat'"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mixed", kind, density=0.5)
    models.assert_same_bits(model, before)
    assert set(model.peft_config) == adapters


def test_name_that_is_taken_is_left_to_peft(silent: None) -> None:
    model = rebased()
    before = models.bits(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "other", "cat")
    models.assert_same_bits(model, before)
    assert all(pair.carry is None for pair in lora_pairs(model, "other"))


@pytest.mark.parametrize("options", [{"rule": "exact"}, {"rule": "auto", "memory": 2}], ids=str)
def test_combination_over_a_base_that_was_folded_into_warns(options: dict[str, Any]) -> None:
    model = rebased("dense", **options)
    with pytest.warns(
        UserWarning, match=r"'default' learned.*with the weight 1.*'carry'"
    ) as caught:
        model.add_weighted_adapter(["default", "other"], [0.5, 1.0], "sum", "cat")
    [warning] = [w for w in caught if "weight 1" in str(w.message)]
    assert warning.filename == __file__


def test_carry_that_the_checkpoint_of_training_holds_is_combined_too(tmp_path: Path) -> None:
    model = models.with_lora(pretrained(), r=3, target_modules=LAYERS).double()
    optimizer = rebase(model, INPUTS, 5, accumulator="carry")
    with pytest.warns(UserWarning, match="writes the adapter alone"):
        model.save_pretrained(tmp_path)
    scalora.save_training_state(optimizer, tmp_path)
    again = PeftModel.from_pretrained(pretrained(), tmp_path).double()
    scalora.load_rebased_weights(again, tmp_path)
    again.add_weighted_adapter(["default"], [2.0], "twice", "linear")
    assert_sum(again, "twice", default=2.0)
