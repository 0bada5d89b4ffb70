"""One run of an ablation, from a pretrained model to a record."""

from __future__ import annotations

import dataclasses
import math
import platform
import random
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from torch import Tensor

import scalora
from scalora.ablation.change import (
    effective_weights,
    mean_spectrum,
    miub_of_layers,
    spectra_of_change,
    summary_of,
    trainable_parameters,
)
from scalora.ablation.job import Job, folder_of_task
from scalora.ablation.memory import bytes_of_model
from scalora.ablation.methods import method_of
from scalora.ablation.methods.full import adapted_layers
from scalora.ablation.methods.method import Setup, Training
from scalora.ablation.record import Record, write_record
from scalora.ablation.task import Task
from scalora.ablation.tasks import task_of
from scalora.ablation.training import train

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises."""


def warm_up_steps(steps: int) -> int:
    """Return the steps over which the learning rate rises, one at least."""
    return max(1, round(WARM_UP * steps))


def prepare(job: Job, cache: Path) -> Task:
    """Return the job's task, ready to give models and batches."""
    task = task_of(job.task, **dict(job.options))
    folder = cache / folder_of_task(job)
    folder.mkdir(parents=True, exist_ok=True)
    task.prepare(folder)
    return task


def prepare_only(job: Job, cache: Path) -> Record:
    """Prepare the job's task; the record, which is not written, says whether that failed."""
    try:
        prepare(job, cache)
    except Exception as error:
        return failure(job, error)
    return Record(job, "ok")


def run_and_record(job: Job, cache: Path, records: Path) -> Record:
    """Run a job and write its record into a folder, also where it raises."""
    begun = time.perf_counter()
    try:
        record = run(job, cache)
    except Exception as error:
        record = failure(job, error)
    record = dataclasses.replace(record, wall_seconds=time.perf_counter() - begun)
    write_record(record, records)
    return record


def failure(job: Job, error: BaseException) -> Record:
    """Return the record of a run that raised."""
    trace = "".join(traceback.format_exception(error))
    return Record(job, "failed", error=f"{describe(error)}\n{trace}", versions=versions())


def describe(error: BaseException) -> str:
    """Return an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run(job: Job, cache: Path) -> Record:
    """Return the record of a run: train, then measure.

    Raises:
        Exception: whatever the task, the method or the model raises.
    """
    device = torch.device(job.device)
    task = prepare(job, cache)
    # After preparing, which draws numbers only where the cache is empty.
    _seed_all(job.seed)
    method = method_of(job.method)
    model = task.model(job.seed).to(device, method.dtype)
    reference = {
        name: weight.detach().to("cpu", copy=True) for name, weight in model.state_dict().items()
    }
    pretrained_bytes = bytes_of_model(model)
    source_before = task.source_loss(model.eval())
    _seed_all(job.seed)
    training = method.start(
        Setup(
            task=task,
            model=model.train(),
            rank=job.rank,
            learning_rate=job.learning_rate,
            steps=job.steps,
            warmup=warm_up_steps(job.steps),
            seed=job.seed,
        )
    )
    training.model.train()
    trainable = trainable_parameters(training.model)
    # Methods draw different numbers as they start; dropout is to be the same for all.
    _seed_all(job.seed)
    seen = train(task, training, job.seed, job.steps, pretrained_bytes)
    measured = Record(
        job=job,
        status="diverged",
        diverged_at=seen.diverged_at,
        curve=seen.curve,
        training_losses=seen.training_losses,
        source_before=source_before,
        seconds_a_step=seen.seconds_a_step,
        peak_bytes=seen.peak_bytes,
        state_bytes=seen.state_bytes,
        trainable_parameters=trainable,
        threads=torch.get_num_threads(),
        device_name=_name_of(device),
        versions=versions(),
    )
    if seen.diverged_at is not None:
        return measured
    return _with_scores(measured, task, training, reference)


def _with_scores(
    record: Record, task: Task, training: Training, reference: Mapping[str, Tensor]
) -> Record:
    model = training.model.eval()
    job = record.job
    validation = task.score(model, "validation")
    test = task.score(model, "test")
    if not all(map(math.isfinite, (*validation.values(), *test.values()))):
        return dataclasses.replace(record, diverged_at=job.steps)
    # The same layers for every method: full fine-tuning has no adapters to tell them by.
    pretrained = task.model(job.seed).to(method_of(job.method).dtype)
    layers = adapted_layers(pretrained, task).shapes
    before = effective_weights(pretrained, layers)
    spectra = spectra_of_change(before, effective_weights(model, layers))
    return dataclasses.replace(
        record,
        status="ok",
        validation=validation,
        test=test,
        source_after=task.source_loss(model),
        spectra={name: summary_of(spectrum, job.rank) for name, spectrum in spectra.items()},
        spectrum=mean_spectrum(spectra),
        miub=miub_of_layers(model, task, reference, job.seed),
    )


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "scalora": scalora.__version__,
    }


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
