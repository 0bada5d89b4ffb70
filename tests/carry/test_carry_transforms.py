"""A layer with a carry under torch.func, forward mode and batched gradients: as without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from test_carry import _model, _with_carry
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

Parameters = dict[str, Tensor]
layers = pytest.mark.parametrize("layer", ["linear", "linear, DoRA", "conv1d", "embedding"])


class Carrying:
    """A model whose one LoRA layer has a carry, as a function of its factors."""

    def __init__(self, layer: str) -> None:
        self.model, pair, self.inputs = _model(layer)
        _with_carry(pair)
        self.parameters: Parameters = {
            name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad
        }
        generator = torch.Generator().manual_seed(4)
        self.direction = {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in self.parameters.items()
        }

    def output(self, parameters: Parameters, inputs: Tensor | None = None) -> Tensor:
        inputs = self.inputs if inputs is None else inputs
        return functional_call(self.model, parameters, (inputs,))

    def loss(self, parameters: Parameters, sample: Tensor | None = None) -> Tensor:
        inputs = None if sample is None else sample.unsqueeze(0)
        return self.output(parameters, inputs).square().sum()

    def moved(self, step: float) -> Parameters:
        return {name: p + step * self.direction[name] for name, p in self.parameters.items()}

    def gradient(self, sample: Tensor) -> list[Tensor]:
        """Of one sample, by an ordinary backward pass."""
        self.model.zero_grad()
        self.model(sample.unsqueeze(0)).square().sum().backward()
        return [p.grad.clone() for p in models.trainable(self.model)]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="eager", fullgraph=True)


@layers
def test_gradients_per_sample_are_those_of_the_samples_alone(layer: str) -> None:
    case = Carrying(layer)
    found = vmap(grad(case.loss), in_dims=(None, 0))(case.parameters, case.inputs)
    for i, sample in enumerate(case.inputs):
        close([found[name][i] for name in case.parameters], case.gradient(sample))


def test_compiled_gradients_per_sample_are_the_same() -> None:
    case = Carrying("linear")
    per_sample = vmap(grad(case.loss), in_dims=(None, 0))
    found = compiled(per_sample)(case.parameters, case.inputs)
    close(found, per_sample(case.parameters, case.inputs))
    torch.compiler.reset()


@layers
def test_ensemble_of_adapters_answers_as_its_members(layer: str) -> None:
    case = Carrying(layer)
    members = [case.moved(step) for step in (0.0, 0.5, 1.0)]
    stacked = {name: torch.stack([m[name] for m in members]) for name in case.parameters}
    close(vmap(case.output)(stacked), torch.stack([case.output(m) for m in members]))


@layers
def test_forward_mode_agrees_with_the_backward_pass(layer: str) -> None:
    case = Carrying(layer)
    backward = jacrev(case.output)(case.parameters)
    close(jacfwd(case.output)(case.parameters), backward)
    expected = sum(
        (jacobian * case.direction[name]).flatten(-case.direction[name].ndim).sum(-1)
        for name, jacobian in backward.items()
    )
    close(jvp(case.output, (case.parameters,), (case.direction,))[1], expected)
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(p, case.direction[name])
            for name, p in case.parameters.items()
        }
        close(forward_ad.unpack_dual(case.output(duals)).tangent, expected)


# DoRA takes its norm for a constant, so its gradient is that of no function.
@pytest.mark.parametrize("layer", ["linear", "conv1d", "embedding"])
def test_hessian_is_the_change_of_the_gradient(layer: str) -> None:
    case, step = Carrying(layer), 1e-5
    found = hessian(case.loss)(case.parameters)
    higher, lower = grad(case.loss)(case.moved(step)), grad(case.loss)(case.moved(-step))
    for name in case.parameters:
        along = sum(
            (found[name][other] * direction).flatten(-direction.ndim).sum(-1)
            for other, direction in case.direction.items()
        )
        difference = (higher[name] - lower[name]) / (2 * step)
        torch.testing.assert_close(along, difference, rtol=1e-6, atol=1e-6)


@layers
def test_batched_gradients_are_those_of_one_at_a_time(layer: str) -> None:
    case = Carrying(layer)
    output, leaves = case.model(case.inputs), models.trainable(case.model)
    seeds = torch.eye(output.numel(), dtype=output.dtype)[:3].view(3, *output.shape)
    found = torch.autograd.grad(output, leaves, seeds, retain_graph=True, is_grads_batched=True)
    for i, seed in enumerate(seeds):
        expected = torch.autograd.grad(output, leaves, seed, retain_graph=True)
        close([gradient[i] for gradient in found], list(expected))
