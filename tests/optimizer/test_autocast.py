"""A step, a report and what is saved are the same to the bit under autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from torch import Tensor, nn

import scalora

INPUTS = models.vectors(6, 12)
STEPS = 7
ADAMW, ADAFACTOR = torch.optim.AdamW, torch.optim.Adafactor
Case = tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]
CASES: dict[str, Case] = {
    "leak": (ADAMW, {"interval": 2}),
    "carry": (ADAMW, {"interval": 2, "accumulator": "carry", "carry_rank": 6}),  # compressed, too
    "age": (ADAMW, {"rule": "age", "interval": 2}),
    "expected": (ADAMW, {"rule": "expected", "interval": 2}),
    "exact": (ADAMW, {"rule": "exact"}),
    "exact, carry": (ADAMW, {"rule": "exact", "accumulator": "carry"}),
    "direction": (ADAMW, {"rule": "direction"}),
    "Adafactor": (ADAFACTOR, {"interval": 2}),  # whose own step has a product of matrices
    "Adafactor, exact": (ADAFACTOR, {"rule": "exact"}),
}


def autocast(is_on: bool) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if is_on else nullcontext()


def trained(case: str, is_on: bool = False) -> tuple[nn.Module, scalora.ScaLoRA]:
    """Train a model whose steps alone are under autocast, or not."""
    inner, options = CASES[case]
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(12, 96, 80), target_modules=["first", "second"])
    optimizer = scalora.ScaLoRA(inner(models.trainable(model), lr=1e-2), model, **options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        models.loss(model, INPUTS).backward()
        with autocast(is_on):
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("case", CASES)
def test_step_under_autocast_is_the_step_to_the_bit(case: str) -> None:
    (model, optimizer), (other, cast) = trained(case), trained(case, is_on=True)
    assert optimizer.rebase_count > 0
    weights = other.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    for kept, found in zip(optimizer.kept_tensors(), cast.kept_tensors(), strict=True):
        assert torch.equal(kept, found)
    assert cast.progress() == optimizer.progress()


@pytest.mark.parametrize("case", ["leak", "carry"])
def test_report_and_progress_are_the_same_under_autocast(case: str) -> None:
    _, optimizer = trained(case)
    report, progress = optimizer.report(), optimizer.progress()
    with autocast(True):
        assert optimizer.report().rows == report.rows
        assert optimizer.progress() == progress


def test_closure_is_evaluated_under_the_scripts_own_autocast() -> None:
    model, optimizer = trained("leak")
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        output = model(INPUTS)
        seen.append(output.dtype)
        loss = output.float().square().mean()
        loss.backward()
        return loss

    with autocast(True):
        optimizer.step(closure)
    assert seen == [torch.bfloat16]


def test_next_forward_pass_under_the_same_autocast_sees_the_step() -> None:
    model, optimizer = trained("exact")
    with autocast(True):
        for _ in range(3):
            optimizer.zero_grad()
            models.loss(model, INPUTS).backward()
            optimizer.step()
        found = model(INPUTS)
    with autocast(True):
        assert torch.equal(found, model(INPUTS))


def test_files_and_spectra_are_the_same_under_autocast(tmp_path: Path) -> None:
    base = models.bert()
    pretrained = copy.deepcopy(base)
    model = models.with_lora(base, target_modules=["query", "dense"])
    training.rebase(model, models.token_ids(4, 5), 4)
    spectra = []
    for name, is_on in (("plain", False), ("cast", True)):
        with autocast(is_on):
            scalora.save_adapter(model, tmp_path / name / "adapter", base=pretrained)
            scalora.save_merged(model, tmp_path / name / "merged")
            spectra.append(scalora.delta_spectrum(model, pretrained))
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "cast" / file).read_bytes()
    plain, cast = spectra
    assert all(torch.equal(spectrum, cast[layer]) for layer, spectrum in plain.items())


def test_optimal_scaling_is_the_same_under_autocast() -> None:
    P, Q, grad_P, grad_Q = (models.vectors(n, 3) for n in (20, 30, 20, 30))
    found = scalora.optimal_scaling(P, Q, grad_P, grad_Q)
    with autocast(True):
        cast = scalora.optimal_scaling(P, Q, grad_P, grad_Q)
    assert all(map(torch.equal, found, cast))


def test_next_forward_pass_after_a_step_that_failed_sees_what_the_step_has_left() -> None:
    model, optimizer = trained("exact")
    optimizer.zero_grad()
    with autocast(True):
        models.loss(model, INPUTS).backward()
        optimizer.inner.register_step_pre_hook(_fail)
        before = optimizer.rebase_count
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        assert optimizer.rebase_count > before
        found = model(INPUTS)
    with autocast(True):
        assert torch.equal(found, model(INPUTS))


def _fail(*_: Any) -> None:
    raise torch.OutOfMemoryError
