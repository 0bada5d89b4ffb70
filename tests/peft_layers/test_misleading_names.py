"""PEFT's own methods on a re-based model: the right result, or one warning that says what to do."""

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
import training
from peft import PeftModel
from safetensors.torch import load_file, save_file
from training import rebase

import scalora

INPUTS = models.vectors(16, 12)


def rebased(accumulator: str, rule: str = "exact") -> tuple[Any, scalora.ScaLoRA]:
    """Two adapters, of which the first was trained."""
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(), target_modules=["first", "second"])
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    options: Any = {"rule": rule, "accumulator": accumulator, "interval": 3}
    return model, rebase(model, INPUTS, 6, **options)


def pretrained() -> torch.Tensor:
    """Its answers."""
    torch.manual_seed(0)
    return models.answers(models.Perceptron(), INPUTS)


def disable(model: Any) -> torch.Tensor:
    with model.disable_adapter():
        return models.answers(model, INPUTS)


def disable_layers(model: Any) -> torch.Tensor:
    model.disable_adapter_layers()
    found = models.answers(model, INPUTS)
    model.enable_adapter_layers()
    return found


def switch(model: Any) -> torch.Tensor:
    model.set_adapter("other")  # untrained, it adds nothing
    found = models.answers(model, INPUTS)
    model.set_adapter("default")
    return found


def unload(model: Any) -> torch.Tensor:
    return models.answers(copy.deepcopy(model).unload(), INPUTS)


def delete(model: Any) -> torch.Tensor:
    model = copy.deepcopy(model)
    model.delete_adapter("default")
    return models.answers(model, INPUTS)


SHOWS_THE_BASE: dict[str, tuple[Callable[[Any], torch.Tensor], str]] = {
    "disable_adapter": (disable, "with the adapter disabled this is not the pretrained model"),
    "disable_adapter_layers": (disable_layers, "this is not the pretrained model"),
    "set_adapter": (switch, "another adapter does not compute on the pretrained model"),
    "unload": (unload, r"Call model.merge_and_unload\(\)"),
    "delete_adapter": (delete, "deleting the adapter does not take that out"),
}
base_shown = pytest.mark.parametrize(
    ("show", "message"), SHOWS_THE_BASE.values(), ids=SHOWS_THE_BASE.keys()
)


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "ScaLoRA" in str(w.message)]


@base_shown
@pytest.mark.parametrize("rule", ["leak", "exact"])
def test_method_that_shows_a_folded_base_warns_and_names_the_carry(
    show: Callable[[Any], torch.Tensor], message: str, rule: str
) -> None:
    model, _ = rebased("dense", rule)
    with pytest.warns(UserWarning, match=message) as caught:
        found = show(model)
    assert (found - pretrained()).abs().max() > 1e-3  # what the warning says is so
    [warning] = [w for w in caught if "ScaLoRA" in str(w.message)]
    assert "'default'" in str(warning.message)
    assert "accumulator='carry'" in str(warning.message)
    assert warning.filename == __file__


@base_shown
def test_method_that_shows_the_base_beside_a_carry_is_right_and_silent(
    show: Callable[[Any], torch.Tensor], message: str
) -> None:
    model, _ = rebased("carry")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = show(model)
    assert torch.equal(found, pretrained())
    assert messages(caught) == []


