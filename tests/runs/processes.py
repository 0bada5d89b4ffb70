"""Processes that start quickly, forked from a server that has imported the libraries."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist


def server() -> ForkServerContext:
    """Return the context of processes that have `preloaded` imported; the first call starts it."""
    context = multiprocessing.get_context("forkserver")
    # Heeded before the server starts, which finds the tests' modules by PYTHONPATH alone.
    context.set_forkserver_preload(["preloaded"])
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))):
        multiprocessing.forkserver.ensure_running()
    return context


def exit_code(function: Callable[..., None], *args: Any) -> int:
    """Return how a process that calls ``function(*args)`` ends: negative if a signal killed it."""
    process = server().Process(target=_alone, args=(function, args))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _alone(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(*args)


def run_processes(function: Callable[..., Any], folder: Path, world: int, *args: Any) -> list[Any]:
    """Return what ``function(rank, *args)`` does on every rank of a process group of its own."""
    store = folder / uuid.uuid4().hex
    server()
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
