"""One run: the adapter or none, the Trainer, and the one argument that makes it ScaLoRA."""

import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from paper_configuration import Configuration
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PrinterCallback, Trainer, TrainingArguments

import scalora

MEBIBYTE = 2**20
CHECKPOINTING = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}

# Between released versions of PEFT and transformers, and no concern of these scripts.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated")


def loading(row: Configuration) -> dict[str, Any]:
    """Return how from_pretrained is to store the pretrained weights."""
    if row.base != "nf4":
        return {"dtype": {"float32": torch.float32, "bf16": torch.bfloat16}[row.base]}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu() else torch.float32,
    )
    return {"quantization_config": nf4, "device_map": {"": 0 if on_gpu() else "cpu"}}


def adapted(model: torch.nn.Module, row: Configuration, task_type: str) -> torch.nn.Module:
    """Return the model with a LoRA adapter; for full fine-tuning as it is."""
    if row.method == "full":
        return model
    if row.base == "nf4":
        # The Trainer switches checkpointing on, here as elsewhere.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        task_type=task_type,
        r=row.rank,
        lora_alpha=row.alpha,
        lora_dropout=row.dropout,
        target_modules=row.target_modules,
        modules_to_save=list(row.modules_to_save or ()) or None,  # PEFT adds to it
    )
    return get_peft_model(model, lora)


def train(
    model: torch.nn.Module,
    row: Configuration,
    settings: dict[str, Any],
    examples: list[dict[str, Any]],
    collate: Callable[..., Any],
) -> tuple[Trainer, dict[str, Any]]:
    """Train a model; return its Trainer, and the loss, the time and the memory that it took."""
    callbacks = [scalora.ScaLoRACallback(**row.rebasing)] if row.method == "scalora" else []
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved; the Trainer wants a folder
        trainer = Trainer(
            model,
            arguments(row, settings, folder),
            train_dataset=examples,
            data_collator=collate,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        outcome = trainer.train()
    measured = {
        "training_loss": outcome.training_loss,
        "steps": outcome.global_step,
        "seconds": time.perf_counter() - started,
    }
    if callbacks:
        measured["rebasings"] = callbacks[0].optimizer.rebase_count
    if on_gpu():
        measured["peak_mebibytes"] = torch.cuda.max_memory_allocated() / MEBIBYTE
    return trainer, measured


def arguments(row: Configuration, settings: dict[str, Any], folder: str) -> TrainingArguments:
    """Return the Trainer's settings; a step is of `batch` sequences on one device."""
    micro_batch = row.micro_batch or row.batch
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=row.batch // micro_batch,
        learning_rate=settings["learning_rate"],
        num_train_epochs=settings["epochs"],
        max_steps=row.steps or -1,
        warmup_steps=row.warmup_steps,
        weight_decay=row.weight_decay,
        seed=settings["seed"],
        bf16=on_gpu(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),  # a log has no use for a bar
        dataloader_pin_memory=on_gpu(),
        **(CHECKPOINTING if row.checkpointing else {}),
    )


def release() -> None:
    """Give the memory of a finished run back: modules and hooks hold each other."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def on_gpu() -> bool:
    return torch.cuda.is_available()
