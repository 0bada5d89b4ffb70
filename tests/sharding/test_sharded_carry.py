"""FSDP2: a carry is dealt out with its layer, and no process keeps more of it than its share."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import internals
import pytest
import torch
import torch.distributed as dist
from models import trainable, with_lora
from processes import run_processes
from sharded_runs import Run, batch, begin, rebasing_options, train, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import miub
import scalora
from scalora.carry import compress
from scalora.peft_layers import LoRAPair
from scalora.rebasing.accumulators import carry
from scalora.sharding.rows import rows_of

CARRIED = Run(options={"rule": "exact", "accumulator": "carry", "carry_rank": 12})


def shares(rank: int) -> dict[str, Any]:
    """Sizes of what is kept, and of what a forward pass keeps for the backward pass."""
    model, optimizer = begin(CARRIED, sharded=True)
    train(CARRIED, model, optimizer, range(2), rank, dist.get_world_size())
    carry = optimizer.rebased_pairs[0].carry
    assert carry is not None
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch(CARRIED, 2, rank, dist.get_world_size())[0])
    return {
        "up": carry.up.shape,
        "down": carry.down.shape,
        "whole": (carry.m, carry.n),
        "bytes": optimizer.report().rows[0].bytes,
        "kept": kept,
    }


def test_a_process_keeps_its_share_alone(tmp_path: Path) -> None:
    found = run_processes(shares, tmp_path, 2)
    (m, n), capacity = found[0]["whole"], 12
    assert (m, n) == (17, 12)
    assert [own["up"] for own in found] == [(9, capacity), (8, capacity)]
    assert [own["down"] for own in found] == [(capacity, 6), (capacity, 6)]
    assert sum(own["bytes"] for own in found) == 8 * capacity * (m + n)
    for own in found:
        assert {9 * capacity, 8 * capacity} & set(own["kept"])  # of up, for the backward pass
        assert m * capacity not in own["kept"]


def begun_whole(rank: int) -> list[float]:
    """A run that begins in every process alike, and whose layers are sharded halfway."""
    model, optimizer = begin(CARRIED, sharded=False)
    losses = train(CARRIED, model, optimizer, range(8))
    state = optimizer.state_dict()["param_groups"][0]["scalora"]
    base: Any = model
    for layer in (base.get_base_model().first, base.get_base_model().second):
        fully_shard(layer)
    fully_shard(model)
    inner = torch.optim.AdamW(trainable(model), lr=1e-2)
    sharded = scalora.ScaLoRA(inner, model, **CARRIED.options)
    again = inner.state_dict()
    again["param_groups"][0]["scalora"] = state
    sharded.load_state_dict(again)
    return losses + train(CARRIED, model, sharded, range(8, 16), rank, dist.get_world_size())


def test_a_carry_that_was_whole_is_dealt_out(tmp_path: Path) -> None:
    """As in one process, where the inner optimizer begins anew as well."""
    model, optimizer = begin(CARRIED, sharded=False)
    expected = train(CARRIED, model, optimizer, range(8))
    own = optimizer.rebasing_state()
    again = scalora.ScaLoRA(torch.optim.AdamW(trainable(model), lr=1e-2), model, **CARRIED.options)
    again.load_rebasing_state(own)
    expected += train(CARRIED, model, again, range(8, 16))
    for losses in run_processes(begun_whole, tmp_path, 2):
        assert losses == pytest.approx(expected, rel=1e-8)


class Fan(nn.Module):
    """Layers of one shape, whose carries are full at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 17) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)[:, :7]


FULL = Run(rank=1, options={"accumulator": "carry", "carry_rank": 4, "interval": 2})


def fan(sharded: bool) -> tuple[nn.Module, scalora.ScaLoRA]:
    torch.manual_seed(0)
    model = with_lora(Fan().to(FULL.dtype), r=1, target_modules=["0", "1", "2"])
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    inner = torch.optim.AdamW(trainable(model), lr=1e-2)
    return model, scalora.ScaLoRA(inner, model, **FULL.options)


