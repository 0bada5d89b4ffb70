"""transformers.Trainer, with early stopping and the best model at the end.

python examples/stacks/trainer.py
"""

from __future__ import annotations

import tempfile

import tiny
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

import scalora


def main(steps: int, output: str, **arguments: object) -> tiny.Run:
    options = {
        "output_dir": output,
        "max_steps": steps,
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
    callback = scalora.ScaLoRACallback(lifetime=tiny.LIFETIME)
    trainer = Trainer(
        tiny.lora_model(),
        TrainingArguments(**{**options, **arguments}),
        train_dataset=examples,
        eval_dataset=examples[:32],
        callbacks=[
            callback,
            EarlyStoppingCallback(early_stopping_patience=3),
        ],  # the line that changes
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return tiny.Run(trainer.model, callback.optimizer, losses)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(main(tiny.steps(__doc__, default=40), folder))
