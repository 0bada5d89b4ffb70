"""What the processes of the tests import, loaded once by the server that they are forked from."""

import gc

import accelerated_runs
import killed_run  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

import scalora

scalora.ScaLoRA, scalora.ScaLoRACallback, scalora.save_training_state  # noqa: B018
# transformers and PEFT prepare tables for the first model.
with torch.random.fork_rng(devices=[]):
    accelerated_runs.script().tiny.lora_model()
# A process that collects garbage neither looks through what all share nor copies it.
gc.collect()
gc.freeze()
