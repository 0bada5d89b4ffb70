"""torch.distributed.checkpoint: asking for a state is not a step of training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run_processes
from sharded_runs import Run, begin, state_of, train
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import scalora

INPUTS = models.vectors(16, 12)
STEPS = 5
KINDS: dict[str, dict[str, Any]] = {
    "default": {"interval": 3},
    "default, every step": {"interval": 1},
    "exact": {"rule": "exact"},
    "none": {"rule": "none"},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "fused AdamW": lambda p, **o: torch.optim.AdamW(p, fused=True, **o),
    "rate in a tensor": lambda p, lr: torch.optim.AdamW(p, lr=torch.tensor(lr), foreach=False),
    "SGD": torch.optim.SGD,
    "SGD, dampened momentum": lambda p, **o: torch.optim.SGD(p, momentum=0.9, dampening=0.5, **o),
    "Adagrad": torch.optim.Adagrad,
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(params=[True, False], ids=["in a group", "in none"])
def group(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield request.param
    if request.param:
        dist.destroy_process_group()


def make(
    options: dict[str, Any], optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
) -> tuple[Any, scalora.ScaLoRA]:
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(), target_modules=["first", "second"])
    return model, scalora.ScaLoRA(optimizer(models.trainable(model), lr=1e-2), model, **options)


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@kinds
def test_fresh_run_that_was_asked_for_its_state_trains_as_one_that_was_not(
    options: dict[str, Any], group: bool
) -> None:
    model, optimizer = make(options)
    expected = models.train(model, optimizer, INPUTS, STEPS)
    weights = models.bits(model)
    model, optimizer = make(options)
    before = models.bits(model)
    state_of(model, optimizer)
    models.assert_same_bits(model, before)
    assert optimizer.rebase_count == optimizer.skipped_steps == 0
    assert models.train(model, optimizer, INPUTS, STEPS) == expected
    models.assert_same_bits(model, weights)


@pytest.mark.parametrize("inner", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_inner_optimizer_begins_as_if_it_had_not_been_asked(
    inner: Callable[..., torch.optim.Optimizer],
) -> None:
    model, optimizer = make(KINDS["default"], inner)
    expected = models.train(model, optimizer, INPUTS, STEPS)
    model, optimizer = make(KINDS["default"], inner)
    get_optimizer_state_dict(model, optimizer)
    model, optimizer = copy.deepcopy((model, optimizer))
    get_optimizer_state_dict(model, optimizer)
    assert models.train(model, optimizer, INPUTS, STEPS) == expected


def test_fresh_run_that_finds_no_checkpoint_trains_as_any(tmp_path: Path, group: bool) -> None:
    model, optimizer = make(KINDS["default"])
    expected = models.train(model, optimizer, INPUTS, STEPS)
    model, optimizer = make(KINDS["default"])
    with pytest.raises(CheckpointException):
        dcp.load(state_of(model, optimizer), checkpoint_id=tmp_path)
    assert models.train(model, optimizer, INPUTS, STEPS) == expected


@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.SGD])
def test_saving_in_the_middle_does_not_change_the_run(
    inner: Callable[..., torch.optim.Optimizer], group: bool
) -> None:
    model, optimizer = make(KINDS["default"], inner)
    expected = models.train(model, optimizer, INPUTS, 2 * STEPS)
    model, optimizer = make(KINDS["default"], inner)
    losses = models.train(model, optimizer, INPUTS, STEPS)
    optimizer.zero_grad()  # an SGD without a state would be stepped again
    state_of(model, optimizer)
    assert losses + models.train(model, optimizer, INPUTS, STEPS) == expected


@kinds
@pytest.mark.parametrize("group", [True], indirect=True)
def test_loaded_state_is_the_saved_one_and_nothing_more(
    options: dict[str, Any], tmp_path: Path, group: bool
) -> None:
    model, optimizer = make(options)
    models.train(model, optimizer, INPUTS, STEPS)
    dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path)
    saved = plain(optimizer.rebasing_state()), plain(optimizer.inner.state_dict())
    rest = models.train(model, optimizer, INPUTS, STEPS)

    model, optimizer = make(options)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert (plain(optimizer.rebasing_state()), plain(optimizer.inner.state_dict())) == saved
    assert models.train(model, optimizer, INPUTS, STEPS) == rest


def test_state_that_is_given_to_the_inner_optimizer_is_kept() -> None:
    model, optimizer = make(KINDS["none"])
    models.train(model, optimizer, INPUTS, STEPS)
    state, weights = copy.deepcopy(optimizer.inner.state_dict()), models.bits(model)
    expected = models.train(model, optimizer, INPUTS, STEPS)
    model, optimizer = make(KINDS["none"])
    get_optimizer_state_dict(model, optimizer)
    optimizer.inner.load_state_dict(state)
    model.load_state_dict(weights)
    assert models.train(model, optimizer, INPUTS, STEPS) == expected


def test_first_step_of_a_warm_up_from_zero_counts() -> None:
    model, optimizer = make({"rule": "exact"})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / STEPS)
    assert optimizer.param_groups[0]["lr"] == 0
    models.train(model, optimizer, INPUTS, 1)
    schedule.step()
    models.train(model, optimizer, INPUTS, 1)
    assert optimizer.rebase_count == 2
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


# "in none": torch.distributed.checkpoint then keeps nothing that is not a parameter's.
def test_state_of_rebasing_that_is_lost_on_the_way_is_missed(group: bool, tmp_path: Path) -> None:
    model, optimizer = make(KINDS["default"])
    models.train(model, optimizer, INPUTS, STEPS)
    state = state_of(model, optimizer)
    kept = any("scalora" in entries for entries in state["optimizer"]["param_groups"])
    assert kept is group
    dcp.save(state, checkpoint_id=tmp_path)

    model, optimizer = make(KINDS["default"])
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(model, state["model"])
    if group:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        with pytest.warns(UserWarning, match="holds nothing of re-basing, which begins anew"):
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert (optimizer.rebase_count > 0) is group


def fresh_runs(rank: int, runs: dict[str, Run]) -> dict[str, tuple[list[float], list[float]]]:
    """The losses of a sharded run that was not asked for its state, and of one that was."""
    found = {}
    for name, run in runs.items():
        losses = []
        for asked in (False, True):
            model, optimizer = begin(run, sharded=True)
            if asked:
                get_optimizer_state_dict(model, optimizer)
            losses.append(train(run, model, optimizer, range(7), rank, dist.get_world_size()))
        found[name] = (losses[0], losses[1])
    return found


@pytest.mark.distributed
def test_sharded_run_that_was_asked_for_its_state_trains_as_one_that_was_not(
    tmp_path: Path,
) -> None:
    runs = {"default": Run(rank=1), "exact": Run(options={"rule": "exact"})}
    for found in run_processes(fresh_runs, tmp_path, 2, runs):
        for plain_losses, asked_losses in found.values():
            assert plain_losses == asked_losses
