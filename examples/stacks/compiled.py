"""torch.compile of the model and of the step.

    python examples/stacks/compiled.py            # needs a C++ compiler on a CPU

The step of ScaLoRA itself runs as it is, also inside ``torch.compile``; the optimizer it wraps may
be compiled.
"""

from __future__ import annotations

import tiny
import torch

import scalora


def main(steps: int, backend: str = "inductor") -> tiny.Run:
    model = tiny.lora_model()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = scalora.ScaLoRA(optimizer, model)  # the line that changes

    step = torch.compile(optimizer.step, backend=backend)
    losses = []
    for ids in tiny.batches(steps):
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return tiny.Run(model, optimizer, losses)


if __name__ == "__main__":
    print(main(tiny.steps(__doc__, default=40)))
