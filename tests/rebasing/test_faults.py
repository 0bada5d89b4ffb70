"""A step that fails, at every one of its operations in turn: what it leaves is whole."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import internals
import models
import pytest
import torch
import training
from failing import FailAt
from torch import Tensor, nn
from training import effective_weights

import scalora
from scalora.fold import dense, fold
from scalora.peft_layers import LoRAPair
from scalora.rebasing.accumulators import carry, commit
from scalora.step_length import calibration

INTERVAL = 4
# The modules that write what a step leaves behind; by import, so that none can be missed.
WRITING = frozenset(module.__file__ for module in (carry, commit, calibration, dense))


@dataclass(frozen=True)
class Case:
    """A step that re-bases, the ``steps``-th after the first."""

    steps: int
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-6  # of an element of the effective weight, far below a step's 1e-2

    def prepared(self) -> tuple[Any, scalora.ScaLoRA]:
        """With the gradients of the step to come."""
        torch.manual_seed(0)
        model = models.with_lora(
            models.Perceptron(6, 10, 4).to(self.dtype),
            autocast_adapter_dtype=False,
            r=2,
            target_modules=["first", "second"],
        ).to(self.dtype)
        # Without decay a parameter is written once a step.
        options = {"rule": "auto", **self.options}
        optimizer = training.optimizer_of(model, adamw={"weight_decay": 0}, **options)
        models.train(model, optimizer, self.inputs, self.steps)
        optimizer.zero_grad()
        models.loss(model, self.inputs).backward()
        return model, optimizer

    @property
    def inputs(self) -> Tensor:
        return models.vectors(16, 6).to(self.dtype)


DEFAULT = {"interval": INTERVAL}
SCALES = {"rule": "exact"}
COMPENSATED = {"rounding": "compensated"}
CASES = {
    "default": Case(INTERVAL - 1, DEFAULT),
    "default, bfloat16": Case(INTERVAL - 1, DEFAULT, torch.bfloat16, 2e-3),
    "default, compensated": Case(INTERVAL - 1, {**DEFAULT, **COMPENSATED}, torch.bfloat16, 2e-3),
    "default, carry": Case(INTERVAL - 1, {**DEFAULT, "accumulator": "carry"}),
    # The fifth increment of two columns finds it full; none of the layers has a higher rank.
    "default, full carry": Case(9, {"interval": 2, "accumulator": "carry", "carry_rank": 8}),
    "scaling": Case(3, SCALES),
}
ERRORS = (torch.OutOfMemoryError, KeyboardInterrupt, torch.linalg.LinAlgError)


def copied(template: tuple[Any, scalora.ScaLoRA]) -> tuple[Any, scalora.ScaLoRA]:
    twin = copy.deepcopy(template)
    for p, q in zip(template[0].parameters(), twin[0].parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    return twin


class WholeStep:
    """What a step that does not fail does, and all that one that does may leave of it.

    Attributes:
        operations: how many.
        inner: which of them is the first of the inner optimizer's; ``taken``: after its last.
        before, after: layer -> effective weight.
        between: layer -> the weights with one factor stepped by the inner optimizer, or both.
    """

    def __init__(self, template: tuple[Any, scalora.ScaLoRA]) -> None:
        _, optimizer = copied(template)
        found: list[int] = []
        optimizer.inner.register_step_pre_hook(lambda *_: found.append(counter.count))
        optimizer.inner.register_step_post_hook(lambda *_: found.append(counter.count))
        with FailAt(-1, RuntimeError) as counter:
            optimizer.step()
        self.operations, (self.inner, self.taken) = counter.count, found

        _, optimizer = copied(template)
        self.before = effective_weights(optimizer)
        seen: list[list[tuple[Tensor, Tensor, Tensor]]] = []
        optimizer.inner.register_step_pre_hook(lambda *_: seen.append(_parts(optimizer)))
        optimizer.inner.register_step_post_hook(lambda *_: seen.append(_parts(optimizer)))
        optimizer.step()
        self.after = effective_weights(optimizer)
        self.between = {
            pair.name: [rest + pair.scaling * P @ Q for P in (P0, P1) for Q in (Q0, Q1)]
            for pair, (rest, P0, Q0), (_, P1, Q1) in zip(
                optimizer.rebased_pairs, *seen, strict=True
            )
        }


def _parts(optimizer: scalora.ScaLoRA) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every layer: base and carry, P, Q; copies in float32."""
    found = []
    for pair in optimizer.rebased_pairs:
        P, Q = (factor.detach().float().clone() for factor in (pair.P_parameter, pair.Q_parameter))
        found.append((pair.effective_weight() - pair.scaling * P @ Q, P, Q))
    return found


