"""A carry in fewer bits than the adapter: what rounding cuts is kept by the adapter, or counted."""

from __future__ import annotations

from collections.abc import Iterator

import internals
import models
import pytest
import torch
from carry_runs import batches, optimizer_of, pairs, perceptron, train
from hypothesis import given
from hypothesis import strategies as st
from samplers import RANKS, SIDES, normal
from torch import Tensor

import scalora
from scalora.carry import absorbed, compress, frozen, rounded, rounding_energy
from scalora.peft_layers import LoRAPair

ALL = 10_000  # more columns than any layer here has rank: nothing is ever cut
NARROW = [torch.float16, torch.bfloat16]
DEFAULT = {"rule": "leak", "memory": 10, "interval": 5}  # freezes 41 % of P at a time


@pytest.fixture
def narrow() -> Iterator[None]:
    with internals.narrow_carries():
        yield


@given(
    m=SIDES,
    n=SIDES,
    r=RANKS,
    share=st.floats(0, 0.9),
    scale=st.floats(-6, 2),
    dtype=st.sampled_from(NARROW),
    seed=st.integers(0, 1000),
)
def test_what_rounding_cuts_stays_in_the_adapter(
    m: int, n: int, r: int, share: float, scale: float, dtype: torch.dtype, seed: int
) -> None:
    P, Q = 10**scale * normal(seed, 2, m, r), normal(seed + 1, 2, r, n)
    t = share * torch.linspace(0.1, 1, r, dtype=torch.float64)
    own = frozen(P, t * P, dtype)
    down, kept = rounded(Q, dtype), absorbed(Q, own.ratio, dtype)
    assert torch.equal(own.up, own.up.to(dtype).double())
    assert torch.equal(down, down.to(dtype).double())
    # All that is left is the product of two roundings.
    left = ((own.up - t * P) / (1 - t)) @ (down - Q)
    found = own.P @ kept + own.up @ down - P @ Q
    torch.testing.assert_close(found, left, rtol=0, atol=1e-13 * 10**scale)


def test_zero_factor_is_left_alone() -> None:
    P, Q = torch.zeros(1, 5, 2), torch.randn(1, 2, 4)
    own = frozen(P, torch.zeros_like(P), torch.float16)
    assert (own.up == 0).all() and (own.P == 0).all()
    assert torch.equal(absorbed(Q, own.ratio, torch.float16), Q)


@pytest.mark.parametrize("dtype", NARROW)
def test_no_number_of_an_increment_becomes_infinite(dtype: torch.dtype) -> None:
    P = torch.tensor([[[1e30], [1.0]]])
    own = frozen(P, 0.5 * P, dtype)
    assert own.up.isfinite().all()
    torch.testing.assert_close(own.up + own.P, P)


@pytest.mark.parametrize("dtype", NARROW)
def test_energy_of_a_rounding_is_that_of_the_difference(dtype: torch.dtype) -> None:
    up, down = normal(1, 2, 20, 6), 1e-2 * normal(2, 2, 6, 15)
    difference = up @ down - rounded(up, dtype) @ rounded(down, dtype)
    found = rounding_energy(up, down, dtype)
    torch.testing.assert_close(found, difference.square().sum((1, 2)), rtol=1e-9, atol=0)


def test_float16_holds_a_compressed_carry_to_far_less_than_is_cut() -> None:
    up, down = 1e-3 * normal(1, 2, 300, 64), 1e-2 * normal(2, 2, 64, 200)
    kept = compress(up, down, 48)
    lost = rounding_energy(kept.up, kept.down, torch.float16)
    assert (lost < 2e-7 * kept.energy).all()  # the default tolerance is 1e-4


def exact_weight(pair: LoRAPair) -> Tensor:
    """(m, n): what the layer stands for, summed in float64."""
    carry = pair.carry
    assert carry is not None
    product = pair.P_parameter.double() @ pair.Q_parameter.double()
    product = product + carry.up.double() @ carry.down.double()
    return (pair.base_weight.double() + pair.scaling * product).detach()


