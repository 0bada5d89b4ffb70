"""transformers.Trainer, with early stopping and the best model at the end.

python examples/stacks/trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import tiny
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

import scalora


def make_trainer(
    output: str,
    callback: scalora.ScaLoRACallback | None,
    model: nn.Module | None = None,
    optimizers: Any = (None, None),
    **arguments: Any,
) -> Trainer:
    options = {
        "output_dir": output,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 10,
        "save_steps": 10,
        "load_best_model_at_end": True,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    examples = [{"input_ids": ids, "labels": ids} for ids in tiny.examples()]
    callbacks = [EarlyStoppingCallback(early_stopping_patience=3)]
    if callback is not None:
        callbacks.append(callback)  # the line that changes
    return Trainer(
        tiny.lora_model() if model is None else model,
        TrainingArguments(**{**options, **arguments}),
        train_dataset=examples,
        eval_dataset=examples[:32],
        callbacks=callbacks,
        optimizers=optimizers,
    )


def main(steps: int, output: str) -> tiny.Run:
    callback = scalora.ScaLoRACallback()
    trainer = make_trainer(output, callback, max_steps=steps)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return tiny.Run(trainer.model, callback.optimizer, losses)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(main(tiny.steps(__doc__, default=40), folder))