def check(case: Case, step: WholeStep, optimizer: scalora.ScaLoRA, where: str) -> str:
    """What of the step a failure has left: "nothing", "all", or "part" of the inner optimizer's."""
    found = effective_weights(optimizer)

    def like(expected: dict[str, Tensor]) -> bool:
        return all(
            torch.allclose(found[name], expected[name], rtol=0, atol=case.tolerance)
            for name in expected
        )

    if like(step.before):
        return "nothing"
    if like(step.after):
        return "all"
    # With calibration the factors are put back, so nothing is left half-stepped.
    assert not optimizer.options.calibration_steps, where
    for name, weight in found.items():
        assert any(
            torch.allclose(weight, torn, rtol=0, atol=case.tolerance) for torn in step.between[name]
        ), f"{name} {where}"
    return "part"


def took_in(before: scalora.ScaLoRA, after: scalora.ScaLoRA) -> bool:
    """Whether a base weight or a carry is another."""

    def columns(pair: LoRAPair) -> int:
        return 0 if pair.carry is None else pair.carry.columns

    return any(
        not torch.equal(one.base_weight, other.base_weight) or columns(one) != columns(other)
        for one, other in zip(before.rebased_pairs, after.rebased_pairs, strict=True)
    )


def swept(operations: int, error: type[BaseException], thorough: bool) -> range:
    """The operations that fail with an error: dealt out to the errors in turn, or all of them."""
    if thorough:
        return range(1, operations + 1)
    return range(1 + ERRORS.index(error), operations + 1, len(ERRORS))


@pytest.mark.parametrize(
    "thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dealt", "all"]
)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", [name for name in CASES if "compensated" not in name])
def test_failure_at_any_operation_of_a_step_leaves_the_effective_weight_whole(
    name: str, error: type[BaseException], thorough: bool
) -> None:
    case = CASES[name]
    template = case.prepared()
    step = WholeStep(template)
    for layer, weight in step.after.items():
        assert (weight - step.before[layer]).abs().max() > 2 * case.tolerance
    left = set()
    for i, k in enumerate(swept(step.operations, error, thorough)):
        model, optimizer = copied(template)
        with pytest.raises(error), FailAt(k, error):
            optimizer.step()
        where = f"after operation {k} of {step.operations}"
        left.add(check(case, step, optimizer, where))
        if took_in(template[1], optimizer):
            # The attempt counts: the next one must not draw the same noise.
            assert optimizer.rebase_count == template[1].rebase_count + 1, where
            assert "save_pretrained" in vars(model), where
        if i % 50 == 0:  # and it can go on
            steps = internals.run_state(optimizer).steps
            losses = models.train(model, optimizer, case.inputs, 2)
            assert all(map(math.isfinite, losses))
            assert internals.run_state(optimizer).steps == steps + 2
    assert left >= {"nothing", "all"}


