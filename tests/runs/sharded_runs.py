"""Runs of one model, in one process or sharded over several: the same batches, shared out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import trainable, with_lora
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import scalora
from scalora.peft_layers import adapter_checksums, base_checksums


class Tower(nn.Module):
    """Widths that two processes cannot halve."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 17)
        self.second = nn.Linear(17, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    dtype: torch.dtype = torch.float64
    rank: int = 3
    steps: int = 24
    replicas: int = 1
    spoiled: int | None = None  # the step in which the first process is given NaN
    options: dict[str, Any] = field(default_factory=dict)


def begin(run: Run, sharded: bool, seed: int = 0) -> tuple[nn.Module, scalora.ScaLoRA]:
    torch.manual_seed(seed)
    model = with_lora(Tower().to(run.dtype), r=run.rank, target_modules=["first", "second"])
    if sharded:
        mesh = _mesh(run.replicas)
        base = model.get_base_model()
        for layer in (base.first, base.second):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    inner = run.optimizer(trainable(model), lr=1e-2)
    return model, scalora.ScaLoRA(inner, model, **rebasing_options(run))


def rebasing_options(run: Run) -> dict[str, Any]:
    """The run's options; the default rule re-bases often enough to be seen in so few steps."""
    return run.options if "rule" in run.options else {"interval": 6, **run.options}


def _mesh(replicas: int) -> DeviceMesh:
    """Of all processes; with replicas, each is sharded over the second axis."""
    world = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh("cpu", (world,))
    names = ("replicate", "shard")
    return init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=names)


def batch(run: Run, step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(8, width, generator=generator).to(run.dtype) for width in (12, 7))
    if step == run.spoiled:
        x.chunk(world)[0].fill_(torch.nan)
    return x.chunk(world)[rank], y.chunk(world)[rank]


def train(
    run: Run,
    model: nn.Module,
    optimizer: scalora.ScaLoRA,
    steps: range,
    rank: int = 0,
    world: int = 1,
) -> list[float]:
    """The loss of every step over the whole batch."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(run, step, rank, world)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def outcome(model: nn.Module, optimizer: scalora.ScaLoRA, losses: list[float]) -> dict[str, Any]:
    pairs = optimizer.rebased_pairs
    carries = {pair.name: pair.carry for pair in pairs if pair.carry is not None}
    return {
        "losses": losses,
        "rebased": optimizer.rebase_count,
        "checksums": base_checksums(pairs) | adapter_checksums(pairs),
        "weights": {name: whole(p).detach().clone() for name, p in model.named_parameters()},
        "carries": {name: carry.whole_up() @ carry.whole_down() for name, carry in carries.items()},
        "skipped": optimizer.skipped_steps,
    }


def sharded_run(rank: int, runs: dict[str, Run]) -> dict[str, Any]:
    """The outcome of every run, or the error it gave."""
    found: dict[str, Any] = {}
    for name, run in runs.items():
        try:
            model, optimizer = begin(run, sharded=True)
            losses = train(run, model, optimizer, range(run.steps), rank, dist.get_world_size())
            found[name] = outcome(model, optimizer, losses)
        except (ValueError, TypeError) as error:
            found[name] = error
    return found


def plain_run(run: Run) -> dict[str, Any]:
    model, optimizer = begin(run, sharded=False)
    return outcome(model, optimizer, train(run, model, optimizer, range(run.steps)))


def assert_as_in_one_process(found: dict[str, Any], run: Run) -> None:
    """What `sharded_run` found of a run is what `plain_run` does."""
    expected = plain_run(run)
    assert found["rebased"] == expected["rebased"] > 0
    assert found["skipped"] == expected["skipped"] == (run.spoiled is not None)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-8, nan_ok=True)
    assert found["weights"].keys() == expected["weights"].keys()
    for weight, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][weight], value, rtol=1e-6, atol=1e-8)
    for layer, value in expected["carries"].items():
        torch.testing.assert_close(found["carries"][layer], value, rtol=1e-6, atol=1e-8)


def state_of(model: nn.Module, optimizer: scalora.ScaLoRA) -> dict[str, Any]:
    """Return what torch.distributed.checkpoint saves and loads."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def saved_run(rank: int, runs: dict[str, Run], folder: Path) -> dict[str, list[float]]:
    """Train halfway, save, and train on: the losses after saving."""
    found = {}
    for name, run in runs.items():
        world, half = dist.get_world_size(), run.steps // 2
        model, optimizer = begin(run, sharded=True)
        train(run, model, optimizer, range(half), rank, world)
        dcp.save(state_of(model, optimizer), checkpoint_id=folder / name)
        found[name] = train(run, model, optimizer, range(half, run.steps), rank, world)
    return found


def resumed_run(
    rank: int, runs: dict[str, Run], folder: Path, with_base: bool = True
) -> dict[str, Any]:
    """The losses after loading what `saved_run` saved, perhaps in another number of processes."""
    found: dict[str, Any] = {}
    for name, run in runs.items():
        world, half = dist.get_world_size(), run.steps // 2
        model, optimizer = begin(run, sharded=True, seed=1)
        state = state_of(model, optimizer)
        if not with_base:
            del state["model"]  # loading writes into the model's own memory
        dcp.load(state, checkpoint_id=folder / name)
        if with_base:
            set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        try:
            found[name] = train(run, model, optimizer, range(half, run.steps), rank, world)
        except ValueError as error:
            found[name] = error
    return found
