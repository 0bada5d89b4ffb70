"""Renewal: a column is frozen without a trace in the function, and begins anew."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import OPTIMIZERS, OptimizerCase
from safetensors.torch import load_file
from test_layers import CASES, TOLERANCE, Case
from test_optimizer import FailAt
from torch import Tensor, nn

import scalora
from scalora.peft_layers import LoRAPair, lora_pairs
from scalora.renewal import due_columns

LIFETIME = 6
R = 3
MOMENTA = {"exp_avg", "momentum_buffer", "grad_avg"}  # torch's names of states with a direction


def perceptron(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    options = {"r": R, "target_modules": ["first", "second"], **config}
    return models.with_lora(
        models.Perceptron().to(dtype), autocast_adapter_dtype=False, **options
    ).to(dtype)


def renewing(model: Any, *, lr: float | Tensor = 1e-2, **options: Any) -> scalora.ScaLoRA:
    inner = torch.optim.AdamW(models.trainable(model), lr=lr)
    return scalora.ScaLoRA(inner, model, **{"rule": "renew", "lifetime": LIFETIME, **options})


def backward(model: nn.Module, step: int) -> None:
    dtype = next(model.parameters()).dtype
    models.loss(model, (models.vectors(16, 12) * (1 + step / 10)).to(dtype)).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        value = models.loss(model, (models.vectors(16, 12) * (1 + step / 10)).to(dtype))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def renew_first_column(optimizer: scalora.ScaLoRA) -> None:
    """Of every layer, without a step of the inner optimizer."""
    lifetime = optimizer.options.lifetime
    assert optimizer._rebaser.renew(optimizer.inner, lifetime - 1, lifetime, 1)


def columns(pair: LoRAPair) -> tuple[Tensor, Tensor]:
    """P and Q with the rank's axis in front: (r, m) and (r, n); copies."""
    P, Q = pair.P_parameter.detach().flatten(1), pair.Q_parameter.detach().flatten(1)
    return P.T.clone(), Q.clone()


def renewed_columns(before: LoRAPairs, after: LoRAPairs) -> dict[str, set[int]]:
    """Layer -> the columns of P that are zero now and were not."""
    return {
        name: {j for j, column in enumerate(P) if not column.any() and before[name][0][j].any()}
        for name, (P, _) in after.items()
    }


LoRAPairs = dict[str, tuple[Tensor, Tensor]]


def all_columns(optimizer: scalora.ScaLoRA) -> LoRAPairs:
    return {pair.name: columns(pair) for pair in optimizer.rebased_pairs}


def renewals(model: nn.Module, optimizer: scalora.ScaLoRA, steps: range) -> dict[int, Any]:
    """Number of steps done -> layer -> the columns renewed right after."""
    found = {}
    for step in steps:
        before = all_columns(optimizer)
        count = optimizer.rebase_count
        train(model, optimizer, range(step, step + 1))
        if optimizer.rebase_count > count:
            found[step + 1] = renewed_columns(before, all_columns(optimizer))
    return found


# When


