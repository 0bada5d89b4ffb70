"""Bytes that FSDP2 and ScaLoRA move per step, measured in two processes and planned for 70B."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from examples.benchmark.table import markdown
from examples.benchmark.traffic import Plan, llama_70b
from scalora.optimizer import ScaLoRA
from scalora.options import RebasingOptions

_PROCESSES = 2
_RANK, _INTERVAL = 4, 8
_COLUMNS = 8 * _RANK  # of a carry
_MEASURED = (
    "training",
    "with carries",
    "step",
    "re-basing",
    "exact, first step",
    "exact",
    "exact, carry",
)
_PLANNED = (8, 64, 512)


class ReceivedBytes(TorchDispatchMode):
    """Counter of the bytes that this process receives in collectives while it is entered.

    Args:
        processes: of a collective; with replicas these are the processes of one, side by side.

    Attributes:
        collectives: how many.
        total: bytes.
        largest: of the one tensor that came out largest, elements.
    """

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes = processes
        self.collectives = 0
        self.total = 0.0
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count, and go on."""
        if DTensor in types:
            return NotImplemented  # what it is made of comes by
        others, name = self.processes - 1, func.name()
        if name.startswith("_c10d_functional::all_gather_into_tensor"):
            self._count(others * args[0].nbytes, self.processes * args[0].numel())
        elif name.startswith("_c10d_functional::all_reduce"):
            self._count(2 * others / self.processes * args[0].nbytes, args[0].numel())
        elif name.startswith("c10d::_allgather_base_"):
            self._count(others * args[1].nbytes, args[0].numel())
        elif name.startswith("c10d::_reduce_scatter_base_"):
            self._count(others * args[0].nbytes, args[0].numel())
        elif name.startswith("c10d::alltoall_base_"):
            incoming, own = args[0], args[3][dist.get_rank() % self.processes]
            self._count((incoming.numel() - own) * incoming.itemsize, incoming.numel())
        elif name.startswith(("c10d::", "_c10d_functional::")) and not _passes(name):
            raise RuntimeError(f"the collective {name} is not counted.")
        return func(*args, **(kwargs or {}))

    def _count(self, received: float, elements: int) -> None:
        self.collectives += 1
        self.total += received
        self.largest = max(self.largest, elements)


def _passes(name: str) -> bool:
    """Return whether an operation of the collectives' libraries moves nothing itself."""
    return "wait" in name or "_wrap_tensor" in name


def small_model() -> nn.Module:
    """Return a Llama whose widths two processes can halve, LoRA on every linear layer."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    adapter = LoraConfig(r=_RANK, target_modules="all-linear")
    return get_peft_model(LlamaForCausalLM(config), adapter)


def small_plan(processes: int) -> Plan:
    """Return the plan of `small_model`, read off its parameters."""
    shapes = {name: p.shape for name, p in small_model().named_parameters()}
    frozen = {name: shape for name, shape in shapes.items() if "lora_" not in name}
    blocks = [(n, s) for n, s in frozen.items() if ".layers." in n]
    return Plan(
        adapted=[(s[0], s[1]) for n, s in blocks if "base_layer" in n],
        block_rest=[(s[0], s[1:].numel()) for n, s in blocks if "base_layer" not in n],
        root=[(s[0], s[1:].numel()) for n, s in frozen.items() if ".layers." not in n],
        rank=_RANK,
        processes=processes,
        base_bytes=4,
        gathered_factor_bytes=4,
    )


def planned(plan: Plan) -> dict[str, float]:
    """Return the formula's bytes for everything that `measured` measures."""
    return {
        "training": plan.training(),
        "with carries": plan.training() + plan.carrying(_COLUMNS),
        "step": plan.every_step(calibrating=True),
        "re-basing": plan.every_step(calibrating=True) + plan.rebasing_of_P(),
        "exact, first step": plan.every_step(calibrating=False)
        + plan.rebasing(with_direction=True),
        "exact": plan.every_step(calibrating=False) + plan.rebasing(with_direction=False),
        "exact, carry": plan.every_step(calibrating=False)
        + plan.rebasing(with_direction=False, dense=False),
    }


