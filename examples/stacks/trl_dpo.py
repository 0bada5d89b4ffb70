"""TRL's DPOTrainer, whose reference model is the model with its adapter switched off.

    python examples/stacks/trl_dpo.py

Increments must not go into the base weights then: they would change the reference.  The callback
sees the trainer's arguments and takes the carry, which is switched off with the adapter.
"""

from __future__ import annotations

import tempfile

import tiny
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import scalora


def preferences() -> Dataset:
    """The text forwards is preferred to the text backwards."""
    halves = [(line[:20], line[20:]) for line in tiny.TEXT]
    return Dataset.from_list([{"prompt": a, "chosen": b, "rejected": b[::-1]} for a, b in halves])


def make_trainer(output: str, callback: scalora.ScaLoRACallback, **arguments: object) -> DPOTrainer:
    options = {
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return DPOTrainer(
        tiny.base_model(),
        args=DPOConfig(**{**options, **arguments}),
        train_dataset=preferences(),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.LORA,
        callbacks=[callback],  # the line that changes
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
