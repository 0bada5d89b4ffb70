"""The positions that are sampled: never padding, and no device's mask is read on the host."""

from __future__ import annotations

import pytest
import torch
from models import bert, token_ids, with_lora
from torch import nn

from miub import MIUBMonitor, estimators
from miub.token_sample import mask_of, sample_tokens, sample_uncounted


@pytest.mark.parametrize(
    ("leading", "expected"),
    [
        ((2, 3), [1, 1, 0, 1, 0, 0]),
        ((3, 2), [1, 1, 1, 0, 0, 0]),
        ((6,), [1, 1, 0, 1, 0, 0]),
        ((1, 6), [1, 1, 0, 1, 0, 0]),
        ((2, 1), None),
        ((2,), None),
        ((6, 1), None),
        ((2, 3, 4), None),
    ],
)
def test_the_mask_is_that_of_the_layers_positions(leading, expected):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = mask_of(mask, torch.Size(leading))
    assert (None if found is None else found.tolist()) == expected


def test_only_with_a_cache_are_fewer_positions_the_end_of_the_sequence():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert mask_of(mask, torch.Size((2, 2))) is None
    assert mask_of(mask, torch.Size((2, 2)), cached=True).tolist() == [1, 0, 1, 1]


class Wrapper(nn.Module):
    """Hands on what it is called with, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
@pytest.mark.parametrize("wrap", [Wrapper, lambda model: model], ids=["wrapped", "itself"])
@pytest.mark.parametrize("way", ["keyword", "position"])
def test_the_mask_is_found_by_whatever_way_it_comes(way, wrap, task_type):
    model = wrap(with_lora(bert(), target_modules=["query"], task_type=task_type))
    mask = torch.ones(8, 12, dtype=torch.bool)
    mask[:, 7:] = False
    monitor = MIUBMonitor(model, every=1)
    with monitor, torch.no_grad():
        if way == "keyword":
            model(token_ids(8, 12), attention_mask=mask)
        else:
            model(token_ids(8, 12), mask)
    assert {row.tokens for row in monitor.report()} == {8 * 7}


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_a_mask_of_any_type_leaves_out_padding_and_draws_every_token_when_there_are_few(dtype):
    mask = (torch.arange(300) % 3 > 0).to(dtype)
    drawn = sample_tokens(mask, 300, 256, mask.device, torch.Generator().manual_seed(0))
    assert (drawn.count, drawn.valid) == (200, None)
    assert torch.equal(drawn.index.sort().values, mask.nonzero().flatten())


def uncounted(tokens: int, positions: int, k: int):
    is_token = torch.arange(positions) < tokens
    score = torch.rand(positions, generator=torch.Generator().manual_seed(0))
    return is_token, sample_uncounted(is_token, score, k)


def test_an_uncounted_mask_gives_padding_only_where_there_are_too_few_tokens():
    is_token, enough = uncounted(200, 300, 150)
    assert is_token[enough.index].all()
    assert enough.count == 150
    assert len(enough.index.unique()) == 150
    _, few = uncounted(200, 300, 256)
    assert few.count == 200
    assert torch.equal(few.index[few.valid.flatten()].sort().values, torch.arange(200))


def filled_and_exact(tokens: int, k: int, name: str) -> tuple[float, float]:
    """With what padding holds being anything at all."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(600, 6, generator=generator)
    v = u[:, :2] + torch.randn(600, 2, generator=generator)
    estimator = estimators.ESTIMATORS[name]
    exact = estimator(u[:tokens], v[:tokens], noise=0.01).value.item()
    u[tokens:], v[tokens:] = float("nan"), float("inf")
    _, drawn = uncounted(tokens, 600, k)
    if name not in ("tempered", "gaussian"):
        drawn = drawn.interleaved()
    found = estimator(drawn.fill(u[drawn.index]), drawn.fill(v[drawn.index]), noise=0.01)
    return found.value.item(), exact


@pytest.mark.parametrize("name", ["tempered", "gaussian"])
def test_padding_that_was_drawn_does_not_move_an_estimate_of_moments(name):
    found, exact = filled_and_exact(200, 512, name)
    assert found == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("name", ["club", "vub"])
def test_padding_that_was_drawn_leaves_each_half_its_share_of_tokens(name):
    """With all tokens in the first half these were 0 and 0.08, for 1.64 and 0.62."""
    found, exact = filled_and_exact(200, 512, name)
    assert found == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("name", ["l1out", "infonce"])
def test_padding_that_was_drawn_does_not_raise_an_estimate_of_mixtures(name):
    found, exact = filled_and_exact(200, 512, name)
    assert 0.4 * exact < found < 1.05 * exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_padding_is_filled_the_same_whatever_torchs_default_dtype_is(dtype):
    rows, is_token = torch.randn(6, 4), torch.tensor([1, 1, 0, 1, 0, 1]) > 0
    score = torch.rand(6)
    expected = sample_uncounted(is_token, score.clone(), 6).fill(rows.clone())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = sample_uncounted(is_token, score, 6).fill(rows.clone())
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


def test_the_models_own_random_numbers_are_not_drawn_from():
    model = with_lora(bert(), target_modules=["query"])
    before = torch.get_rng_state()
    with MIUBMonitor(model.eval(), every=1), torch.no_grad():
        model(token_ids(8, 12))
    assert torch.equal(torch.get_rng_state(), before)