def fan_run(rank: int) -> list[float]:
    """So little at once that it would be two of the smaller shares, and one of the larger."""
    few = mock.patch.object(carry, "_NUMBERS_AT_ONCE", 116)
    with few, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(FULL, *fan(sharded=True), range(16), rank, dist.get_world_size())


def test_processes_compress_the_same_carries_at_once(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = train(FULL, *fan(sharded=False), range(16))
    for losses in run_processes(fan_run, tmp_path, 2):
        assert losses == pytest.approx(expected, rel=1e-8)


def copied_run(rank: int) -> list[float]:
    """A copy of a model with carries, which is sharded and trained on."""
    model, optimizer = begin(CARRIED, sharded=False)
    train(CARRIED, model, optimizer, range(4))
    copied = copy.deepcopy(model)
    fully_shard(copied)
    inner = torch.optim.AdamW(trainable(copied), lr=1e-2)
    again = scalora.ScaLoRA(inner, copied, **CARRIED.options)
    return train(CARRIED, copied, again, range(4, 8), rank, dist.get_world_size())


def test_a_copied_carry_is_dealt_out(tmp_path: Path) -> None:
    model, optimizer = begin(CARRIED, sharded=False)
    train(CARRIED, model, optimizer, range(4))
    inner = torch.optim.AdamW(trainable(model), lr=1e-2)
    again = scalora.ScaLoRA(inner, model, **CARRIED.options)
    expected = train(CARRIED, model, again, range(4, 8))
    for losses in run_processes(copied_run, tmp_path, 2):
        assert losses == pytest.approx(expected, rel=1e-8)


def alone_run(rank: int) -> str:
    """What is said where ``fully_shard`` was called on every linear layer, also of the adapter."""
    model, _ = begin(CARRIED, sharded=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module)
    fully_shard(model)
    inner = torch.optim.AdamW(trainable(model), lr=1e-2)
    with pytest.raises(ValueError) as error:
        scalora.ScaLoRA(inner, model, **CARRIED.options)
    return str(error.value)


def test_factors_that_are_sharded_alone_are_refused_at_once(tmp_path: Path) -> None:
    for said in run_processes(alone_run, tmp_path, 2):
        assert "call it on the layer or block" in said


def measured_run(rank: int) -> list[int]:
    """How many layers are measured: with tokens enough, and with too few in one process."""
    model, optimizer = begin(CARRIED, sharded=True)
    train(CARRIED, model, optimizer, range(2), rank, dist.get_world_size())
    found = []
    for few in (32, 8):
        monitor = miub.MIUBMonitor(model, every=1)
        with monitor, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model(torch.randn(few if rank else 32, 12, dtype=CARRIED.dtype))
        try:
            found.append(len(monitor.report().layers))
        except ValueError:
            found.append(0)
    return found


def test_too_few_tokens_in_one_process_keep_no_other_waiting(tmp_path: Path) -> None:
    assert run_processes(measured_run, tmp_path, 2) == [[2, 0], [2, 0]]


class Needle(nn.Module):
    """A layer of one row, which one of two processes holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 1)
        self.second = nn.Linear(1, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def needle(run: Run, sharded: bool) -> tuple[nn.Module, scalora.ScaLoRA]:
    torch.manual_seed(0)
    model = with_lora(Needle().to(run.dtype), r=run.rank, target_modules=["first", "second"])
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    inner = run.optimizer(trainable(model), lr=1e-2)
    return model, scalora.ScaLoRA(inner, model, **rebasing_options(run))


NEEDLES = {
    "default": Run(rank=1),
    "default, carry": Run(rank=1, options={"accumulator": "carry"}),
    "exact": Run(rank=1, options={"rule": "exact"}),
    "exact, carry": replace(CARRIED, rank=1),
}


def needle_runs(rank: int) -> dict[str, list[float]]:
    world = dist.get_world_size()
    return {
        name: train(run, *needle(run, sharded=True), range(16), rank, world)
        for name, run in NEEDLES.items()
    }


def test_a_process_without_any_row_takes_part(tmp_path: Path) -> None:
    for losses in run_processes(needle_runs, tmp_path, 2):
        for name, run in NEEDLES.items():
            expected = train(run, *needle(run, sharded=False), range(16))
            assert losses[name] == pytest.approx(expected, rel=1e-8), name


def compressed(rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of products of several shapes, in three processes: what compressing them in pieces gives."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for m, n, columns, keep in SHAPES:
        up, down = products(m, n, columns)
        tower = nn.Linear(3, m, bias=False)
        fully_shard(tower, mesh=mesh)
        rows = rows_of(tower.weight)
        part = compress(up[:, rows.own(m)], down[..., rows.own(n)], keep, rows)
        found.append((rows.gathered(part.up, 1, m), rows.gathered(part.down, 2, n), part.cut))
    return found


# Rows that three processes share unevenly, that are fewer than columns, and that not all have.
SHAPES = [(20, 17, 8, 5), (20, 17, 8, 8), (7, 5, 6, 3), (2, 9, 4, 2)]


def products(m: int, n: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    up = torch.randn(2, m, columns, generator=generator, dtype=torch.float64)
    down = torch.randn(2, columns, n, generator=generator, dtype=torch.float64)
    up[..., -1] = up[..., 0]  # columns that say the same
    return up, down


def test_a_carry_is_compressed_in_pieces_as_in_the_whole(tmp_path: Path) -> None:
    for found in run_processes(compressed, tmp_path, 3):
        for (m, n, columns, keep), (up, down, cut) in zip(SHAPES, found, strict=True):
            expected = compress(*products(m, n, columns), keep)
            torch.testing.assert_close(up @ down, expected.up @ expected.down, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(cut, expected.cut, rtol=1e-9, atol=1e-9)


NARROW = Run(
    dtype=torch.float32,
    options={"accumulator": "carry", "carry_rank": 12, "interval": 2, "memory": 4},
)


@internals.narrow_carries()
def narrow_run(rank: int) -> tuple[list[float], set[torch.dtype], list[float]]:
    """Losses, what carries are kept in, and by how much a re-basing moved what was learned."""
    model, optimizer = begin(NARROW, sharded=True)
    losses = train(NARROW, model, optimizer, range(6), rank, dist.get_world_size())
    pairs = optimizer.rebased_pairs
    before = [whole_weight(pair) for pair in pairs]
    optimizer._rebaser.rebase(optimizer.inner, optimizer.rebase_count)
    moved = [
        float((whole_weight(pair) - old).norm() / old.norm())
        for pair, old in zip(pairs, before, strict=True)
    ]
    losses += train(NARROW, model, optimizer, range(6, 24), rank, dist.get_world_size())
    return losses, {pair.carry.dtype for pair in pairs if pair.carry is not None}, moved


def whole_weight(pair: LoRAPair) -> Tensor:
    """(m, n): what the layer learned beside its base, summed in float64."""
    P, Q = (whole(p.detach()).double() for p in (pair.P_parameter, pair.Q_parameter))
    carry = pair.carry
    assert carry is not None
    return P @ Q + carry.whole_up(torch.float64) @ carry.whole_down(torch.float64)


@internals.narrow_carries()
def test_processes_round_a_carry_alike_and_keep_what_rounding_cuts(tmp_path: Path) -> None:
    model, optimizer = begin(NARROW, sharded=False)
    expected = train(NARROW, model, optimizer, range(6))
    optimizer._rebaser.rebase(optimizer.inner, optimizer.rebase_count)
    expected += train(NARROW, model, optimizer, range(6, 24))
    for losses, dtypes, moved in run_processes(narrow_run, tmp_path, 2):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert dtypes == {torch.float16}
        assert max(moved) < 2.0**-23
