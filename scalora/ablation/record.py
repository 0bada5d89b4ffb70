"""The record of one run, as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from scalora.ablation.job import Job
from scalora.files import write_bytes

Status = Literal["ok", "diverged", "failed"]


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of one layer's whole change, summarised.

    Attributes:
        effective_rank: exp of the spectrum's entropy (Roy and Vetterli 2007).
        stable_rank: squared Frobenius norm over squared spectral norm.
        energy_top_r: share of the squared Frobenius norm in the r largest, r the adapters' rank.
    """

    effective_rank: float
    stable_rank: float
    energy_top_r: float


@dataclass(frozen=True)
class Record:
    """One run.  Losses and MIUB in nats.

    Attributes:
        job: the run.
        status: "ok"; "diverged": a loss was not finite; "failed": it raised.
        error: a failed run's exception in one line, then its traceback.
        diverged_at: step at which a divergent run was stopped.
        curve: (step, validation loss), on a small part of the split.
        training_losses: (step, mean training loss since the point before).
        validation, test: scores at the end; empty unless the status is "ok".
        source_before, source_after: loss on what the model was pretrained for, if the task has it.
        spectra: layer -> its change, summarised; every adapted layer.
        spectrum: singular values over the largest, mean over the layers, descending.
        miub: layer -> MIUB, of the layers that the monitor knows; None: it knows none.
        seconds_a_step: seconds per step, median over the stretches between points of the curve.
        peak_bytes: most bytes of tensors at one time in the steps that were measured.
        state_bytes: bytes that training adds to the frozen model between two steps: trained
            parameters, their gradients, the optimizer's state, and a carry; None: of a record from
            before it was measured.
        trainable_parameters: count of numbers that the optimizer trains.
        wall_seconds: seconds of the whole run, evaluations included.
        threads: torch's, on the CPU; with another number sums differ by rounding.
        device_name, versions: of the machine and of what ran.
    """

    job: Job
    status: Status
    error: str | None = None
    diverged_at: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    training_losses: list[tuple[int, float]] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    source_before: float | None = None
    source_after: float | None = None
    spectra: dict[str, LayerSpectrum] = field(default_factory=dict)
    spectrum: list[float] = field(default_factory=list)
    miub: dict[str, float] | None = None
    seconds_a_step: float | None = None
    peak_bytes: int | None = None
    state_bytes: int | None = None
    trainable_parameters: int | None = None
    wall_seconds: float = 0.0
    threads: int = 0
    device_name: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Return whether running it again could tell nothing new."""
        return self.status != "failed"


def write_record(record: Record, folder: Path) -> None:
    """Write ``folder``/<job>.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(_finite(asdict(record)), indent=1, allow_nan=False)
    write_bytes(folder / record.job.file_name, content.encode("utf-8"))


def read_record(job: Job, folder: Path) -> Record | None:
    """Return the record of exactly this job; None: there is none that can be read."""
    try:
        content = json.loads((folder / job.file_name).read_text("utf-8"))
        record = _record(content)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if record.job == job else None


def read_records(jobs: Iterable[Job], folder: Path) -> dict[Job, Record]:
    """Return the records that can be read."""
    read = {job: read_record(job, folder) for job in jobs}
    return {job: record for job, record in read.items() if record is not None}


def _record(content: dict[str, Any]) -> Record:
    spectra = {name: LayerSpectrum(**layer) for name, layer in content["spectra"].items()}
    pairs = {
        name: [(int(step), math.nan if loss is None else float(loss)) for step, loss in values]
        for name, values in content.items()
        if name in ("curve", "training_losses")
    }
    options = tuple((name, value) for name, value in content["job"]["options"])
    job = Job(**{**content["job"], "options": options})
    return Record(**{**content, **pairs, "job": job, "spectra": spectra})


def _finite(content: Any) -> Any:
    """Return the content with None for every number that is not finite, as JSON has no such."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