@pytest.mark.parametrize(
    "clone", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_warning_is_given_once_a_model_and_survives_its_copies(clone: Callable[..., Any]) -> None:
    model = clone(rebased("dense")[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            disable(model)
    assert len(messages(caught)) == 1


@pytest.mark.parametrize("rule", ["leak", "exact"])
def test_model_that_took_up_a_checkpoint_warns_as_the_one_in_training(
    rule: str, tmp_path: Path
) -> None:
    model, optimizer = rebased("dense", rule)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    scalora.save_training_state(optimizer, tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(models.Perceptron(), tmp_path)
    scalora.load_rebased_weights(loaded, tmp_path)
    with pytest.warns(UserWarning, match="writes the adapter alone"):
        loaded.save_pretrained(tmp_path / "alone", safe_serialization=False)
    with pytest.warns(UserWarning, match="this is not the pretrained model"):
        disable(loaded)


def test_model_that_was_not_re_based_yet_says_nothing() -> None:
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(), target_modules=["first", "second"])
    optimizer = scalora.create_scalora_optimizer(model, torch.optim.AdamW, lr=1e-2)
    models.train(model, optimizer, INPUTS, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(disable(model), pretrained())


def test_activating_the_adapter_that_was_re_based_says_nothing() -> None:
    model, _ = rebased("dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_adapter("default")
        model.base_model.set_adapter(["default", "other"])
        model.add_adapter("third", copy.deepcopy(model.peft_config["other"]))


@pytest.mark.parametrize("rule", ["leak", "exact"])
@pytest.mark.parametrize("accumulator", ["dense", "carry"])
def test_merging_gives_the_model_that_was_trained_and_says_nothing(
    accumulator: str, rule: str
) -> None:
    model, _ = rebased(accumulator, rule)
    before = models.answers(model, INPUTS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = copy.deepcopy(model).merge_and_unload()
    assert messages(caught) == []
    assert isinstance(merged, models.Perceptron)
    torch.testing.assert_close(models.answers(merged, INPUTS), before, rtol=0, atol=1e-5)
    for name in ("first", "second"):
        lora, weight = models.layer(model, name), merged.get_submodule(name).weight
        alone = lora.get_base_layer().weight + lora.scaling["default"] * (
            lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        )
        beside = torch.equal(alone, weight) or (alone - weight).abs().max() < 1e-6
        assert beside == (accumulator == "dense")  # the carry is in it


def refer(model: Any) -> None:
    """As a trainer that compares the model with its own base."""
    with torch.no_grad(), model.disable_adapter():
        model(INPUTS)


def one_step(model: Any, optimizer: scalora.ScaLoRA) -> None:
    models.train(model, optimizer, INPUTS, 1)


def dense(**options: Any) -> tuple[Any, scalora.ScaLoRA]:
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(), target_modules=["first", "second"])
    return model, training.optimizer_of(model, interval=3, **{"rule": "auto", **options})


@pytest.mark.parametrize("clone", [lambda pair: pair, copy.deepcopy], ids=["itself", "a copy"])
def test_base_that_is_referred_to_before_every_step_is_not_folded_into(
    clone: Callable[[Any], Any],
) -> None:
    model, optimizer = clone(dense())
    refer(model)
    one_step(model, optimizer)
    refer(model)
    before = models.bits(model)
    with pytest.raises(ValueError, match=r"(?s)'default'.*accumulator='carry'.*model.eval"):
        one_step(model, optimizer)
    models.assert_same_bits(model, before)
    one_step(model, optimizer)  # it goes on without


def test_adapter_that_is_the_reference_is_seen_as_well() -> None:
    model, optimizer = dense()
    model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
    for refused in (False, True):
        with torch.no_grad():
            model.set_adapter("ref")
            model(INPUTS)
            model.set_adapter("default")
        if refused:
            with pytest.raises(ValueError, match="as for the reference model"):
                one_step(model, optimizer)
        else:
            one_step(model, optimizer)


def look_in_evaluation(model: Any) -> None:
    with model.disable_adapter():
        model.eval()
        model(INPUTS)
        model.train()


def train_another(model: Any) -> None:
    model.set_adapter("other")
    model(INPUTS).sum().backward()
    model.set_adapter("default")


def switch_without_computing(model: Any) -> None:
    with torch.no_grad(), model.disable_adapter():
        pass


@pytest.mark.parametrize("look", [look_in_evaluation, train_another, switch_without_computing])
def test_other_looks_at_the_base_refuse_nothing(look: Callable[[Any], None]) -> None:
    model, optimizer = dense()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    for _ in range(2):
        look(model)
        one_step(model, optimizer)


def test_a_look_at_the_base_now_and_then_refuses_nothing() -> None:
    model, optimizer = dense()
    for step in range(6):
        if step % 2:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                refer(model)
        one_step(model, optimizer)


def test_base_that_is_referred_to_beside_a_carry_stays() -> None:
    model, optimizer = rebased("carry")
    for _ in range(4):
        refer(model)
        one_step(model, optimizer)
    assert torch.equal(disable(model), pretrained())


def saved(accumulator: str, folder: Path) -> tuple[Any, scalora.ScaLoRA]:
    """A re-based model, its adapter and its state saved as a loop saves them."""
    model, optimizer = rebased(accumulator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="save_pretrained writes the adapter alone")
        model.save_pretrained(folder, selected_adapters=["default"])
    scalora.save_training_state(optimizer, folder, all_base_weights=True)
    return model, optimizer


def without_base(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "base_layer" not in k}
    save_file(tensors, file, metadata={"format": "pt"})


def test_loading_another_adapter_over_a_re_based_one_warns_and_names_what_is_missing(
    tmp_path: Path,
) -> None:
    model, optimizer = saved("carry", tmp_path)
    earlier = models.answers(model, INPUTS)
    models.train(model, optimizer, INPUTS, 6)
    with pytest.warns(UserWarning, match="scalora.load_training_state.*ScaLoRACallback") as caught:
        model.load_adapter(tmp_path, "default")
    [warning] = [w for w in caught if "ScaLoRA has put" in str(w.message)]
    assert warning.filename == __file__
    assert not torch.allclose(models.answers(model, INPUTS), earlier, atol=1e-5)  # it is so
    scalora.load_training_state(optimizer, tmp_path)
    torch.testing.assert_close(models.answers(model, INPUTS), earlier, rtol=0, atol=1e-6)


def test_loading_an_adapter_that_brings_its_base_is_right_and_silent(tmp_path: Path) -> None:
    model, optimizer = saved("dense", tmp_path)
    earlier = models.answers(model, INPUTS)
    models.train(model, optimizer, INPUTS, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path, "default")
    assert torch.equal(models.answers(model, INPUTS), earlier)
    without_base(tmp_path)
    with pytest.warns(UserWarning, match="scalora.load_training_state"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
def test_resuming_a_model_that_was_re_based_before_says_nothing(
    accumulator: str, tmp_path: Path
) -> None:
    """As a Trainer does, whose callback brings the rest back afterwards."""
    model, _ = saved(accumulator, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path, "default", is_trainable=True)


def test_loading_an_adapter_of_another_name_says_nothing_of_the_one_that_stays(
    tmp_path: Path,
) -> None:
    model, _ = saved("carry", tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_adapter(tmp_path, "third")
    # Only that what was loaded is not whole.
    assert [m for m in messages(caught) if "carry is missing here" not in m] == []
