"""The carry itself: its algebra, its place in the forward pass and in PEFT's own operations."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from samplers import SIDES
from torch import Tensor, nn

from scalora.carry import Carry, compress, put_carry
from scalora.peft_layers import LoRAPair, attach_carry, lora_pairs

# Recompression


@given(
    m=SIDES,
    n=SIDES,
    columns=st.integers(1, 12),
    true_rank=st.integers(0, 12),
    rank=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_compression_is_the_truncated_svd(
    m: int, n: int, columns: int, true_rank: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(2, m, columns, generator=generator, dtype=torch.float64)
    down = torch.randn(2, columns, n, generator=generator, dtype=torch.float64)
    up[..., true_rank:] = 0
    found = compress(up, down, rank)
    assert found.up.shape == (2, m, rank) and found.down.shape == (2, rank, n)
    for layer in range(2):
        exact = (up[layer] @ down[layer]).numpy()
        sigma = np.linalg.svd(exact, compute_uv=False)
        kept = (found.up[layer] @ found.down[layer]).numpy()
        size = max(1.0, float(np.sum(exact**2)))
        assert found.energy[layer].item() == pytest.approx(np.sum(exact**2), abs=1e-10 * size)
        assert found.cut[layer].item() == pytest.approx(np.sum(sigma[rank:] ** 2), abs=1e-10 * size)
        # Eckart and Young: no matrix of that rank is closer.
        assert np.sum((exact - kept) ** 2) == pytest.approx(
            np.sum(sigma[rank:] ** 2), abs=1e-10 * size
        )


def test_compression_balances_its_factors_and_sorts_its_columns() -> None:
    up, down = torch.randn(1, 30, 12), 1e4 * torch.randn(1, 12, 20)
    found = compress(up, down, 8)
    norms = found.up[0].norm(dim=0)
    torch.testing.assert_close(norms, found.down[0].norm(dim=1))
    assert (norms[:-1] >= norms[1:]).all()


def test_compression_in_float32_is_exact_to_a_few_roundings() -> None:
    up, down = torch.randn(3, 200, 40), torch.randn(3, 40, 150)
    found = compress(up, down, 40)
    exact = up.double() @ down.double()
    error = (found.up.double() @ found.down.double() - exact).norm() / exact.norm()
    assert error < 2e-7


def test_carry_grows_without_changing() -> None:
    carry = Carry(6, 5, 4, torch.device("cpu"), torch.float64)
    carry.up.normal_()
    carry.down.normal_()
    carry.columns = 4
    product = carry.up @ carry.down
    carry.grow(9)
    assert carry.capacity == 9 and carry.columns == 4
    torch.testing.assert_close(carry.up @ carry.down, product)


def test_cut_is_relative_to_all_that_was_learned() -> None:
    carry = _filled(Carry(6, 5, 4, torch.device("cpu"), torch.float64), 3)
    P, Q = models.vectors(6, 2).double(), models.vectors(2, 5).double()
    assert carry.relative_cut(P, Q) == 0
    learned = (carry.up @ carry.down + P @ Q).square().sum()
    carry.cut += 0.25 * learned
    assert carry.relative_cut(P, Q).item() == pytest.approx(0.25)
    # All of it taken back: nothing is learned, and no division by zero.
    assert carry.relative_cut(-carry.used_up, carry.used_down).isfinite()


# The forward pass


def _filled(carry: Carry, columns: int | None = None) -> Carry:
    generator = torch.Generator().manual_seed(7)
    carry.columns = carry.capacity if columns is None else columns
    for used in (carry.used_up, carry.used_down):
        used.copy_(0.3 * torch.randn(used.shape, generator=generator, dtype=torch.float64))
    return carry


def _pair(model: Any, name: str = "first") -> LoRAPair:
    return next(pair for pair in lora_pairs(model, "default") if pair.name == name)


def _with_carry(pair: LoRAPair, capacity: int = 5) -> Carry:
    P, Q = pair.P_parameter, pair.Q_parameter
    dtype = torch.promote_types(P.dtype, torch.float32)
    carry = _filled(Carry(P.shape[0], Q[0].numel(), capacity, P.device, dtype))
    attach_carry(pair.module, pair.adapter, carry)
    return carry


def _random_adapter(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in models.trainable(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_joined_product_has_the_gradients_of_autograd() -> None:
    down, up = nn.Linear(7, 3, bias=False).double(), nn.Linear(3, 5).double()
    carry = _filled(Carry(5, 7, 4, torch.device("cpu"), torch.float64))
    x = torch.randn(2, 6, 7, dtype=torch.float64, requires_grad=True)
    expected = up(down(x)) + x @ carry.down.T @ carry.up.T
    leaves = [x, down.weight, up.weight, up.bias]
    seed = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, seed)
    put_carry(down, up, carry)
    found = up(down(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(torch.autograd.grad(found, leaves, seed), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_joined_product_without_a_gradient_of_its_input() -> None:
    down, up = nn.Linear(7, 3, bias=False), nn.Linear(3, 5, bias=False)
    put_carry(down, up, _filled(Carry(5, 7, 4, torch.device("cpu"), torch.float32)))
    up.weight.requires_grad_(False)
    up(down(torch.randn(6, 7))).sum().backward()
    assert down.weight.grad is not None and up.weight.grad is None


def test_autocast_computes_both_passes_in_its_dtype() -> None:
    down, up = nn.Linear(7, 3, bias=False), nn.Linear(3, 5, bias=False)
    put_carry(down, up, _filled(Carry(5, 7, 4, torch.device("cpu"), torch.float32)))
    x = torch.randn(6, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = up(down(x))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), up(down(x)), rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert down.weight.grad is not None and down.weight.grad.dtype == torch.float32


def test_adapter_in_half_precision_keeps_a_carry_in_float32() -> None:
    model = models.with_lora(
        models.Perceptron().bfloat16(), autocast_adapter_dtype=False, target_modules=["first"]
    )
    carry = _with_carry(_pair(model))
    inputs = models.vectors(4, 12).bfloat16()
    assert models.outputs(model, inputs).dtype == torch.bfloat16
    model.to(torch.float16)
    assert carry.up.dtype == torch.float32


LAYERS = {
    "linear": (models.Perceptron, "first", {}, models.vectors(6, 12)),
    "linear, bias, rsLoRA": (
        models.Perceptron,
        "first",
        {"lora_bias": True, "use_rslora": True},
        models.vectors(6, 12),
    ),
    "Conv1D of GPT-2": (models.gpt2, "transformer.h.0.attn.c_attn", {}, models.token_ids(3, 9)),
    "embedding": (models.Embedder, "tokens", {}, models.token_ids(4, 7)),
    "conv1d": (
        lambda: models.Convolutions(nn.Conv1d(4, 6, 3, stride=2, padding=1)),
        "convolution",
        {},
        models.vectors(2, 4, 11),
    ),
    "conv2d": (
        lambda: models.Convolutions(nn.Conv2d(4, 6, (3, 2))),
        "convolution",
        {},
        models.vectors(2, 4, 9, 8),
    ),
    "conv3d": (
        lambda: models.Convolutions(nn.Conv3d(2, 3, 2)),
        "convolution",
        {},
        models.vectors(2, 2, 5, 5, 5),
    ),
    "linear, DoRA": (models.Perceptron, "first", {"use_dora": True}, models.vectors(6, 12)),
}


def _model(name: str, **config: Any) -> tuple[Any, LoRAPair, Tensor]:
    make, layer, options, inputs = LAYERS[name]
    model = models.with_lora(make().double(), target_modules=[layer], **{**options, **config})
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return _random_adapter(model), _pair(model, layer), inputs


@pytest.mark.parametrize("name", LAYERS)
def test_layer_computes_with_the_weight_that_holds_its_carry(name: str) -> None:
    model, pair, inputs = _model(name)
    alone = models.answers(model, inputs)
    _with_carry(pair)
    found = models.answers(model, inputs)
    assert (found - alone).abs().max() > 1e-3
    if not pair.has_variant:
        change = pair.effective_weight() - pair.base_weight
        torch.testing.assert_close(pair.learned_change(), change, rtol=0, atol=1e-12)
    plain = copy.deepcopy(model.get_base_model())
    lora = plain.get_submodule(pair.name)
    base = lora.get_base_layer()
    base.weight.data = pair.effective_weight()
    if pair.adapter in lora.lora_B and lora.lora_B[pair.adapter].bias is not None:
        base.bias.data += pair.scaling * lora.lora_B[pair.adapter].bias
    path, _, leaf = pair.name.rpartition(".")
    setattr(plain.get_submodule(path), leaf, base)
    torch.testing.assert_close(models.answers(plain, inputs), found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_peft_merges_and_unmerges_the_carry(name: str) -> None:
    model, pair, inputs = _model(name)
    _with_carry(pair)
    before = models.answers(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-10)
    model.unmerge_adapter()
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-10)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(models.answers(merged, inputs), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_carry_is_switched_with_its_adapter(name: str) -> None:
    make, layer, _, _ = LAYERS[name]
    torch.manual_seed(0)
    base = make().double()
    torch.manual_seed(0)
    model, pair, inputs = _model(name)
    pretrained = models.answers(base, inputs)
    _with_carry(pair)
    with model.disable_adapter():
        torch.testing.assert_close(models.answers(model, inputs), pretrained, rtol=0, atol=0)
    if pair.has_variant:
        return
    model.add_adapter("other", LoraConfig(r=2, target_modules=[layer]))
    model.set_adapter("other")  # it begins at zero
    torch.testing.assert_close(models.answers(model, inputs), pretrained, rtol=0, atol=1e-12)
    model.delete_adapter("default")
    torch.testing.assert_close(models.answers(model, inputs), pretrained, rtol=0, atol=1e-12)
    model.add_adapter("default", LoraConfig(r=2, target_modules=[layer]))
    model.set_adapter("default")
    assert pair.carry is None  # another of that name begins without
    torch.testing.assert_close(models.answers(model, inputs), pretrained, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_adapter_made_anew_by_the_same_name_computes_with_its_carry_once(name: str) -> None:
    model, pair, inputs = _model(name)
    layer = [pair.name]
    model.add_adapter("other", LoraConfig(r=2, target_modules=layer))
    _with_carry(pair)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=3, target_modules=layer))
    model.set_adapter("default")
    _with_carry(pair)
    before = models.answers(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_pickles_of_a_model_keep_their_own_carry(name: str) -> None:
    model, pair, inputs = _model(name)
    carry = _with_carry(pair)
    before = models.answers(model, inputs)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    carry.up.zero_()
    assert (models.answers(model, inputs) - before).abs().max() > 1e-3
    for other in copies:
        assert torch.equal(models.answers(other, inputs), before)
        other_pair = _pair(other, pair.name)
        assert other_pair.carry is not carry
        with torch.no_grad():
            delta = other_pair.module.get_delta_weight("default")
            mine = pair.module.get_delta_weight("default")
        assert (delta - mine).abs().max() > 1e-3


def test_carry_is_dropped_out_with_its_adapter() -> None:
    model, pair, inputs = _model("linear", lora_dropout=0.5)
    with torch.no_grad():
        pair.P_parameter.zero_()
    _with_carry(pair)
    model.train()
    first, second = models.outputs(model, inputs), models.outputs(model, inputs)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_batch_that_mixes_adapters_gives_the_carry_to_its_own_rows(name: str) -> None:
    model, pair, inputs = _model(name)
    _with_carry(pair)
    model.eval()
    with model.disable_adapter():
        pretrained = model(inputs)
    whole = model(inputs)
    names = ["__base__"] + ["default"] * (len(inputs) - 1)
    mixed = model(inputs, adapter_names=names)
    torch.testing.assert_close(mixed[:1], pretrained[:1], rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed[1:], whole[1:], rtol=0, atol=1e-12)


def test_functional_gradients_see_the_carry() -> None:
    model, pair, inputs = _model("linear")
    _with_carry(pair)
    weight = pair.P_parameter.detach().clone()
    name = next(n for n, p in model.named_parameters() if p is pair.P_parameter)

    def loss(P: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: P}, (inputs,)).square().sum()

    found = torch.func.grad(loss)(weight)
    model(inputs).square().sum().backward()
    torch.testing.assert_close(found, pair.P_parameter.grad, rtol=0, atol=1e-10)


def test_embedding_that_scales_its_output_scales_its_carry() -> None:
    class Scaled(nn.Embedding):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.embed_scale = torch.tensor(3.0, dtype=torch.float64)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    base = models.Embedder()
    base.tokens = Scaled(models.VOCABULARY, 10)
    model = _random_adapter(models.with_lora(base.double(), target_modules=["tokens"]))
    pair, ids = _pair(model, "tokens"), models.token_ids(4, 7)
    _with_carry(pair)
    before = models.answers(model, ids)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(models.answers(merged, ids), before, rtol=0, atol=1e-10)


def test_second_carry_takes_the_place_of_the_first() -> None:
    model, pair, inputs = _model("linear")
    _with_carry(pair)
    again = _with_carry(pair, capacity=3)
    assert pair.carry is again
    change = pair.effective_weight() - pair.base_weight
    torch.testing.assert_close(pair.learned_change(), change, rtol=0, atol=1e-12)
    assert pair.learned_rank == 6
    assert models.answers(model, inputs).isfinite().all()


def test_module_that_is_no_linear_layer_is_refused() -> None:
    carry = Carry(5, 7, 4, torch.device("cpu"), torch.float32)
    with pytest.raises(TypeError, match="Bilinear"):
        put_carry(nn.Bilinear(2, 2, 2), nn.Linear(3, 5), carry)