def measured(processes: int, replicas: int = 1) -> tuple[dict[str, float], int]:
    """Return the bytes this process receives, and the elements of ScaLoRA's largest tensor.

    Args:
        processes: that the model is sharded over.
        replicas: of the sharded model; with several, what training itself moves is not counted.
    """
    mesh = init_device_mesh("cpu", (replicas, processes), mesh_dim_names=("replicas", "shards"))
    mesh = mesh if replicas > 1 else mesh["shards"]
    found: dict[str, float] = {}
    largest = 0
    for rule, accumulator in (("auto", "dense"), ("exact", "dense"), ("exact", "carry")):
        model: Any = small_model()
        model.enable_input_require_grads()  # else the first layers' backward pass gathers less
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trainable = [p for p in model.parameters() if p.requires_grad]
        inner = torch.optim.AdamW(trainable, lr=1e-3)
        options: dict[str, Any] = {"rule": rule, "accumulator": accumulator}
        options |= {"interval": _INTERVAL if rule == "auto" else 1}
        options |= {"carry_rank": _COLUMNS} if accumulator == "carry" else {}
        optimizer = ScaLoRA(inner, model, **options)
        for step in range(1, _INTERVAL + 1):
            optimizer.zero_grad()
            training = ReceivedBytes(processes)
            with training if replicas == 1 else nullcontext():
                ids = torch.arange(16).view(2, 8)
                model(input_ids=ids, labels=ids).loss.backward()
            with ReceivedBytes(processes) as stepping:
                optimizer.step()
            largest = max(largest, stepping.largest)
            if accumulator == "carry":
                found["with carries"], found["exact, carry"] = training.total, stepping.total
            elif rule == "exact":
                found["exact" if step > 1 else "exact, first step"] = stepping.total
            elif step == _INTERVAL:
                found["re-basing"] = stepping.total
            else:
                found["training"], found["step"] = training.total, stepping.total
    return found, largest


def run(device: torch.device) -> str:
    """Return two tables: bytes that two processes here received, and the plan for 70B."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _process, args=(folder,), nprocs=_PROCESSES, start_method="spawn"
        )
        found = torch.load(Path(folder) / "found")
    return f"{_comparison(found)}\n\n{_plan()}"


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", _PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=_PROCESSES)
    counts, _ = measured(_PROCESSES)
    every: list[dict[str, float]] = [{}] * _PROCESSES
    dist.all_gather_object(every, counts)
    if rank == 0:
        torch.save({k: max(own[k] for own in every) for k in counts}, Path(folder) / "found")
    dist.destroy_process_group()


def _comparison(found: Mapping[str, float]) -> str:
    formula = planned(small_plan(_PROCESSES))
    rows = [[name, f"{found[name]:.0f}", f"{formula[name]:.0f}"] for name in _MEASURED]
    return markdown([f"{_PROCESSES} processes, bytes per step", "measured", "formula"], rows)


def _plan() -> str:
    rows = []
    for processes in _PLANNED:
        plan = llama_70b(processes)
        step, rebasing = plan.every_step(calibrating=False), plan.rebasing_of_P()
        exact = step + plan.rebasing(with_direction=False)
        carries = plan.carrying(4 * plan.rank)
        own = plan.training()
        default = step + rebasing / RebasingOptions().interval_steps
        rows.append(
            [
                str(processes),
                f"{own / 1e9:.1f}",
                f"{rebasing / 1e6:.1f}",
                f"{default / 1e6:.2f}",
                f"{default / own:.1e}",
                f"{exact / 1e9:.2f}",
                f"{exact / own:.1e}",
                f"{carries / 1e9:.1f}",
                f"{carries / own:.1e}",
            ]
        )
    header = [
        "70B, processes",
        "FSDP2 GB",
        "MB per re-basing",
        "default MB",
        "share",
        "exact GB",
        "share",
        "carries GB",
        "share",
    ]
    return markdown(header, rows)
