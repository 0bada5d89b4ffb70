"""FSDP2 through accelerate, with a checkpoint half way.  Needs a GPU for each process.

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 1 --num_machines 1 \
        --mixed_precision no --dynamo_backend no examples/stacks/accelerate_fsdp.py

`accelerator.save_state` and `load_state` keep all that is needed.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list
from torch.utils.data import DataLoader

import scalora


@dataclass
class ResumedRun(tiny.Run):
    """A run, and what its second half was like once more, from the checkpoint."""

    resumed: list[float]

    def __str__(self) -> str:
        half = len(self.losses) - len(self.resumed)
        apart = max(abs(a - b) for a, b in zip(self.losses[half:], self.resumed, strict=True))
        return f"{super().__str__()}, resumed losses differ by {apart:.0e} at most"


def make_accelerator(**options: object) -> Accelerator:
    """One whose batches are shared out over the processes."""
    return Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True), **options)


def begin(accelerator: Accelerator, steps: int) -> tuple:
    model = tiny.lora_model()
    optimizer = scalora.ScaLoRA(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3),
        model,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return optimizer, *accelerator.prepare(model, optimizer, schedule)


def train(accelerator: Accelerator, model, stepper, schedule, batches) -> list[float]:
    """The loss of every step over all processes."""
    ids = torch.cat(batches)
    losses = []
    for batch in accelerator.prepare(DataLoader(ids, batch_size=len(batches[0]))):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        schedule.step()
        stepper.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


def main(steps: int, folder: str, accelerator: Accelerator) -> ResumedRun:
    """Train, saving half way; then train the second half anew from what was saved."""
    batches, half = tiny.batches(steps), steps // 2
    optimizer, *prepared = begin(accelerator, steps)
    losses = train(accelerator, *prepared, batches[:half])
    accelerator.save_state(folder)
    losses += train(accelerator, *prepared, batches[half:])
    accelerator.free_memory()  # or the checkpoint would be of two models

    _, *again = begin(accelerator, steps)
    accelerator.load_state(folder)
    resumed = train(accelerator, *again, batches[half:])
    return ResumedRun(accelerator.unwrap_model(prepared[0]), optimizer, losses, resumed)


if __name__ == "__main__":
    count = tiny.steps(__doc__, default=60)
    accelerator = make_accelerator()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not accelerator.is_fsdp2:
        raise SystemExit(f"accelerate does not shard on this machine: {accelerator.state}")
    with tempfile.TemporaryDirectory() as own:
        folder = broadcast_object_list([own])[0]
        text = str(main(count, folder, accelerator))  # a report, in which all processes take part
        accelerator.print(text)
        accelerator.wait_for_everyone()
    accelerator.end_training()
