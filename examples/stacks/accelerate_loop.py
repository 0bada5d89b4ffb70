"""A loop with accelerate: accumulation, clipping and a schedule are the accelerator's.

python examples/stacks/accelerate_loop.py
"""

from __future__ import annotations

import tiny
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

import scalora

ACCUMULATION = 2


def main(steps: int) -> tiny.Run:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model = tiny.lora_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = scalora.ScaLoRA(optimizer, model)  # the line that changes

    data = DataLoader(torch.cat(tiny.batches(ACCUMULATION * steps)), batch_size=8)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, 2 * steps)
    prepared = accelerator.prepare(model, optimizer, data, schedule)
    trained, stepper, data, schedule = prepared
    losses = []
    for ids in data:
        with accelerator.accumulate(trained):
            loss = trained(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained.parameters(), 1.0)
            stepper.step()
            schedule.step()
            stepper.zero_grad()
        losses.append(loss.item())
    return tiny.Run(accelerator.unwrap_model(trained), optimizer, losses)


if __name__ == "__main__":
    print(main(tiny.steps(__doc__, default=40)))
