"""Several processes on gloo, which start quickly: a server imports the libraries once."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# Asked for before the server starts, which finds the tests' modules by PYTHONPATH alone.  A process
# forked from it has all of that imported.
multiprocessing.set_forkserver_preload(["sharded_runs"])


def run_processes(function: Callable[..., Any], folder: Path, world: int, *args: Any) -> list[Any]:
    """What ``function(rank, *args)`` returns on every rank of a process group of its own."""
    store = folder / uuid.uuid4().hex
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))):
        multiprocessing.forkserver.ensure_running()
    torch.multiprocessing.start_processes(
        _begin, args=(str(store), world, function, args), nprocs=world, start_method="forkserver"
    )
    return [torch.load(f"{store}.{rank}", weights_only=False) for rank in range(world)]


def _begin(
    rank: int, store: str, world: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=3),  # a rank that waits in vain fails, and the others with it
    )
    try:
        torch.save(function(rank, *args), f"{store}.{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