@pytest.mark.usefixtures("narrow")
def test_re_basing_into_a_narrow_carry_keeps_the_weights_to_float32s_rounding() -> None:
    model = perceptron(torch.float32)
    optimizer = optimizer_of(model, carry_rank=ALL, **DEFAULT)
    for pair in pairs(model):
        internals.carry_of(optimizer, pair)  # an empty one
    rebase, errors = internals.rebaser(optimizer).rebase, []

    def watched(*args: object) -> None:
        learned = [pair.P_parameter.norm() * pair.Q_parameter.norm() for pair in pairs(model)]
        before = [exact_weight(pair) for pair in pairs(model)]
        rebase(*args)
        for pair, old, size in zip(pairs(model), before, learned, strict=True):
            errors.append(float((exact_weight(pair) - old).norm() / (pair.scaling * size)))

    internals.rebaser(optimizer).rebase = watched
    train(model, optimizer, [batch.float() for batch in batches(50)])
    assert len(errors) == 20 and max(errors) < 2.0**-23
    for pair in pairs(model):
        carry = pair.carry
        assert carry is not None and carry.dtype == torch.float16 and carry.columns == 20
        assert (carry.up @ carry.down).float().norm() > 1e-2


@pytest.mark.usefixtures("narrow")
def test_what_a_compression_rounds_is_counted_with_what_it_cuts() -> None:
    model = perceptron(torch.float32)
    optimizer = optimizer_of(model, carry_rank=8, carry_tolerance=0.9, **DEFAULT)
    inputs = [batch.float() for batch in batches(60)]
    train(model, optimizer, inputs[:20])  # four re-basings fill it
    [first, _] = pairs(model)
    carry = first.carry
    assert carry is not None and carry.columns == 8 and carry.cut == 0
    whole = carry.up.double() @ carry.down.double()
    internals.make_room(optimizer, first, 2)
    missing = (whole - carry.up.double() @ carry.down.double()).square().sum()
    assert carry.columns == 6 and missing > 0
    torch.testing.assert_close(carry.cut.double(), missing, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "dtype, options, expected",
    [
        (torch.float32, DEFAULT, torch.float16),
        (torch.float32, {"rule": "exact"}, torch.float32),  # alpha beta may be anything
        (torch.bfloat16, DEFAULT, torch.float32),  # such factors cannot keep what rounding cuts
        (torch.float64, DEFAULT, torch.float64),
    ],
)
@pytest.mark.usefixtures("narrow")
def test_carry_is_narrow_where_the_adapter_keeps_what_rounding_cuts(
    dtype: torch.dtype, options: dict[str, object], expected: torch.dtype
) -> None:
    model = perceptron(dtype)
    optimizer = optimizer_of(model, carry_rank=8, **options)
    train(model, optimizer, [batch.to(dtype) for batch in batches(10)])
    assert {pair.carry.dtype for pair in pairs(model)} == {expected}
    assert {row.bytes for row in optimizer.report()} == {
        expected.itemsize * 8 * sum(pair.shape) for pair in pairs(model)
    }


def test_carry_beside_a_float_base_has_the_adapters_dtype() -> None:
    model = perceptron(torch.float32)
    train(model, optimizer_of(model, carry_rank=8, **DEFAULT), [b.float() for b in batches(10)])
    assert {pair.carry.dtype for pair in pairs(model)} == {torch.float32}


@pytest.mark.usefixtures("narrow")
def test_second_stage_with_another_rule_widens_the_carry() -> None:
    model = perceptron(torch.float32)
    inputs = [batch.float() for batch in batches(20)]
    train(model, optimizer_of(model, carry_rank=8, **DEFAULT), inputs[:10])
    before = models.answers(model, inputs[0])
    optimizer_of(model, carry_rank=8)
    assert torch.equal(models.answers(model, inputs[0]), before)
    train(model, optimizer_of(model, carry_rank=8), inputs[10:])
    assert {pair.carry.dtype for pair in pairs(model)} == {torch.float32}


@pytest.mark.usefixtures("narrow")
def test_forward_pass_keeps_the_carry_as_it_is_stored() -> None:
    model = perceptron(torch.float32)
    train(model, optimizer_of(model, carry_rank=8, **DEFAULT), [b.float() for b in batches(10)])
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batches(1)[0].float())
    carries = {pair.carry.up.data_ptr() for pair in pairs(model)}
    assert carries <= {tensor.data_ptr() for tensor in kept}  # no copy in the compute dtype


def test_exported_adapter_is_the_model_in_training(tmp_path: object) -> None:
    from peft import PeftModel

    model = perceptron(torch.float32)
    train(model, optimizer_of(model, carry_rank=8, **DEFAULT), [b.float() for b in batches(30)])
    scalora.save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(perceptron(torch.float32).unload(), tmp_path)
    inputs = batches(1)[0].float()
    torch.testing.assert_close(
        models.answers(loaded, inputs), models.answers(model, inputs), rtol=0, atol=1e-6
    )
