"""Base weights that nothing has been folded into are not in a checkpoint, nor lost by that."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from peft import PeftModel
from torch import Tensor, nn

import scalora
from scalora.saving.training_state_file import TrainingStateFile

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone")

INTERVAL, STEPS = 4, 9
INPUTS = models.vectors(16, 12)


class PartlyUsed(models.Perceptron):
    """A perceptron with one more layer, which gets no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(8, 8)


def pretrained(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    return PartlyUsed().to(dtype)


def run() -> tuple[Any, scalora.ScaLoRA]:
    torch.manual_seed(6)
    model = models.with_lora(pretrained(), target_modules=["first", "second", "third"])
    return model, optimizer_of(model)


def optimizer_of(model: Any, **options: Any) -> scalora.ScaLoRA:
    return training.optimizer_of(model, **{"rule": "auto", "interval": INTERVAL, **options})


def save(model: Any, optimizer: scalora.ScaLoRA, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Write a checkpoint; what its file holds, with what it has in the adapter's."""
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    scalora.save_training_state(optimizer, folder, **options)
    return TrainingStateFile.read(folder).tensors


def bases(tensors: dict[str, Tensor]) -> set[str]:
    return {name for name in tensors if name.startswith("base:")}


def reloaded(folder: Path, base: nn.Module | None = None) -> tuple[Any, scalora.ScaLoRA]:
    base = pretrained() if base is None else base
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    return model, optimizer_of(model)


def assert_refused_without_a_trace(
    model: Any, optimizer: scalora.ScaLoRA | None, folder: Path, match: str
) -> None:
    bits = models.bits(model)
    state = None if optimizer is None else copy.deepcopy(optimizer.rebasing_state())
    with pytest.raises(ValueError, match=match):
        if optimizer is None:
            scalora.load_rebased_weights(model, folder)
        else:
            scalora.load_training_state(optimizer, folder)
    models.assert_same_bits(model, bits)
    if optimizer is not None and state is not None:
        assert str(optimizer.rebasing_state()) == str(state)


@pytest.mark.parametrize("steps", [INTERVAL - 1, STEPS - 2])
def test_run_resumed_without_them_continues_to_the_same_bits(steps: int, tmp_path: Path) -> None:
    model, optimizer = run()
    models.train(model, optimizer, INPUTS, steps)
    tensors = save(model, optimizer, tmp_path)
    assert bases(tensors) == ({"base:first", "base:second"} if steps > INTERVAL else set())
    rest = models.train(model, optimizer, INPUTS, STEPS)

    model, optimizer = reloaded(tmp_path)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    scalora.load_training_state(optimizer, tmp_path)
    assert models.train(model, optimizer, INPUTS, STEPS) == rest


def test_plain_lora_writes_no_base_at_all(tmp_path: Path) -> None:
    model, _ = run()
    optimizer = optimizer_of(model, rule="none", interval="auto")
    models.train(model, optimizer, INPUTS, STEPS)
    assert not bases(save(model, optimizer, tmp_path))


@pytest.mark.parametrize("alone", [False, True])
def test_another_pretrained_base_is_refused(alone: bool, tmp_path: Path) -> None:
    model, optimizer = run()
    models.train(model, optimizer, INPUTS, INTERVAL - 1)
    save(model, optimizer, tmp_path)
    other = pretrained()
    with torch.no_grad():
        other.second.weight[2, 3] += 1e-3
    model, fresh = reloaded(tmp_path, other)
    assert_refused_without_a_trace(
        model, None if alone else fresh, tmp_path, "another base weight of 'second'"
    )


@pytest.mark.parametrize("alone", [False, True])
def test_base_that_has_moved_since_is_refused(alone: bool, tmp_path: Path) -> None:
    model, optimizer = run()
    models.train(model, optimizer, INPUTS, INTERVAL - 1)
    save(model, optimizer, tmp_path / "early")
    adapter = models.bits(model)
    models.train(model, optimizer, INPUTS, STEPS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(adapter[name])
    assert_refused_without_a_trace(
        model, None if alone else optimizer, tmp_path / "early", "has moved since.*all_base_weights"
    )


def test_model_in_training_goes_back_to_what_was_saved_with_all_of_them(tmp_path: Path) -> None:
    model, optimizer = run()
    models.train(model, optimizer, INPUTS, INTERVAL - 1)
    tensors = save(model, optimizer, tmp_path, all_base_weights=True)
    assert bases(tensors) == {"base:first", "base:second", "base:third"}
    early = models.bits(model)
    rest = models.train(model, optimizer, INPUTS, STEPS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(early[name])
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    scalora.load_training_state(optimizer, tmp_path)
    models.assert_same_bits(model, early)
    assert models.train(model, optimizer, INPUTS, STEPS) == rest


def test_base_in_another_precision_is_refused_and_named(tmp_path: Path) -> None:
    model, optimizer = run()
    models.train(model, optimizer, INPUTS, INTERVAL - 1)
    save(model, optimizer, tmp_path)
    model, fresh = reloaded(tmp_path, pretrained(torch.bfloat16))
    assert_refused_without_a_trace(model, fresh, tmp_path, r"'first' \(float32; here bfloat16\)")


def test_before_the_first_rebasing_only_the_calibration_takes_room(tmp_path: Path) -> None:
    model, optimizer = run()
    models.train(model, optimizer, INPUTS, INTERVAL - 1)
    tensors = save(model, optimizer, tmp_path)
    assert tensors and all(name.startswith("step_length:") for name in tensors)
