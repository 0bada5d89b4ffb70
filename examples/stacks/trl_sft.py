"""TRL's SFTTrainer.

python examples/stacks/trl_sft.py
"""

from __future__ import annotations

import tempfile

import tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import scalora


def main(steps: int, output: str, **arguments: object) -> tiny.Run:
    options = {
        "output_dir": output,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    callback = scalora.ScaLoRACallback()
    trainer = SFTTrainer(
        tiny.base_model(),
        SFTConfig(**{**options, **arguments}),
        train_dataset=Dataset.from_dict({"text": tiny.TEXT}),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.LORA,
        callbacks=[callback],  # the line that changes
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return tiny.Run(trainer.model, callback.optimizer, losses)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(main(tiny.steps(__doc__, default=40), folder))
