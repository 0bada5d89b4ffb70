"""How much rank the learned change has."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from training import rebase

import scalora
from scalora.saving import entropy_rank


def _fine_tuned(
    base: nn.Module, inputs: Tensor, *, rule: str = "exact", steps: int = 8, **config: Any
) -> tuple[Any, nn.Module]:
    start = copy.deepcopy(base)
    model = models.with_lora(base, **config)
    rebase(model, inputs, steps, rule=rule)
    return model, start


def _perceptron(**options: Any) -> tuple[Any, nn.Module]:
    return _fine_tuned(
        models.Perceptron(),
        models.vectors(64, 12),
        **{"target_modules": ["first", "second"], **options},
    )


def _merged(model: Any, name: str) -> Tensor:
    return copy.deepcopy(model).merge_and_unload().get_submodule(name).weight.detach()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding", "conv2d"])
def test_spectrum_is_that_of_the_explicit_difference(kind: str, dora: bool) -> None:
    base, inputs, targets = {
        "linear": (models.Perceptron(), models.vectors(64, 12), ["first", "second"]),
        "Conv1D": (
            models.gpt2(),
            models.token_ids(12, 9),
            ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
        ),
        "embedding": (models.Embedder(), models.token_ids(16, 7), ["tokens"]),
        "conv2d": (
            models.Convolutions(nn.Conv2d(3, 6, 3)),
            models.vectors(12, 3, 9, 8),
            ["convolution"],
        ),
    }[kind]
    model, start = _fine_tuned(
        base, inputs, target_modules=targets, use_dora=dora, fan_in_fan_out=kind == "Conv1D"
    )
    spectra = scalora.delta_spectrum(model, start)
    assert spectra.keys() == set(targets)
    for name, spectrum in spectra.items():
        change = (_merged(model, name) - start.get_submodule(name).weight).detach().flatten(1)
        assert spectrum.shape == (min(change.shape),)
        assert spectrum.dtype == torch.float32
        assert (spectrum.diff() <= 0).all()
        expected = torch.linalg.svdvals(change.double()).float()
        torch.testing.assert_close(spectrum, expected, rtol=1e-4, atol=1e-6)


def test_spectrum_of_a_float64_model_is_float64() -> None:
    model, start = _fine_tuned(
        models.Perceptron().double(),
        models.vectors(64, 12).double(),
        target_modules=["first", "second"],
    )
    for spectrum in scalora.delta_spectrum(model, start).values():
        assert spectrum.dtype == torch.float64


@pytest.mark.parametrize("rule", ["none", "exact"])
def test_rank_of_the_change_is_the_adapters_in_plain_lora_and_above_it_in_scalora(
    rule: str,
) -> None:
    model, start = _perceptron(rule=rule, r=2)
    for spectrum in scalora.delta_spectrum(model, start).values():
        rank = int((spectrum > 1e-4 * spectrum[0]).sum())
        assert rank == 2 if rule == "none" else rank > 2
    for rank in scalora.effective_rank(model, start).values():
        assert 1 <= rank <= 2 if rule == "none" else rank > 1


def test_plain_lora_needs_no_base_and_one_makes_no_difference() -> None:
    model, start = _perceptron(rule="none")
    without, with_base = scalora.delta_spectrum(model), scalora.delta_spectrum(model, start)
    for name, spectrum in without.items():
        torch.testing.assert_close(spectrum, with_base[name], rtol=1e-4, atol=1e-6)


def test_merged_adapter_is_part_of_the_change() -> None:
    model, start = _perceptron()
    expected = scalora.delta_spectrum(model, start)
    model.merge_adapter()
    for name, spectrum in scalora.delta_spectrum(model, start).items():
        torch.testing.assert_close(spectrum, expected[name], rtol=1e-4, atol=1e-6)


def test_measuring_leaves_the_model_as_it_is() -> None:
    model, start = _perceptron(use_dora=True)
    bits, base_bits = models.bits(model), models.bits(start)
    scalora.effective_rank(model, start)
    models.assert_same_bits(model, bits)
    models.assert_same_bits(start, base_bits)


def test_unchanged_model_has_spectrum_and_rank_zero() -> None:
    base = models.Perceptron()
    start = copy.deepcopy(base)
    model = models.with_lora(base, target_modules=["first", "second"])
    for pretrained in (None, start):
        for spectrum in scalora.delta_spectrum(model, pretrained).values():
            assert torch.equal(spectrum, torch.zeros(len(spectrum)))
        assert scalora.effective_rank(model, pretrained) == {"first": 0.0, "second": 0.0}


def test_only_the_named_or_the_active_adapters_layers_are_measured() -> None:
    model, start = _perceptron(target_modules=["first"])
    assert scalora.delta_spectrum(model, start).keys() == {"first"}
    assert scalora.effective_rank(model, start, adapter_name="default").keys() == {"first"}
    with pytest.raises(ValueError, match="'other'"):
        scalora.delta_spectrum(model, start, adapter_name="other")


def _with_spectrum(sigma: Tensor) -> tuple[Any, nn.Module]:
    """A model whose layer ``first`` (20 x 12) has changed by a matrix of that spectrum."""
    base = models.Perceptron().double()
    start = copy.deepcopy(base)
    model = models.with_lora(base, r=len(sigma), lora_alpha=len(sigma), target_modules=["first"])
    U, _ = torch.linalg.qr(torch.randn(20, len(sigma), dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(12, len(sigma), dtype=torch.float64))
    lora_B, lora_A = models.factor_parameters(models.layer(model, "first"))
    with torch.no_grad():
        lora_B.copy_(U * sigma)
        lora_A.copy_(V.T)
    return model, start


@pytest.mark.parametrize(
    "sigma, expected",
    [
        ([2.0], 1.0),
        ([3.0, 3.0, 3.0, 3.0], 4.0),
        ([1e-6, 1e-6, 1e-6], 3.0),
        # Entropy of (3/4, 1/4).
        ([3.0, 1.0], math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))),
        ([5.0, 5.0, 0.0], 2.0),
    ],
)
def test_effective_rank_of_known_spectra(sigma: list[float], expected: float) -> None:
    model, start = _with_spectrum(torch.tensor(sigma, dtype=torch.float64))
    spectrum = scalora.delta_spectrum(model, start)["first"]
    torch.testing.assert_close(
        spectrum[: len(sigma)], torch.tensor(sigma, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    assert scalora.effective_rank(model, start)["first"] == pytest.approx(expected, rel=1e-6)
    assert entropy_rank(torch.tensor(sigma)) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_does_not_depend_on_the_size_of_the_change() -> None:
    spectrum = torch.rand(9)
    assert entropy_rank(spectrum * 1e-20) == pytest.approx(entropy_rank(spectrum), rel=1e-5)
    assert entropy_rank(spectrum * 1e20) == pytest.approx(entropy_rank(spectrum), rel=1e-5)
    assert 1 < entropy_rank(spectrum) < 9


@pytest.mark.parametrize("rule", ["none", "exact"])
def test_plot_tells_how_much_of_the_change_is_beyond_the_adapters_rank(
    rule: str, tmp_path: Path
) -> None:
    model, start = _perceptron(rule=rule, r=2, steps=60)
    figure = scalora.plot_spectrum(model, start, tmp_path / "spectrum.svg")
    (axes,) = figure.axes
    spectra = scalora.delta_spectrum(model, start).values()
    beyond = [float(s[2:].square().sum() / s.square().sum()) for s in spectra]
    share = sum(beyond) / len(beyond)
    assert axes.get_title(loc="left") == f"{share:.0%} of the change's energy is beyond rank 2"
    assert share < 1e-6 if rule == "none" else share > 0.01
    assert [text.get_text() for text in axes.texts] == ["r = 2"]
    assert (tmp_path / "spectrum.svg").read_bytes().startswith(b"<?xml")


def test_plot_of_a_model_that_has_not_changed_is_refused() -> None:
    model = models.with_lora(models.Perceptron(), target_modules=["first", "second"])
    with pytest.raises(ValueError, match="no layer has changed"):
        scalora.plot_spectrum(model)