@given(st.integers(1, 12), st.integers(1, 60), st.lists(st.integers(1, 90), max_size=12))
def test_due_columns_are_those_whose_time_has_come_since_the_last_ask(
    rank: int, lifetime: int, gaps: list[int]
) -> None:
    before = 0
    for gap in gaps:
        now = before + gap
        expected = set()
        for i in range(before * rank // lifetime + 1, now * rank // lifetime + 1):
            if i >= rank:  # the end of the i-th part, r of which are a lifetime
                expected.add(i % rank)
        assert due_columns(rank, lifetime, before, now) == sorted(expected)
        before = now


@given(st.integers(1, 12), st.integers(1, 60), st.lists(st.integers(0, 60), max_size=30))
def test_columns_are_renewed_equally_often_however_the_asks_are_split(
    rank: int, lifetime: int, gaps: list[int]
) -> None:
    counts, before = Counter(range(rank)), 0  # one too many, each
    for gap in gaps:
        now = before + min(gap, lifetime)
        counts.update(due_columns(rank, lifetime, before, now))
        before = now
    assert max(counts.values()) - min(counts.values()) <= 1
    assert counts.total() - rank == max(0, (before - lifetime) * rank // lifetime + 1)


@given(st.integers(1, 12), st.integers(1, 60))
def test_asked_at_every_step_a_column_lives_for_exactly_its_lifetime(
    rank: int, lifetime: int
) -> None:
    times: dict[int, list[int]] = {j: [] for j in range(rank)}
    for now in range(1, 4 * lifetime + 1):
        for j in due_columns(rank, lifetime, now - 1, now):
            times[j].append(now)
    for own in times.values():
        assert own[0] >= lifetime
        assert {later - earlier for earlier, later in pairwise(own)} <= {lifetime}
    merged = sorted(time for own in times.values() for time in own)
    gaps = {later - earlier for earlier, later in pairwise(merged)}
    assert gaps <= {lifetime // rank, -(-lifetime // rank)}


def test_columns_take_turns_from_the_end_of_the_first_lifetime_on() -> None:
    model = perceptron()
    found = renewals(model, renewing(model), range(15))
    both = {6: {0}, 8: {1}, 10: {2}, 12: {0}, 14: {1}}
    assert found == {step: {"first": own, "second": own} for step, own in both.items()}


def test_layers_of_different_rank_keep_their_own_time() -> None:
    model = perceptron(rank_pattern={"first": 2})
    found = renewals(model, renewing(model), range(12))
    assert {step: own["first"] for step, own in found.items() if own["first"]} == {
        6: {0}, 9: {1}, 12: {0},
    }  # fmt: skip
    assert {step: own["second"] for step, own in found.items() if own["second"]} == {
        6: {0}, 8: {1}, 10: {2}, 12: {0},
    }  # fmt: skip


def test_interval_lets_columns_wait_for_its_multiples() -> None:
    model = perceptron()
    found = renewals(model, renewing(model, interval=5), range(21))
    assert {step: own["first"] for step, own in found.items()} == {
        10: {0, 1, 2}, 15: {0, 1}, 20: {0, 1, 2},
    }  # fmt: skip


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_nothing_is_renewed_once_the_learning_rate_has_decayed(kind: Any) -> None:
    model = perceptron()
    optimizer = renewing(model, lr=kind(1e-2))
    found = {}
    for step, share in enumerate([1, 1, 1, 1, 1, 1, 1, 0.31, 0.29, 0.29, 0.29, 0.29, 1, 1]):
        optimizer.param_groups[0]["lr"] = kind(1e-2 * share)
        found |= renewals(model, optimizer, range(step, step + 1))
    # What was due meanwhile is not made up for.
    assert {step: own["first"] for step, own in found.items()} == {6: {0}, 8: {1}, 14: {1}}


def test_a_warm_up_is_not_taken_for_decay() -> None:
    model = perceptron()
    optimizer = renewing(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    counts = []
    for step in range(8):
        train(model, optimizer, range(step, step + 1))
        schedule.step()
        counts.append(optimizer.rebase_count)
    assert counts == [0, 0, 0, 0, 0, 1, 1, 2]


# The function


@pytest.mark.filterwarnings("ignore:1 LoRA layers stay plain LoRA")
@pytest.mark.parametrize("accumulator", ["dense", "carry"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_renewal_does_not_change_the_function(case: Case, accumulator: str) -> None:
    dtype = torch.float64
    model, inputs = case.model(dtype), case.batch(dtype)
    optimizer = renewing(model, accumulator=accumulator)
    models.train(model, optimizer, inputs, steps=3)
    models.loss(model, inputs).backward()
    before, old = models.answers(model, inputs), all_columns(optimizer)
    renew_first_column(optimizer)
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=TOLERANCE[dtype])
    assert renewed_columns(old, all_columns(optimizer)) == {
        pair.name: {0} for pair in optimizer.rebased_pairs
    }


def test_in_float32_the_function_is_kept_to_round_off() -> None:
    model = perceptron()
    optimizer = renewing(model)
    inputs = models.vectors(16, 12)
    train(model, optimizer, range(3))
    before, base = models.answers(model, inputs), optimizer.rebased_pairs[0].base_weight.clone()
    renew_first_column(optimizer)
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=2e-6)
    assert (optimizer.rebased_pairs[0].base_weight - base).abs().max() > 1e-3


@pytest.mark.parametrize("half_adapters", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_weight_moves_by_one_unit_in_the_last_place_at_most(
    dtype: torch.dtype, half_adapters: bool
) -> None:
    torch.manual_seed(0)
    model = models.with_lora(
        models.Perceptron().to(dtype),
        autocast_adapter_dtype=not half_adapters,
        target_modules=["first", "second"],
        init_lora_weights=False,
    )
    optimizer = renewing(model)
    models.loss(model, models.vectors(16, 12).to(dtype)).backward()
    old = {pair.name: pair.effective_weight() for pair in optimizer.rebased_pairs}
    renew_first_column(optimizer)
    for pair in optimizer.rebased_pairs:
        unit = torch.finfo(dtype).eps * pair.base_weight.float().abs().clamp_min(2.0**-14)
        difference = (pair.effective_weight() - old[pair.name]).abs()
        assert (difference <= 1.001 * unit + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_carry_takes_the_frozen_column_as_it_is_and_grows_by_one(dtype: torch.dtype) -> None:
    model = perceptron(dtype)
    optimizer = renewing(model, accumulator="carry")
    bases = [pair.base_weight.clone() for pair in optimizer.rebased_pairs]
    train(model, optimizer, range(3))
    for count in range(1, 4):
        backward(model, count)
        old = all_columns(optimizer)
        j = count - 1
        assert optimizer._rebaser.renew(optimizer.inner, 3 + 2 * count, 4 + 2 * count, count)
        for pair, base in zip(optimizer.rebased_pairs, bases, strict=True):
            assert pair.carry is not None and pair.carry.columns == count
            assert torch.equal(pair.carry.used_up[:, -1], old[pair.name][0][j].float())
            assert torch.equal(pair.carry.used_down[-1], old[pair.name][1][j].float())
            assert torch.equal(pair.base_weight, base)


def test_a_carry_on_hold_is_filled_to_its_last_column() -> None:
    model = perceptron()
    optimizer = renewing(model, accumulator="carry", carry_rank=2 * R, when_full="hold")
    train(model, optimizer, range(30))
    assert [pair.carry.columns for pair in optimizer.rebased_pairs] == [2 * R, 2 * R]


@pytest.mark.parametrize("when_full", ["compress", "fold"])
def test_a_full_carry_makes_room_and_the_function_stays(when_full: str) -> None:
    model = perceptron(torch.float64)
    optimizer = renewing(
        model, accumulator="carry", carry_rank=2 * R, when_full=when_full, carry_tolerance=0.9
    )
    train(model, optimizer, range(6 + 2 * (2 * R - 1)))
    assert {pair.carry.columns for pair in optimizer.rebased_pairs} == {2 * R}
    inputs = models.vectors(16, 12).double()
    before = models.answers(model, inputs)
    assert optimizer._rebaser.renew(optimizer.inner, 17, 18, 9)
    kept = {"compress": 2 * R - 1, "fold": 0}[when_full]
    assert {pair.carry.columns for pair in optimizer.rebased_pairs} == {kept + 1}
    cut = sum(float(pair.carry.cut) for pair in optimizer.rebased_pairs)
    moved = (models.answers(model, inputs) - before).abs().max()
    assert moved < (1e-12 if when_full == "fold" else 10 * cut**0.5 + 1e-12)


def test_the_whole_change_outgrows_the_adapters_rank() -> None:
    model = perceptron()
    base = {f"{p.name}.weight": p.base_weight.clone() for p in lora_pairs(model, "default")}
    losses = train(model, renewing(model), range(40))
    assert losses[-1] < losses[0]
    spectrum = scalora.delta_spectrum(model, base)["first"]
    assert (spectrum > 1e-3 * spectrum[0]).sum() > 2 * R


# The new column


@pytest.mark.parametrize("name", ["linear", "Conv1D in GPT-2", "conv2d 3x3", "embedding"])
def test_a_new_column_begins_as_loras_and_leaves_the_others_to_the_bit(name: str) -> None:
    case = CASES[name]
    model, inputs = case.model(), case.batch()
    optimizer = renewing(model)
    models.train(model, optimizer, inputs, steps=3)
    models.loss(model, inputs).backward()
    old = all_columns(optimizer)
    renew_first_column(optimizer)
    for layer, (P, Q) in all_columns(optimizer).items():
        old_P, old_Q = old[layer]
        assert not P[0].any()
        torch.testing.assert_close(Q[0].norm(), old_Q[0].norm())
        # n numbers drawn evenly: a cosine of 0.8 with the old ones is many deviations off.
        assert torch.cosine_similarity(Q[0], old_Q[0], dim=0).abs() < 0.8
        assert torch.equal(P[1:], old_P[1:])
        assert torch.equal(Q[1:], old_Q[1:])


def test_new_columns_differ_between_layers_turns_and_seeds() -> None:
    def drawn(seed: int, count: int) -> list[Tensor]:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        model = models.with_lora(base, target_modules=["0", "1"])
        optimizer = renewing(model, seed=seed)
        model(models.vectors(16, 12)).square().mean().backward()
        optimizer._rebaser.renew(optimizer.inner, LIFETIME - 1, LIFETIME, count)
        return [Q[0] / Q[0].norm() for _, Q in all_columns(optimizer).values()]

    found = [*drawn(0, 1), *drawn(0, 2), *drawn(1, 1)]
    cosines = torch.stack(found) @ torch.stack(found).T
    assert (cosines - torch.eye(len(found))).abs().max() < 0.95
    for again, first in zip(drawn(0, 1), found, strict=False):
        assert torch.equal(again, first)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_momenta_of_the_column_are_forgotten_and_second_moments_stay(case: OptimizerCase) -> None:
    model = perceptron()
    inner = case.cls(models.trainable(model), lr=1e-2, **case.options)
    optimizer = scalora.ScaLoRA(inner, model, rule="renew", lifetime=LIFETIME)
    train(model, optimizer, range(4))
    backward(model, 4)
    states = {p: copy.deepcopy(inner.state[p]) for p in models.trainable(model)}
    renew_first_column(optimizer)
    for pair in optimizer.rebased_pairs:
        for p, axis in ((pair.P_parameter, 1), (pair.Q_parameter, 0)):
            assert inner.state[p].keys() == states[p].keys()
            for name, old in states[p].items():
                expected = old
                if name in MOMENTA and isinstance(old, Tensor):
                    assert old.select(axis, 0).any()
                    expected = old.clone()
                    expected.select(axis, 0).zero_()
                torch.testing.assert_close(inner.state[p][name], expected, rtol=0, atol=0)


def test_a_new_column_learns() -> None:
    model = perceptron()
    optimizer = renewing(model)
    train(model, optimizer, range(LIFETIME))
    for pair in optimizer.rebased_pairs:
        assert not columns(pair)[0][0].any()
    train(model, optimizer, range(LIFETIME, LIFETIME + 1))
    for pair in optimizer.rebased_pairs:
        assert columns(pair)[0][0].any()


# What goes wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("accumulator", ["dense", "carry"])
@pytest.mark.parametrize("broken", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_layer_that_is_not_finite_keeps_it_to_itself(
    broken: str, accumulator: str, dtype: torch.dtype, value: float
) -> None:
    model = perceptron(dtype)
    optimizer = renewing(model, accumulator=accumulator)
    train(model, optimizer, range(3))
    backward(model, 3)
    first, second = optimizer.rebased_pairs
    bases = [pair.base_weight.clone() for pair in (first, second)]
    with torch.no_grad():
        getattr(first.module, broken)["default"].weight[0, 0] = value
    renew_first_column(optimizer)
    assert torch.equal(first.base_weight, bases[0])
    if accumulator == "dense":
        assert not torch.equal(second.base_weight, bases[1])
    else:
        assert not first.carry.used_up.any()
        assert first.carry.used_down.isfinite().all()
        assert second.carry.used_up.any()


def test_a_layer_without_a_gradient_keeps_its_columns() -> None:
    model = perceptron()
    optimizer = renewing(model)
    train(model, optimizer, range(LIFETIME - 1))
    optimizer.zero_grad()
    backward(model, LIFETIME - 1)
    first, second = optimizer.rebased_pairs
    first.P_parameter.grad = first.Q_parameter.grad = None
    old = all_columns(optimizer)
    optimizer.step()
    assert renewed_columns(old, all_columns(optimizer)) == {first.name: set(), second.name: {0}}
    assert torch.equal(columns(first)[1], old[first.name][1])


@pytest.mark.parametrize(
    "dtype, accumulator",
    [(torch.float32, "dense"), (torch.bfloat16, "dense"), (torch.float32, "carry")],
)
def test_failure_at_any_operation_leaves_every_layer_whole(
    dtype: torch.dtype, accumulator: str
) -> None:
    model = perceptron(dtype)
    optimizer = renewing(model, accumulator=accumulator)
    train(model, optimizer, range(3))
    backward(model, 3)

    def copied() -> tuple[Any, scalora.ScaLoRA]:
        twins = copy.deepcopy((model, optimizer))
        for p, q in zip(model.parameters(), twins[0].parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        return twins

    def state(model: Any, optimizer: scalora.ScaLoRA) -> dict[str, list[Tensor]]:
        found = {}
        for pair in optimizer.rebased_pairs:
            tensors = [pair.base_weight]
            if pair.carry is not None:
                tensors += [pair.carry.used_up, pair.carry.used_down]
            for p in (pair.P_parameter, pair.Q_parameter):
                tensors += [p, p.grad, *optimizer.inner.state[p].values()]
            found[pair.name] = [t.detach().clone() for t in tensors]
        return found

    def same(left: list[Tensor], right: list[Tensor]) -> bool:
        if len(left) != len(right):  # an empty carry is as good as none
            return False
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

    if accumulator == "carry":
        for pair in optimizer.rebased_pairs:
            pair.ensure_carry(8 * R)
    old = state(model, optimizer)
    twins = copied()
    with FailAt(-1, RuntimeError) as counter:
        renew_first_column(twins[1])
    new = state(*twins)
    outcomes = set()
    # What comes before the writing changes nothing that lasts: a sample of it will do.
    writing = counter.count - 70
    for k in [*range(1, writing, 15), *range(writing, counter.count + 1)]:
        twins = copied()
        with pytest.raises(RuntimeError), FailAt(k, RuntimeError):
            renew_first_column(twins[1])
        for name, tensors in state(*twins).items():
            is_old, is_new = same(tensors, old[name]), same(tensors, new[name])
            assert is_old or is_new, f"{name} torn at operation {k} of {counter.count}"
            outcomes.add("old" if is_old else "new")
    assert outcomes == {"old", "new"}


# Replicas, copies, resumption


def everything(model: Any, optimizer: scalora.ScaLoRA) -> dict[str, Tensor]:
    found = models.bits(model)
    for pair in optimizer.rebased_pairs:
        if pair.carry is not None:
            found |= {
                f"{pair.name} up": pair.carry.used_up.clone(),
                f"{pair.name} down": pair.carry.used_down.clone(),
            }
    for i, tensor in enumerate(optimizer.kept_tensors()):
        found[f"kept {i}"] = tensor.detach().clone()
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "dense": (torch.float32, {}),
    "dense, bfloat16": (torch.bfloat16, {}),
    "compensated": (torch.bfloat16, {"rounding": "compensated"}),
    "carry": (torch.float32, {"accumulator": "carry"}),
    "carry that is compressed": (
        torch.float32,
        {"accumulator": "carry", "carry_rank": 2 * R, "carry_tolerance": 0.9},
    ),
    "interval": (torch.float32, {"interval": 4}),
    "calibrating": (torch.float32, {"calibration": 14}),
    "calibrating in a carry": (torch.float32, {"calibration": 14, "accumulator": "carry"}),
    "calibrated": (torch.float32, {"calibration": 5}),
}
kinds = pytest.mark.parametrize(("dtype", "options"), KINDS.values(), ids=KINDS.keys())


@kinds
def test_two_replicas_stay_identical(dtype: torch.dtype, options: dict[str, Any]) -> None:
    found = []
    for _ in range(2):
        model = perceptron(dtype)
        optimizer = renewing(model, **options)
        torch.manual_seed(len(found))  # the global generator has no part in it
        train(model, optimizer, range(16))
        assert optimizer.rebase_count > 1
        found.append(everything(model, optimizer))
    assert_same(*found)


@kinds
@pytest.mark.parametrize("stop", [3, 9, 11])
def test_state_dict_resumes_to_the_same_bits(
    dtype: torch.dtype, options: dict[str, Any], stop: int
) -> None:
    model = perceptron(dtype)
    optimizer = renewing(model, **options)
    train(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    expected = train(model, optimizer, range(stop, 20))
    twin = perceptron(dtype)
    resumed = renewing(twin, **options)
    resumed.load_state_dict(saved["optimizer"])
    twin.load_state_dict(saved["model"])
    assert train(twin, resumed, range(stop, 20)) == expected
    assert_same(everything(model, optimizer), everything(twin, resumed))


@pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone")
@kinds
def test_training_state_resumes_to_the_same_bits(
    dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    model = perceptron(dtype)
    optimizer = renewing(model, **options)
    train(model, optimizer, range(9))
    adapter = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}
    inner = copy.deepcopy(optimizer.inner.state_dict())
    scalora.save_training_state(optimizer, tmp_path)
    expected = train(model, optimizer, range(9, 20))
    twin = perceptron(dtype)
    twin.load_state_dict(adapter, strict=False)
    resumed = renewing(twin, **options)
    resumed.inner.load_state_dict(inner)
    scalora.load_training_state(resumed, tmp_path)
    assert train(twin, resumed, range(9, 20)) == expected
    assert_same(everything(model, optimizer), everything(twin, resumed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"lifetime": 7}, "lifetime"), ({"calibration": 0}, "calibration"), ({"seed": 1}, "seed")],
)
def test_the_state_of_another_kind_of_renewal_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = perceptron()
    options = {"calibration": 14}
    optimizer = renewing(model, **options)
    train(model, optimizer, range(8))
    scalora.save_training_state(optimizer, tmp_path)
    other = renewing(model, **{**options, **changed})
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        scalora.load_training_state(other, tmp_path)
    assert not other.state and other.rebase_count == 0 and other.step_factor is None


@kinds
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_by_itself(clone: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = perceptron(dtype)
    optimizer = renewing(model, **options)
    train(model, optimizer, range(9))
    twin, other = clone((model, optimizer))
    before = everything(model, optimizer)
    losses = train(twin, other, range(9, 16))
    assert_same(before, everything(model, optimizer))
    assert train(model, optimizer, range(9, 16)) == losses
    assert_same(everything(model, optimizer), everything(twin, other))


def test_saved_adapter_brings_the_base_from_the_first_renewal_on(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = renewing(model)
    for steps, brought in ((range(LIFETIME - 1), 0), (range(LIFETIME - 1, LIFETIME), 2)):
        train(model, optimizer, steps)
        model.save_pretrained(tmp_path)
        names = load_file(tmp_path / "adapter_model.safetensors")
        assert len([name for name in names if "base_layer" in name]) == brought
