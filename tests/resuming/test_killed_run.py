"""A run that was killed (SIGKILL) and resumed gives the same losses, to the bit."""

from __future__ import annotations

import dataclasses
import random
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import killed_run
import pytest
import torch
from killed_run import SAVE_EVERY, STEPS, Kind
from processes import exit_code

OFTEN = {"interval": 3, "calibration": 5}
SCALED = {"rule": "exact"}
CARRIED = {"accumulator": "carry", "carry_rank": 6}
KINDS = {
    "default rule": Kind({**OFTEN}),
    "default rule, carry": Kind({**OFTEN, **CARRIED}),
    "default rule, bfloat16": Kind({**OFTEN, "rounding": "stochastic"}, torch.bfloat16),
    "default rule, carry, bfloat16": Kind({**OFTEN, **CARRIED}, torch.bfloat16),
    "exact": Kind({**SCALED}),
    "exact, carry": Kind({**SCALED, **CARRIED}),
    "exact, bfloat16": Kind({**SCALED, "rounding": "stochastic"}, torch.bfloat16),
}
WAYS = {
    "bare": killed_run.bare,
    "accelerate": killed_run.accelerated,
    "Trainer": killed_run.trained,
}
# Every kind is killed in one of the ways; the slow ones are the others.
WAYS_AND_KINDS = [
    pytest.param(way, name, marks=() if (i + k) % len(WAYS) == 0 else pytest.mark.slow)
    for i, way in enumerate(WAYS)
    for k, name in enumerate(KINDS)
]
Losses = list[tuple[int, str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Losses]:
    """The losses of a run that is not killed; accelerate's are those of the bare loop."""

    @cache
    def losses(way: str, name: str) -> Losses:
        if way == "accelerate":
            return losses("bare", name)
        folder = tmp_path_factory.mktemp("whole")
        assert exit_code(WAYS[way], folder, KINDS[name]) == 0
        return killed_run.losses(folder)

    return losses


def _killed_and_resumed(way: str, kind: Kind, folder: Path, begin: int, whole: Losses) -> None:
    run = WAYS[way]
    assert exit_code(run, folder, kind) == -signal.SIGKILL
    alive = dataclasses.replace(kind, kill_at=None)
    assert exit_code(run, folder, alive) == 0
    found = killed_run.losses(folder)
    assert kind.kill_at is not None
    before, after = range(1, kind.kill_at + 1), range(begin + 1, STEPS + 2)
    assert [step for step, _ in found] == [*before, *after]
    assert len(whole) == STEPS + 1
    assert set(found) == set(whole)


@pytest.mark.parametrize("way, name", WAYS_AND_KINDS)
def test_run_killed_after_a_step_goes_on_to_the_same_losses(
    way: str, name: str, tmp_path: Path, whole: Callable[[str, str], Losses]
) -> None:
    at = random.Random(f"{way} {name}").randint(SAVE_EVERY + 1, STEPS)
    kind = dataclasses.replace(KINDS[name], kill_at=at)
    begin = (at - 1) // SAVE_EVERY * SAVE_EVERY  # killed before the step's own checkpoint
    _killed_and_resumed(way, kind, tmp_path, begin, whole(way, name))


@pytest.mark.parametrize(
    "way, file",
    [
        ("bare", "adapter_model.safetensors"),
        ("bare", "run.pt"),
        ("bare", "scalora.safetensors"),
        ("accelerate", "optimizer.bin"),
        ("Trainer", "adapter_model.safetensors"),
        ("Trainer", "scalora.safetensors"),
        ("Trainer", "optimizer.pt"),
    ],
)
def test_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    way: str, file: str, tmp_path: Path, whole: Callable[[str, str], Losses]
) -> None:
    # A Trainer that keeps one checkpoint must not have deleted the one before.
    kind = dataclasses.replace(KINDS["default rule"], kill_at=2 * SAVE_EVERY, kill_in=file)
    _killed_and_resumed(way, kind, tmp_path, SAVE_EVERY, whole(way, "default rule"))
