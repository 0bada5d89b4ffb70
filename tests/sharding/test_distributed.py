"""Data parallel training: every replica folds the same, and a monitor sees all tokens."""

from __future__ import annotations

from pathlib import Path

import internals
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from processes import run_processes
from torch import nn

import scalora
from miub import MIUBMonitor
from scalora.peft_layers import adapter_checksums, base_checksums, checksums

pytestmark = pytest.mark.distributed


def replica(rank: int, dtype: torch.dtype, accumulator: str) -> dict[str, int]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)).to(dtype)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["0", "2"]))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = scalora.create_scalora_optimizer(
        parallel, torch.optim.AdamW, lr=1e-2, rule="exact", accumulator=accumulator
    )
    generator = torch.Generator().manual_seed(rank)
    for _ in range(20):
        optimizer.zero_grad()
        x = torch.randn(8, 12, generator=generator).to(dtype)
        parallel(x).float().square().mean().backward()
        optimizer.step()
    pairs = optimizer.rebased_pairs
    sums = base_checksums(pairs) | adapter_checksums(pairs)
    carries = {pair.name: pair.carry for pair in pairs if pair.carry is not None}
    assert len(carries) == (2 if accumulator == "carry" else 0)
    return sums | checksums({f"up:{name}": carry.up for name, carry in carries.items()})


def watched(rank: int) -> tuple[float, int, float]:
    """A layer's value and tokens in the report, and the value of this rank's own tokens."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 16)), LoraConfig(r=3, target_modules=["0"]))
    nn.init.normal_(model.get_base_model()[0].lora_B["default"].weight)
    parallel = nn.parallel.DistributedDataParallel(model)
    monitor = MIUBMonitor(parallel, every=1, tokens=32)
    x = torch.randn(100, 12, generator=torch.Generator().manual_seed(rank))
    with monitor:
        parallel(x)
    own = internals.own_records(monitor)
    row = monitor.report()["0"]
    return row.value, row.tokens, own[0][1].value


def test_a_report_is_of_all_ranks_tokens(tmp_path: Path) -> None:
    first, second = run_processes(watched, tmp_path, 2)
    assert first[:2] == second[:2]
    value, tokens, own = first
    assert tokens == 64
    assert own != second[2]
    assert value == pytest.approx((own + second[2]) / 2)


def train_replicas(rank: int, dtype: torch.dtype) -> tuple[list[float], dict[str, int]]:
    """200 steps of the default, the global batch shared out: losses over it, and checksums."""
    world = dist.get_world_size()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6)).to(dtype)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["0", "2"]))
    parallel = nn.parallel.DistributedDataParallel(model.to(dtype))
    optimizer = scalora.create_scalora_optimizer(parallel, torch.optim.AdamW, lr=1e-2, interval=5)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(200):
        optimizer.zero_grad()
        x = torch.randn(8, 12, generator=generator).to(dtype).chunk(world)[rank]
        loss = (parallel(x) - x[:, :6].sin()).square().mean()
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach())
        losses.append(loss.item() / world)
    assert optimizer.rebase_count > 20
    pairs = optimizer.rebased_pairs
    return losses, base_checksums(pairs) | adapter_checksums(pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_two_hundred_steps_leave_the_same_bits_on_every_rank(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    first, second = run_processes(train_replicas, tmp_path, 2, dtype)
    assert first == second


def test_one_process_or_two_give_the_same_losses(tmp_path: Path) -> None:
    [(one, _)] = run_processes(train_replicas, tmp_path, 1, torch.float64)
    two, _ = run_processes(train_replicas, tmp_path, 2, torch.float64)[0]
    assert two == pytest.approx(one, rel=1e-8)
    assert one[-1] < one[0]


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_hold_the_same_bits(tmp_path: Path, dtype: torch.dtype, accumulator: str) -> None:
    first, second = run_processes(replica, tmp_path, 2, dtype, accumulator)
    assert first.keys() == second.keys()
    assert first == second
