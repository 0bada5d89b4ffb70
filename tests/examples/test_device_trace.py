"""What a step launches on a GPU, counted on fake tensors: it never waits, nor grows with depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from examples.benchmark.cases import Case
from examples.benchmark.device_trace import (
    Operations,
    added,
    fake_llama,
    measuring_operations,
    step_operations,
)
from examples.benchmark.fake_device import DeviceWaitError, FakeDevice, fake_device
from examples.benchmark.llama import LAYERS_PER_BLOCK

pytestmark = [
    pytest.mark.skipif(
        not torch.backends.cuda.is_built(),
        reason="torch is not linked with CUDA; `make device-trace` installs one that is",
    ),
    # Of transformers, about itself.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

SHAPES = 4  # of a Llama's weights

DENSE = [
    Case(rule="auto", accumulator="dense", rounding="stochastic"),
    Case(rule="auto", accumulator="dense", rounding="compensated"),
    Case("AdamW fused", "auto", "dense"),
    pytest.param(Case(rule="exact", accumulator="dense"), marks=pytest.mark.slow),
]
OTHERS = [
    Case(rule="none"),
    Case(rule="auto", accumulator="carry"),
    pytest.param(Case("AdamW 8-bit", "auto", "dense"), marks=pytest.mark.slow),
    pytest.param(Case(rule="exact", accumulator="carry"), marks=pytest.mark.slow),
]


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with fake_device() as found:
        yield found


def operations_added(device: FakeDevice, blocks: int, case: Case) -> Operations:
    alone = step_operations(device, fake_llama(blocks), Case(case.inner))["ordinary"]
    return added(device, blocks, case, alone)


@pytest.mark.parametrize("case", [*DENSE, *OTHERS], ids=str)
def test_what_a_step_adds_does_not_grow_with_the_depth(device: FakeDevice, case: Case) -> None:
    if case.inner == "AdamW 8-bit":
        pytest.importorskip("bitsandbytes")
    found = operations_added(device, 1, case)
    assert found == operations_added(device, 3, case)
    assert found["ordinary"].total() > 0 or case.rule == "none"


MOST = {
    Case(rule="none"): {"ordinary": 0},
    Case(rule="auto"): {"ordinary": 12, "calibrating": 69, "re-basing": 80},
    Case("AdamW fused", "auto"): {"ordinary": 16, "calibrating": 76, "re-basing": 84},
}
"""Case -> kind of step -> the operations of docs/measurements.md."""


@pytest.mark.parametrize("case", MOST, ids=str)
def test_no_step_launches_more_than_the_page_says(device: FakeDevice, case: Case) -> None:
    for kind, operations in operations_added(device, 1, case).items():
        assert operations.total() <= MOST[case][kind]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_a_rebasing_folds_once_per_shape_and_no_other_step_folds(
    device: FakeDevice, case: Case
) -> None:
    for kind, operations in operations_added(device, 1, case).items():
        assert operations["fold_"] == (SHAPES if kind == "re-basing" else 0)


def test_a_measuring_pass_adds_as_much_for_every_block(device: FakeDevice) -> None:
    one, two, three = (measuring_operations(device, fake_llama(n)).total() for n in (1, 2, 3))
    assert 0 < three - two == two - one <= 199 * LAYERS_PER_BLOCK


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a value": lambda x: x.sum().item(),
    "a truth value": lambda x: bool((x > 0).all()),
    "a list": lambda x: x.tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "a copy into the host": lambda x: torch.zeros(2, 2).copy_(x),
    "how many there are": lambda x: x.nonzero(),
    "equality": lambda x: torch.equal(x, x),
    "convergence": lambda x: torch.linalg.eigh(x),
    "an error code": lambda x: torch.linalg.inv(x),
    "all that was launched": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_whatever_waits_for_the_device_raises(device: FakeDevice, name: str) -> None:
    x = torch.ones(2, 2, device="cuda")
    with pytest.raises(DeviceWaitError):
        device.operations(lambda: WAITS[name](x))


def test_kernels_are_counted_and_views_allocations_and_the_host_are_not(
    device: FakeDevice,
) -> None:
    x, host = torch.ones(4, 4, device="cuda"), torch.zeros((), dtype=torch.bool)

    def run() -> None:
        y = x.T.reshape(2, 8).narrow(1, 0, 4).detach()
        torch.empty_like(x)
        torch.linalg.qr(x)
        x.add_(1.0)
        torch._foreach_add_([x, y], 1.0)
        host.copy_((y > 0).any(), non_blocking=True)
        assert not bool(host) and float(torch.ones(()).add(1.0)) == 2.0

    expected = {"clone": 1, "linalg_qr": 1, "add_": 1, "_foreach_add_": 1, "gt": 1, "any": 1}
    assert device.operations(run) == {**expected, "copy_": 1}