@contextlib.contextmanager
def interrupted(k: int) -> Iterator[list[int]]:
    """Ctrl-C before the k-th line of what writes; the number of lines run is what it yields."""
    lines = [0]

    def at_line(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            lines[0] += 1
            if lines[0] == k:
                raise KeyboardInterrupt
        return at_line

    def at_call(frame: Any, event: str, _: Any) -> Any:
        writes = frame.f_code.co_filename in WRITING
        return at_line if writes else None

    sys.settrace(at_call)
    try:
        yield lines
    finally:
        sys.settrace(None)


@pytest.mark.parametrize("name", ["default", "default, compensated", "default, full carry"])
def test_interrupt_between_any_two_lines_leaves_the_effective_weight_whole(name: str) -> None:
    case = CASES[name]
    template = case.prepared()
    step = WholeStep(template)
    with interrupted(-1) as lines:
        copied(template)[1].step()
    [total] = lines
    left = set()
    for k in range(1, total + 1):
        _, optimizer = copied(template)
        # An interrupt right before the end of a `with torch.no_grad()` leaves gradients off.
        with torch.enable_grad(), pytest.raises(KeyboardInterrupt), interrupted(k):
            optimizer.step()
        left.add(check(case, step, optimizer, f"before line {k} of {total}"))
    assert left >= {"nothing", "all"}


def test_first_step_that_fails_anywhere_can_be_followed_by_others() -> None:
    case = Case(0, DEFAULT)
    template = case.prepared()
    operations = WholeStep(template).operations
    for k in range(1, operations + 1):
        model, optimizer = copied(template)
        with pytest.raises(torch.OutOfMemoryError), FailAt(k, torch.OutOfMemoryError):
            optimizer.step()
        losses = models.train(model, optimizer, case.inputs, 3)
        assert losses[-1] < losses[0], k


def test_rebasing_that_failed_is_tried_again_with_its_step() -> None:
    case = CASES["default"]
    template = case.prepared()
    operations = WholeStep(template).operations
    found = set()
    for k in range(1, operations + 1, 4):
        model, optimizer = copied(template)
        with pytest.raises(torch.OutOfMemoryError), FailAt(k, torch.OutOfMemoryError):
            optimizer.step()
        count = optimizer.rebase_count
        taken = internals.run_state(optimizer).steps > internals.run_state(template[1]).steps
        found.add((count, taken))
        if taken:  # re-based, and failed in the inner step: the next is due an interval later
            models.train(model, optimizer, case.inputs, INTERVAL - 1)
            assert optimizer.rebase_count == count, k
        models.train(model, optimizer, case.inputs, 1)
        assert optimizer.rebase_count == count + 1, k
    assert found == {(0, False), (1, False), (1, True)}


def test_step_that_fails_keeps_the_moments_of_those_before() -> None:
    template = CASES["default"].prepared()
    step = WholeStep(template)
    for k in range(step.inner, step.operations + 1, 3):
        _, optimizer = copied(template)
        with pytest.raises(torch.OutOfMemoryError), FailAt(k, torch.OutOfMemoryError):
            optimizer.step()
        for pair in optimizer.rebased_pairs:
            for factor in (pair.P_parameter, pair.Q_parameter):
                assert optimizer.state[factor]["step"] >= INTERVAL - 1, k
                assert optimizer.state[factor]["exp_avg_sq"].any(), k


def test_compensation_that_fails_anywhere_belongs_to_the_weight() -> None:
    left, right = torch.randn(1, 8, 2), torch.randn(1, 6, 2)
    old = torch.randn(8, 6).bfloat16(), torch.randint(-127, 128, (8, 6), dtype=torch.int8)

    def folded(k: int) -> tuple[Tensor, Tensor, int]:
        weight, residual = (tensor.clone() for tensor in old)
        with FailAt(k, RuntimeError) as counter, contextlib.suppress(RuntimeError):
            fold([weight], left, right, rounding="compensated", seeds=[0], residuals=[residual])
        return weight, residual, counter.count

    *new, operations = folded(-1)
    found = [folded(k)[:2] for k in range(1, operations + 1)]
    is_new = [torch.equal(weight, new[0]) for weight, _ in found]
    assert {True, False} == set(is_new)
    for (weight, residual), moved in zip(found, is_new, strict=True):
        expected = new if moved else old
        assert torch.equal(weight, expected[0]) and torch.equal(residual, expected[1])


def test_what_a_channels_last_weight_was_cut_by_belongs_to_it_wherever_a_fold_fails() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)).bfloat16()
    base = base.to(memory_format=torch.channels_last)
    model = models.with_lora(base, r=2, target_modules=["0", "1"])
    optimizer = training.optimizer_of(model, interval=1, **COMPENSATED)
    batch = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)
    models.train(model, optimizer, batch, 3)
    optimizer.zero_grad()
    models.loss(model, batch).backward()
    template = model, optimizer

    def state(optimizer: scalora.ScaLoRA) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            pair.name: (pair.base_weight.clone(), internals.residual(optimizer, pair.name).clone())
            for pair in optimizer.rebased_pairs
        }

    _, other = copied(template)
    with FailAt(-1, RuntimeError) as counter:
        other.step()
    before, after = state(optimizer), state(other)
    seen = set()
    for k in range(1, counter.count + 1, 3):
        _, failing = copied(template)
        with FailAt(k, RuntimeError), contextlib.suppress(RuntimeError):
            failing.step()
        for name, found in state(failing).items():
            is_new = torch.equal(found[0], after[name][0])
            seen.add(is_new)
            expected = (after if is_new else before)[name]
            assert all(map(torch.equal, found, expected)), (k, name)
    assert seen == {True, False}
