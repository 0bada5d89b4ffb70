"""Runs under DeepSpeed's own engine, on a CPU.  Imported where DeepSpeed is installed only."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from models import bert, bits, trainable, with_lora
from sharded_runs import Run, Tower, batch, begin, outcome
from torch import nn
from transformers import Trainer, TrainingArguments

import scalora


def _deepspeed() -> Any:
    """The library, talking over gloo alone: its operator for shared memory would be compiled."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29504"}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _config(stage: int, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **changes,
    }


def _train(run: Run, engine: Any, optimizer: scalora.ScaLoRA, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(run, step, dist.get_rank(), dist.get_world_size())
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def engine_run(rank: int, runs: dict[str, Run]) -> dict[str, Any]:
    """The outcome of every run at stage 0."""
    found = {}
    for name, run in runs.items():
        model, optimizer = begin(run, sharded=False)
        engine, *_ = _deepspeed().initialize(model=model, optimizer=optimizer, config=_config(0))
        found[name] = outcome(model, optimizer, _train(run, engine, optimizer, range(run.steps)))
    return found


def resumed_engine_run(rank: int, run: Run, folder: Path) -> tuple[list[float], list[float]]:
    """The losses after `engine.save_checkpoint`, and those after `engine.load_checkpoint`."""
    losses, half = [], run.steps // 2
    for seed in (0, 1):
        model, optimizer = begin(run, sharded=False, seed=seed)
        engine, *_ = _deepspeed().initialize(model=model, optimizer=optimizer, config=_config(0))
        if seed == 0:
            _train(run, engine, optimizer, range(half))
            engine.save_checkpoint(str(folder))
        else:
            engine.load_checkpoint(str(folder))
        losses.append(_train(run, engine, optimizer, range(half, run.steps)))
    return losses[0], losses[1]


def refused_runs(rank: int) -> dict[str, str]:
    """What is said under ZeRO; each model must be as it was before."""
    deepspeed, said = _deepspeed(), {}
    run = Run(dtype=torch.float32)
    for stage in (1, 2, 3):
        model, optimizer = begin(run, sharded=False)
        before = bits(model)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_config(stage))
        said[f"stage {stage}"] = _error(_train, run, engine, optimizer, range(1))
        if stage == 3:
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                _assert_same(model, before)
        else:
            _assert_same(model, before)
    half = Run(dtype=torch.bfloat16)
    model, optimizer = begin(half, sharded=False)
    before = bits(model)
    config = _config(0, bf16={"enabled": True})
    said["stage 0, bfloat16"] = _error(
        lambda: deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    )
    _assert_same(model, before)
    with deepspeed.zero.Init(config_dict_or_path=_config(3)):
        base = Tower()
    model = with_lora(base, target_modules=["first", "second"])
    said["stage 3, made so"] = _error(
        lambda: scalora.ScaLoRA(torch.optim.AdamW(trainable(model)), model)
    )
    said["accelerate"] = _error(accelerated_run, rank, run, zero_stage=2)
    return said


def replaced_run(rank: int) -> str:
    """What is said where accelerate would put an optimizer of its own in place of a ScaLoRA."""
    run = Run(dtype=torch.float32)
    return _error(accelerated_run, rank, run, zero_stage=2, offload_optimizer_device="cpu")


def accelerated_run(rank: int, run: Run, **options: Any) -> list[float]:
    """This process's losses in a run of accelerate's own plugin."""
    _deepspeed()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    plugin = DeepSpeedPlugin(**{"zero_stage": 0, **options})
    accelerator = Accelerator(
        deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]
    )
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 8 // dist.get_world_size()
    model, optimizer = accelerator.prepare(*begin(run, sharded=False))
    losses = []
    for step in range(run.steps):
        x, y = batch(run, step, rank, dist.get_world_size())
        loss = (model(x) - y).square().mean()
        accelerator.backward(loss)  # which steps, too
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_by_trainer(rank: int, folder: Path) -> dict[str, str]:
    """What ScaLoRACallback says to a Trainer under DeepSpeed."""
    _deepspeed()
    said = {}
    for stage in (0, 2):
        model = with_lora(bert(), target_modules=["query", "value"])
        arguments = TrainingArguments(
            output_dir=str(folder),
            deepspeed={**_config(stage), "train_micro_batch_size_per_gpu": "auto"},
            ddp_backend="gloo",
            max_steps=2,
            report_to=[],
            save_strategy="no",
        )
        data = [{"input_ids": torch.ones(4, dtype=torch.long), "labels": 0}] * 16
        trainer = Trainer(
            model, arguments, train_dataset=data, callbacks=[scalora.ScaLoRACallback()]
        )
        said[f"stage {stage}"] = _error(trainer.train)
    return said


def _error(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    try:
        call(*args, **options)
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing was raised"


def _assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in bits(model).items():
        assert torch.equal(tensor, before[name]), name
