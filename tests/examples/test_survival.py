"""The pieces of the benchmark of increments in quantized bases."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import scalora
from examples.benchmark.formats import BFloat16, CodeBook, formats
from examples.benchmark.increments import Increments, increment
from examples.benchmark.stores import Carry, RequantizedBase, outcome

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

CPU = torch.device("cpu")
NAMES = ["NF4", "NF4, double", "NF4, held", "FP4", "int8", "bfloat16"]
WITH_OWN_SCALES = ["NF4", "FP4", "int8"]


def weight(rows: int = 96, columns: int = 256) -> torch.Tensor:
    return 0.05 * torch.randn(rows, columns)


def drawn(name: str, value: torch.Tensor, seed: int) -> torch.Tensor:
    return (
        formats(CPU)[name].stochastic(value, generator=torch.Generator().manual_seed(seed)).values
    )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nearest_in_4_bits_is_what_bitsandbytes_stores(kind, double):
    W = weight()
    packed, state = functional.quantize_4bit(
        W, blocksize=64, quant_type=kind, compress_statistics=double
    )
    known = formats(CPU)["NF4" if kind == "nf4" else "FP4"]
    stored = CodeBook(known.levels, double=double).nearest(W)
    theirs = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(stored.values, theirs, rtol=1e-6, atol=0)


def test_nearest_int8_is_what_bitsandbytes_stores():
    W = weight()
    codes, scale, _ = functional.int8_vectorwise_quant(W)
    stored = formats(CPU)["int8"].nearest(W)
    assert torch.equal(stored.codes - 127, codes.long())
    theirs = functional.int8_vectorwise_dequant(codes, scale)
    torch.testing.assert_close(stored.values, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_storing_again_what_is_stored_changes_no_code(name):
    format_ = formats(CPU)[name]
    stored = format_.nearest(weight())
    again = format_.nearest(stored.values, stored)
    assert torch.equal(again.codes, stored.codes)
    if name == "NF4, double":  # its scales are rounded around a new mean
        return
    torch.testing.assert_close(again.values, stored.values, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", [*WITH_OWN_SCALES, "bfloat16"])
def test_stochastic_rounding_is_unbiased(name):
    W, draws = weight(8, 128), 2000
    values = drawn(name, W.repeat(draws, 1), 0).view(draws, *W.shape).double()
    spread = values.std(0)
    moving = spread > 1e-7  # all but the elements that are on a level, as the largest are
    z = ((values.mean(0) - W) / (spread / draws**0.5))[moving]
    assert moving.float().mean() > 0.9
    # Standard normal if it is unbiased; rounding to nearest would be tens away.
    assert z.abs().max() < 5
    assert z.square().mean() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("name", WITH_OWN_SCALES)
def test_stochastic_rounding_takes_one_of_the_two_levels_around(name):
    W = weight()
    book = formats(CPU)[name]
    block = book.block or W.shape[-1]
    scale = W.reshape(-1, block).abs().amax(-1, keepdim=True)
    position = W.reshape(-1, block) / scale * book.levels[-1]
    for seed in range(3):
        stored = book.stochastic(W, generator=torch.Generator().manual_seed(seed))
        level = book.levels[stored.codes].view_as(position)
        between = (book.levels > torch.minimum(level, position)[..., None] + 1e-4) & (
            book.levels < torch.maximum(level, position)[..., None] - 1e-4
        )
        assert not between.any()
        assert (stored.codes != book.nearest(W).codes).any()


def test_stochastic_bfloat16_is_one_of_the_two_numbers_around():
    W = weight()
    half = BFloat16().half_cells(BFloat16().nearest(W), W)
    for seed in range(3):
        assert ((drawn("bfloat16", W, seed) - W).abs() <= 2 * half).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_increment_below_half_a_cell_changes_no_code_and_one_above_does(name):
    format_ = formats(CPU)[name]
    stored = format_.nearest(weight())
    sign = torch.randint(0, 2, stored.values.shape) * 2.0 - 1
    half = format_.half_cells(stored, sign)
    inside = half.isfinite()
    # The elements that carry the scale stay, so that the cells stay where they are.
    if isinstance(format_, CodeBook):
        inside &= format_.levels[stored.codes].abs() != format_.levels[-1]
    half = torch.where(inside, half, 0.0)
    below = format_.nearest(stored.values + 0.98 * half * sign, stored)
    above = format_.nearest(stored.values + 1.02 * half * sign, stored)
    assert inside.float().mean() > 0.9
    assert torch.equal(below.codes, stored.codes)
    assert (above.codes != stored.codes)[inside].all()


def test_scales_that_are_held_stay_and_cut_off_what_has_grown_beyond_them():
    held = formats(CPU)["NF4, held"]
    stored = held.nearest(weight())
    grown = held.nearest(2 * stored.values, stored)
    assert torch.equal(grown.scale, stored.scale)
    assert grown.values.abs().max() == stored.values.abs().max()


def test_an_increment_is_what_the_base_weight_took_in():
    model = get_peft_model(
        nn.Sequential(nn.Linear(24, 16)), LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    )
    optimizer = scalora.create_scalora_optimizer(model, torch.optim.AdamW, lr=1e-2, rule="exact")
    [pair] = optimizer.rebased_pairs
    x, y = torch.randn(64, 24), torch.randn(64, 16)
    sizes = []
    for _ in range(4):
        nn.functional.mse_loss(model(x), y).backward()
        before = pair.base_weight.clone()
        P, Q = pair.P_parameter.clone(), pair.Q_parameter.clone()
        optimizer.step()
        optimizer.zero_grad()
        up, down = increment(P, Q, *optimizer.last_scaling[pair.name], pair.scaling)
        torch.testing.assert_close(pair.base_weight - before, up @ down, rtol=1e-4, atol=1e-6)
        sizes.append((up @ down).norm())
    assert max(sizes) > 1e-2


def increments(count: int, size: float) -> Increments:
    W = weight()
    return Increments(W, size * torch.randn(count, len(W), 2), torch.randn(count, 2, W.shape[1]))


def test_nothing_of_a_tiny_increment_survives_in_a_held_base_and_all_of_it_in_a_carry():
    layers = [increments(3, 1e-5), increments(3, 1e-5)]
    held = formats(CPU)["NF4, held"]
    lost = outcome(lambda W: RequantizedBase(held.nearest(W), held.nearest), layers)
    assert lost.one == (0, 0, 1)
    assert lost.curve[3].survived == 0
    kept = outcome(Carry, layers)
    assert kept.one.survived == pytest.approx(1)
    assert kept.one.relative_error < 1e-6
    assert kept.curve[3].relative_error < 1e-6


def test_a_carry_keeps_a_sum_of_more_columns_than_it_has_if_its_rank_is_low():
    layer = increments(60, 1e-3)
    same = Increments(layer.weight, layer.up, layer.down[:1].expand_as(layer.down))
    assert outcome(Carry, [same]).curve[60].relative_error < 1e-5
    full = outcome(Carry, [layer]).curve[60].relative_error
    assert 0.01 < full < 1


def test_sums_of_a_store_that_keeps_half_of_everything():
    class Half(Carry):
        def change(self):
            return super().change() / 2

    result = outcome(Half, [increments(4, 1e-3)])
    assert result.one.survived == pytest.approx(0.5)
    assert result.curve[4].survived == pytest.approx(0.5)
    assert result.curve[4].relative_error == pytest.approx(0.5)
