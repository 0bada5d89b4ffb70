"""PyTorch Lightning: the optimizer that configure_optimizers returns.

python examples/stacks/lightning_module.py
"""

from __future__ import annotations

import lightning
import tiny
import torch
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

import scalora


class Module(lightning.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.model = tiny.lora_model()
        self.steps = steps
        self.losses: list[float] = []

    def training_step(self, ids: torch.Tensor, _: int) -> torch.Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        optimizer = scalora.ScaLoRA(optimizer, self.model)  # the line that changes
        schedule = get_cosine_schedule_with_warmup(optimizer, self.steps // 10, 2 * self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def trainer(steps: int, **options: object) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        **{**quiet, **options},
    )


def data(steps: int) -> DataLoader:
    return DataLoader(torch.cat(tiny.batches(2 * steps)), batch_size=8)


def main(steps: int) -> tiny.Run:
    module = Module(steps)
    fitted = trainer(steps)
    fitted.fit(module, data(steps))
    return tiny.Run(module.model, fitted.optimizers[0], module.losses)


if __name__ == "__main__":
    print(main(tiny.steps(__doc__, default=40)))
