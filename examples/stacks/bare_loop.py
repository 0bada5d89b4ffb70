"""A loop of one's own: autocast, loss scaling, accumulation, clipping, a schedule.

python examples/stacks/bare_loop.py
"""

from __future__ import annotations

import tiny
import torch
from transformers import get_cosine_schedule_with_warmup

import scalora

ACCUMULATION = 2


def main(steps: int) -> tiny.Run:
    model = tiny.lora_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = scalora.ScaLoRA(optimizer, model)  # the line that changes

    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, 2 * steps)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for i, ids in enumerate(tiny.batches(ACCUMULATION * steps)):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss / ACCUMULATION).backward()
        losses.append(loss.item())
        if (i + 1) % ACCUMULATION:
            continue
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
    return tiny.Run(model, optimizer, losses)


if __name__ == "__main__":
    print(main(tiny.steps(__doc__, default=40)))
