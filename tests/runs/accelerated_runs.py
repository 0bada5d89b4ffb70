"""Runs that accelerate shards, saves and resumes, in several processes on a CPU."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from models import trainable
from sharded_runs import Run, begin, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import scalora

STACKS = Path(__file__).parents[2] / "examples" / "stacks"


def script() -> Any:
    """`examples/stacks/accelerate_fsdp.py`."""
    if str(STACKS) not in sys.path:
        sys.path.insert(0, str(STACKS))
    return importlib.import_module("accelerate_fsdp")


def make_accelerator(**plugin: Any) -> Accelerator:
    """The script's, told to shard: accelerate 1.15 turns FSDP on for accelerators alone.

    All that follows is its own: `prepare`, `save_state`, `load_state`.
    """
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true"}
    os.environ |= {"FSDP_VERSION": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29503"}
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = script().make_accelerator(cpu=True)
    assert accelerator.distributed_type is DistributedType.MULTI_CPU
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **plugin)
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    assert accelerator.is_fsdp2
    assert accelerator.distributed_type is DistributedType.FSDP
    return accelerator


def accelerated_run(
    rank: int, runs: dict[str, tuple[Run, dict[str, Any]]], folder: Path
) -> dict[str, tuple[list[float], list[float]]]:
    """The losses of runs that accelerate shards after ScaLoRA was made, and of their second halves
    once more, resumed.

    Args:
        rank: of this process.
        runs: a run, and what its plugin is made with.
        folder: for the checkpoints.
    """
    found, world = {}, dist.get_world_size()
    for name, (run, plugin) in runs.items():
        half, losses = run.steps // 2, []
        for seed in (0, 1):
            accelerator = make_accelerator(auto_wrap_policy="NO_WRAP", **plugin)
            model, prepared = accelerator.prepare(*begin(run, sharded=False, seed=seed))
            optimizer = prepared.optimizer
            assert isinstance(optimizer, scalora.ScaLoRA)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            if seed == 0:
                losses += train(run, model, optimizer, range(half), rank, world)
                accelerator.save_state(str(folder / name))
            else:
                accelerator.load_state(str(folder / name))
            losses += train(run, model, optimizer, range(half, run.steps), rank, world)
        found[name] = losses[: run.steps], losses[run.steps :]
    return found


def script_run(rank: int, folder: Path, steps: int) -> tuple[list[float], list[float], int]:
    """Losses of the script, of its resumed half, and how often it re-based."""
    torch.set_num_threads(1)
    run = script().main(steps, str(folder), make_accelerator())
    return run.losses, run.resumed, run.optimizer.rebase_count


def make_trainer(folder: Path, options: dict[str, Any], **arguments: Any) -> Trainer:
    """Of the scripts' tiny Llama; re-based in steps 8 and 16."""
    tiny, world = script().tiny, dist.get_world_size() if dist.is_initialized() else 1
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.cat(tiny.batches(16))]
    return Trainer(
        tiny.lora_model(),
        TrainingArguments(
            output_dir=str(folder),
            max_steps=16,
            per_device_train_batch_size=8 // world,
            per_device_eval_batch_size=8 // world,
            learning_rate=3e-3,
            lr_scheduler_type=arguments.pop("lr_scheduler_type", "constant"),
            train_sampling_strategy="sequential",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=[scalora.ScaLoRACallback(**{"interval": 8, **options})],
    )


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trainer_run(
    rank: int,
    folder: Path,
    options: dict[str, Any],
    plugin: dict[str, Any],
    resume: bool,
    **arguments: Any,
) -> dict[str, Any]:
    """Losses of a Trainer whose model is sharded, saved after step 10; or of one resumed there."""
    make_accelerator(**plugin)
    configured = {"accelerator_config": {"use_configured_state": True}}
    saved = {"save_strategy": "steps", "save_steps": 10}
    trainer = make_trainer(folder, options, **configured, **saved, **arguments)
    try:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-10") if resume else None)
    except ValueError as error:
        return {"error": str(error)}
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
    found = {"losses": logged(trainer), "evaluated": logged(trainer, "eval_loss")}
    found["rates"] = [group["lr"] for group in trainer.optimizer.param_groups]
    return found | {"at the end": trainer.evaluate()["eval_loss"]}


def best_run(rank: int, folder: Path, plugin: dict[str, Any]) -> dict[str, Any]:
    """A Trainer that goes back to its checkpoint of the highest loss, which is the first."""
    return trainer_run(
        rank,
        folder,
        {},
        plugin,
        False,
        eval_strategy="steps",
        eval_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )


def exported_run(rank: int, folder: Path, options: dict[str, Any]) -> float:
    """The loss of a plain model that was made of a Trainer's last checkpoint."""
    tiny = script().tiny
    model = tiny.lora_model()
    inner = torch.optim.AdamW(trainable(model))
    optimizer = scalora.ScaLoRA(inner, model, **{"interval": 8, **options})
    kept = StateDictOptions(
        ignore_frozen_params=options.get("accumulator") == "carry", strict=False
    )
    state = {
        "model": get_model_state_dict(model, options=kept),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder / "checkpoint-16" / "scalora_sharded")
    set_model_state_dict(model, state["model"], options=kept)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    scalora.save_merged(model, folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    ids = tiny.batches(1)[0]
    return merged(input_ids=ids, labels=ids).loss.item()
