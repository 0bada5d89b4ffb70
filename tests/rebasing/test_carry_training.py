"""Training with increments in a carry: the same as dense, and nothing lost on the way."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import internals
import models
import pytest
import torch
from carry_runs import INPUTS, batches, optimizer_of, pairs, perceptron, train
from failing import FailAt
from torch import Tensor, nn

import scalora

ALL = 10_000  # more columns than any layer here has rank: nothing is ever cut


def effective(model: Any) -> dict[str, Tensor]:
    return {pair.name: pair.effective_weight() for pair in pairs(model)}


def test_dora_embedding_stays_plain_lora() -> None:
    # PEFT computes it from the factors alone: a carry would be left out of its norm.
    model = models.with_lora(models.Embedder(), target_modules=["tokens", "head"], use_dora=True)
    with pytest.warns(UserWarning, match=r"tokens \(DoraEmbeddingVariant is more than"):
        optimizer = optimizer_of(model)
    assert [pair.name for pair in optimizer.rebased_pairs] == ["head"]


# The same as dense


def small_llama() -> Any:
    torch.manual_seed(0)
    return models.llama(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )


@pytest.mark.parametrize("steps", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_carry_and_dense_give_the_same_losses(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 64, (steps, 8, 16), generator=generator)
    losses = {}
    for accumulator, options in (("dense", {}), ("carry", {"carry_rank": ALL}), ("none", {})):
        model = models.with_lora(small_llama(), r=4, lora_alpha=8, target_modules="all-linear")
        options = (
            {"rule": "none"} if accumulator == "none" else options | {"accumulator": accumulator}
        )
        # At three times this rate training is chaotic: a base that differs by a unit in the last
        # place ends as far from itself as carry does from dense.
        optimizer = scalora.create_scalora_optimizer(
            model, torch.optim.AdamW, lr=1e-3, **{"rule": "exact", **options}
        )
        found = []
        for ids in text:
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses[accumulator] = torch.tensor(found, dtype=torch.float64)
        if accumulator == "carry":
            assert optimizer.report().largest_cut < 1e-12
            assert min(row.columns for row in optimizer.report()) >= 48  # full rank
    difference = (losses["carry"] / losses["dense"] - 1).abs().max()
    assert difference < 1e-4
    assert (losses["none"] / losses["dense"] - 1).abs().max() > 100 * difference


@pytest.mark.parametrize("interval", [1, 3])
def test_carry_holds_what_dense_folds(interval: int) -> None:
    dense, carried = perceptron(), perceptron()
    base = {pair.name: pair.base_weight.clone() for pair in pairs(carried)}
    train(dense, optimizer_of(dense, accumulator="dense", interval=interval), batches(20))
    train(carried, optimizer_of(carried, carry_rank=ALL, interval=interval), batches(20))
    for one, other in zip(pairs(dense), pairs(carried), strict=True):
        assert torch.equal(other.base_weight, base[other.name])
        assert not other.was_rebased and one.was_rebased
        error = (other.effective_weight() - one.effective_weight()).norm()
        assert error < 1e-7 * other.learned_change().norm()  # `compress` says why not less
    spectra = scalora.delta_spectrum(carried)
    expected = scalora.delta_spectrum(dense, {f"{n}.weight": w for n, w in base.items()})
    for name, sigma in spectra.items():
        torch.testing.assert_close(sigma, expected[name], rtol=0, atol=1e-7)
        assert (sigma > 1e-6 * sigma[0]).sum() > 2  # beyond the adapter's rank


@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"lora_bias": True, "use_rslora": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_re_basing_into_a_carry_does_not_change_the_function(
    dtype: torch.dtype, config: dict[str, Any]
) -> None:
    model = perceptron(dtype, **config)
    optimizer = optimizer_of(model, carry_rank=ALL)
    # In bfloat16 two units in the last place of outputs between 2 and 4.
    atol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-5}[dtype]
    for batch in batches(12):
        batch = batch.to(dtype)
        optimizer.zero_grad()
        models.loss(model, batch).backward()
        before, weights = models.answers(model, batch), effective(model)
        internals.rebase(optimizer)
        torch.testing.assert_close(models.answers(model, batch), before, rtol=0, atol=atol)
        for name, weight in effective(model).items():
            # The carry is in float32 where the adapter is not: its sum does not round to bfloat16.
            # (PEFT's own product under DoRA does.)
            rounded = dtype == torch.bfloat16 and "use_dora" in config
            tolerance = 1e-12 if dtype == torch.float64 else 4e-3 if rounded else 2e-6
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=tolerance)
        optimizer.inner.step()
    assert all(pair.carry is not None and pair.carry.columns for pair in pairs(model))


def test_tied_weights_are_re_based_beside_each_other_and_stay_tied() -> None:
    base = models.gpt2().double()
    model = models.with_lora(base, target_modules=["wte", "lm_head", "c_attn"], fan_in_fan_out=True)
    optimizer = scalora.ScaLoRA(
        torch.optim.SGD(models.trainable(model), lr=0.3), model, rule="exact"
    )
    tied = optimizer.report()
    assert {row.layer: row.accumulator for row in tied} == {
        "transformer.wte": "carry",
        "lm_head": "carry",
        "transformer.h.0.attn.c_attn": "dense",
        "transformer.h.1.attn.c_attn": "dense",
    }
    embeddings, inputs = base.transformer.wte.get_base_layer().weight, models.token_ids(12, 9)
    start = embeddings.clone()
    for _ in range(4):
        optimizer.zero_grad()
        models.loss(model, inputs).backward()
        before = models.answers(model, inputs)
        internals.rebase(optimizer)
        torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-12)
        optimizer.inner.step()
    assert torch.equal(embeddings, start)
    assert base.lm_head.get_base_layer().weight is embeddings


# When the carry is full


def test_addresses_and_shapes_stay_while_columns_come_and_go() -> None:
    model = perceptron()
    optimizer = optimizer_of(model, carry_rank=8)
    train(model, optimizer, batches(2))
    carries = [pair.carry for pair in pairs(model)]
    places = [(c.up.data_ptr(), c.down.data_ptr(), c.capacity) for c in carries]
    counts = set()
    for batch in batches(12):
        train(model, optimizer, [batch])
        counts.add(carries[0].columns)
        for carry in carries:
            assert (carry.up[:, carry.columns :] == 0).all()
            assert (carry.down[carry.columns :] == 0).all()
    assert [(c.up.data_ptr(), c.down.data_ptr(), c.capacity) for c in carries] == places
    assert counts == {6, 8}  # then 6 are kept and 2 come


def test_energy_that_was_cut_is_the_energy_that_is_missing() -> None:
    whole, cut = perceptron(), perceptron()
    optimizers = [
        optimizer_of(whole, lr=0.1, carry_rank=ALL),
        optimizer_of(cut, lr=0.1, carry_rank=4, carry_tolerance=0.9),
    ]
    # Both take the same steps until something is cut, at the fourth re-basing: of the carry's four
    # columns two are kept, and those of the first re-basing were zero.
    for model, optimizer in zip((whole, cut), optimizers, strict=True):
        train(model, optimizer, batches(4))
    for one, other in zip(pairs(whole), pairs(cut), strict=True):
        missing = (one.carry.up @ one.carry.down - other.carry.up @ other.carry.down).square().sum()
        assert missing > 1e-12
        torch.testing.assert_close(other.carry.cut, missing, rtol=1e-6, atol=0)
        row = optimizers[1].report()[other.name]
        energy = (other.learned_change() / other.scaling).square().sum()
        assert row.cut == pytest.approx((missing / energy).item(), rel=1e-6)
    assert optimizers[0].report().largest_cut < 1e-14


def test_cutting_more_than_the_tolerance_warns_once_and_names_layer_and_remedy() -> None:
    model = perceptron()
    optimizer = optimizer_of(model, carry_rank=4, carry_tolerance=1e-12, lr=0.1)
    with pytest.warns(UserWarning, match=r"carry of '(first|second)'.*carry_rank") as caught:
        train(model, optimizer, batches(12))
    assert len([w for w in caught if "carry of" in str(w.message)]) == 1


def test_cutting_less_than_the_tolerance_says_nothing() -> None:
    model = perceptron()
    optimizer = optimizer_of(model, carry_rank=ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="save_pretrained")
        train(model, optimizer, batches(40))
    assert max(pair.carry.columns for pair in pairs(model)) >= 16


def test_auto_grows_until_little_is_cut() -> None:
    model = perceptron()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = optimizer_of(model, carry_tolerance=1e-10, lr=0.05)
        train(model, optimizer, batches(40))
    for row in optimizer.report():
        assert row.capacity > 8 * row.rank
        assert row.cut <= 1e-10


def test_auto_does_not_grow_where_nothing_would_be_cut() -> None:
    model = perceptron()
    optimizer = optimizer_of(model, carry_tolerance=0.5)
    train(model, optimizer, batches(40))
    assert {row.capacity for row in optimizer.report()} == {8}  # four times the rank


def test_hold_stops_re_basing_when_the_carry_is_full() -> None:
    model = perceptron()
    optimizer = optimizer_of(model, carry_rank=6, when_full="hold")
    train(model, optimizer, batches(3))
    assert set(optimizer.last_scaling) == {"first", "second"}
    carry = [pair.carry.up.clone() for pair in pairs(model)]
    losses = train(model, optimizer, batches(30))
    assert optimizer.last_scaling == {}
    assert optimizer.report().largest_cut == 0
    assert all(torch.equal(p.carry.up, old) for p, old in zip(pairs(model), carry, strict=True))
    assert losses[-1] < losses[0]


# All or nothing


def coordinates(model: Any, optimizer: scalora.ScaLoRA) -> dict[str, list[Tensor]]:
    """Everything of each layer that must move together."""
    everything = {}
    for pair in pairs(model):
        tensors = [pair.base_weight, pair.carry.up @ pair.carry.down]
        for p in (pair.P_parameter, pair.Q_parameter):
            state = optimizer.inner.state[p]
            tensors += [p, p.grad, state["exp_avg"], state["exp_avg_sq"]]
        everything[pair.name] = [t.detach().clone() for t in tensors]
    return everything


# Every second of the operations that write fails with one error, the others with the other; all
# of them with both in the slow ones.
ERRORS = (torch.OutOfMemoryError, KeyboardInterrupt)


@pytest.mark.parametrize(
    "thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dealt", "all"]
)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "steps, options",
    [(2, {"carry_rank": 8}), (4, {"carry_rank": 8})],
    ids=["append", "compress"],
)
def test_failure_at_any_operation_keeps_every_layer_whole(
    steps: int, options: dict[str, Any], error: type[BaseException], thorough: bool
) -> None:
    model = perceptron()
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, batches(steps))
    optimizer.zero_grad()
    models.loss(model, INPUTS).backward()
    template = model, optimizer
    weights, whole = effective(model), models.answers(model, INPUTS)

    def copied() -> tuple[Any, scalora.ScaLoRA]:
        gradients = [p.grad for p in model.parameters()]
        other = copy.deepcopy(template)
        for p, gradient in zip(other[0].parameters(), gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        return other

    twin, twin_optimizer = copied()
    old = coordinates(twin, twin_optimizer)
    with FailAt(-1, error) as counter:
        internals.rebase(twin_optimizer)
    new = coordinates(twin, twin_optimizer)
    columns = {pair.name: pair.carry.columns for pair in pairs(twin)}
    # What a compression cuts is little here, and all that may differ.
    torch.testing.assert_close(models.answers(twin, INPUTS), whole, rtol=0, atol=1e-4)

    outcomes = set()
    writing = max(1, counter.count - 200)
    first, every = (writing, 1) if thorough else (writing + ERRORS.index(error), len(ERRORS))
    for k in [*range(1, writing, 25), *range(first, counter.count + 1, every)]:
        broken, broken_optimizer = copied()
        with pytest.raises(error), FailAt(k, error):
            internals.rebase(broken_optimizer)
        for pair in pairs(broken):
            carry = pair.carry
            assert (carry.up[:, carry.columns :] == 0).all(), k
            torch.testing.assert_close(
                pair.effective_weight(), weights[pair.name], rtol=0, atol=1e-4
            )
        found = coordinates(broken, broken_optimizer)
        for pair in pairs(broken):
            tensors = found[pair.name]
            moved = not torch.equal(tensors[2], old[pair.name][2])
            expected = new if moved else old
            for one, other in zip(tensors[2:], expected[pair.name][2:], strict=True):
                assert torch.equal(one, other), f"{pair.name} torn at {k} of {counter.count}"
            if moved:
                assert torch.equal(tensors[1], new[pair.name][1])
                assert pair.carry.columns == columns[pair.name]
            outcomes.add(moved)
        # It can go on.
        train(broken, broken_optimizer, batches(1))
    assert outcomes == {True, False}


def test_non_finite_gradient_of_a_layer_adds_nothing_to_its_carry() -> None:
    model = perceptron()
    optimizer = optimizer_of(model, carry_rank=8)
    train(model, optimizer, batches(6))
    optimizer.zero_grad()
    models.loss(model, INPUTS).backward()
    first, second = pairs(model)
    first.P_parameter.grad[0, 0] = torch.nan
    before = [(p.effective_weight(), p.P_parameter.clone()) for p in (first, second)]
    internals.rebase(optimizer)
    assert torch.equal(first.P_parameter, before[0][1])
    assert not torch.equal(second.P_parameter, before[1][1])
    for pair, (weight, _) in zip((first, second), before, strict=True):
        assert pair.carry.up.isfinite().all() and pair.carry.down.isfinite().all()
        torch.testing.assert_close(pair.effective_weight(), weight, rtol=0, atol=1e-3)


def test_layer_with_a_merged_adapter_is_not_re_based() -> None:
    model = perceptron()
    optimizer = optimizer_of(model)
    train(model, optimizer, batches(3))
    models.loss(model, INPUTS).backward()
    model.merge_adapter()
    columns = [pair.carry.columns for pair in pairs(model)]
    optimizer.step()
    assert [pair.carry.columns for pair in pairs(model)] == columns


# Errors and reports


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"carry_rank": 3}, ValueError, r"carry_rank=3 is too small for 'first'.*4"),
        ({"carry_rank": 0}, ValueError, "carry_rank=0"),
        ({"carry_rank": "all"}, ValueError, "carry_rank='all'"),
        ({"carry_rank": 8.0}, TypeError, "carry_rank=8.0"),
        ({"when_full": "drop"}, ValueError, "when_full='drop'"),
        ({"carry_tolerance": 1.0}, ValueError, "carry_tolerance"),
        ({"accumulator": "sideways"}, ValueError, "accumulator='sideways'"),
    ],
)
def test_bad_option_is_refused_with_what_to_do(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        optimizer_of(perceptron(), **options)


def test_report_prints_every_layer_and_its_carry() -> None:
    model = perceptron(torch.float32)
    optimizer = optimizer_of(model, carry_rank=8)
    train(model, optimizer, [batch.float() for batch in batches(6)])
    report = optimizer.report()
    assert [row.layer for row in report] == ["first", "second"]
    assert report["first"].bytes == 4 * 8 * (24 + 32)
    assert (report["first"].columns, report["first"].capacity) == (8, 8)
    text = str(report)
    assert "first" in text and "carry" in text and f"{report['first'].cut:.1e}" in text
    with pytest.raises(KeyError):
        report["third"]


def test_compressions_of_many_layers_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(at_once: int) -> Any:
        monkeypatch.setattr("scalora.rebasing.accumulators.carry._NUMBERS_AT_ONCE", at_once)
        torch.manual_seed(0)
        base = nn.Sequential(*(nn.Linear(24, 24, bias=False).double() for _ in range(5)))
        model = models.with_lora(base, r=2, target_modules=[str(i) for i in range(5)])
        optimizer = optimizer_of(model, carry_rank=8)
        train(model, optimizer, batches(8))
        return model

    whole, parts = trained(1 << 26), trained(1000)
    for one, other in zip(pairs(whole), pairs(parts), strict=True):
        torch.testing.assert_close(one.carry.up.abs(), other.carry.up.abs(), rtol=0, atol=1e-9)


def test_accumulator_that_auto_picks_is_dense_for_plain_float_weights() -> None:
    model = perceptron()
    optimizer = optimizer_of(model, accumulator="auto")
    assert {row.accumulator for row in optimizer.report()} == {"dense"}


def test_compiled_model_sees_the_carry_come_and_change() -> None:
    plain, compiled = perceptron(), perceptron()
    losses = []
    for model, forward in (
        (plain, plain),
        (compiled, torch.compile(compiled, backend="aot_eager")),
    ):
        optimizer = optimizer_of(model, carry_rank=8)
        losses.append(train(forward, optimizer, batches(9)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert all(pair.carry.cut > 0 for pair in pairs(compiled))
