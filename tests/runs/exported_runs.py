"""Tiny training runs of every kind that ``scalora export`` takes, and their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import scalora
from scalora.cli import main

STATE = "scalora.safetensors"
STEPS = 8


class Classified(models.Sequences):
    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = super().__getitem__(i)["input_ids"]
        return {"input_ids": ids, "labels": ids.sum() % 3}


def llama(**changes: Any) -> LlamaForCausalLM:
    options = dict(
        vocab_size=models.VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


@dataclass(frozen=True)
class Kind:
    """One kind of training run."""

    dtype: torch.dtype = torch.float32
    quantized: bool = False
    classes: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    lora: tuple[tuple[str, Any], ...] = ()

    @property
    def model_class(self) -> Any:
        return BertForSequenceClassification if self.classes else LlamaForCausalLM

    def base(self, folder: Path) -> Any:
        """As a user loads it."""
        options: dict[str, Any] = {}
        if self.classes:
            options = {"num_labels": self.classes, "ignore_mismatched_sizes": True}
        if self.quantized:
            options["quantization_config"] = nf4()
        return self.model_class.from_pretrained(folder, dtype=self.dtype, **options)


KINDS = {
    "dense": Kind(),
    "dense, bfloat16": Kind(dtype=torch.bfloat16),
    "dense, no task type": Kind(lora=(("task_type", None),)),
    "dense, DoRA": Kind(lora=(("use_dora", True),)),
    "dense, PiSSA": Kind(lora=(("init_lora_weights", "pissa"),)),
    "carry": Kind(options=(("accumulator", "carry"),)),
    "tied head": Kind(lora=(("target_modules", ["q_proj", "lm_head"]),)),
    "other adapter name": Kind(options=(("adapter_name", "mine"),)),
    "no re-basing": Kind(options=(("rule", "none"),)),
    "NF4": Kind(quantized=True),
    "NF4, DoRA": Kind(quantized=True, lora=(("use_dora", True),)),
    "NF4, DoRA, nothing carried yet": Kind(
        quantized=True, lora=(("use_dora", True),), options=(("interval", 100),)
    ),
    "three classes": Kind(classes=3),
    "three classes, carry": Kind(classes=3, options=(("accumulator", "carry"),)),
}
# Their adapter needs nothing of the base but its shapes.
CARRIED = [
    "carry",
    "no re-basing",
    "NF4",
    "NF4, DoRA",
    "NF4, DoRA, nothing carried yet",
    "three classes, carry",
]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(models.VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0")


@dataclass
class Run:
    kind: Kind
    base: Path
    checkpoint: Path
    answers: Tensor

    def loaded(self, adapter: Path) -> Tensor:
        """What the adapter answers on the base that was trained."""
        return answers(PeftModel.from_pretrained(self.kind.base(self.base), adapter))


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Run] = {}
        torch.manual_seed(0)
        llama().save_pretrained(folder / "llama")
        llama(tie_word_embeddings=True).save_pretrained(folder / "tied")
        models.bert(num_labels=2).save_pretrained(folder / "bert")

    def __getitem__(self, name: str) -> Run:
        if name not in self.done:
            self.done[name] = self.trained(name)
        return self.done[name]

    def trained(self, name: str) -> Run:
        kind = KINDS[name]
        base = self.folder / ("bert" if kind.classes else "tied" if "tied" in name else "llama")
        torch.manual_seed(1)
        model = kind.base(base)
        if kind.quantized:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        options = dict(
            r=3,
            task_type="SEQ_CLS" if kind.classes else "CAUSAL_LM",
            target_modules=["query", "dense"] if kind.classes else ["q_proj", "down_proj"],
        )
        adapter = dict(kind.options).get("adapter_name", "default")
        model = get_peft_model(
            model, LoraConfig(**{**options, **dict(kind.lora)}), adapter_name=adapter
        )
        folder = self.folder / name.replace(" ", "-")
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            save_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Classified() if kind.classes else models.Sequences(),
            callbacks=[scalora.ScaLoRACallback(**{"rule": "exact", **dict(kind.options)})],
            processing_class=tokenizer(),
        )
        trainer.train()
        return Run(kind, base, folder / f"checkpoint-{STEPS}", answers(model))


def answers(model: Any) -> Tensor:
    """Logits, with gradients: bitsandbytes rounds the scales of 4 bits to evaluate on a CPU."""
    model.train()
    return model(
        torch.stack([models.Sequences()[i]["input_ids"] for i in range(8)])
    ).logits.detach()


def tolerance_of(run: Run) -> float:
    """Round-off; of bfloat16, two units in the last place of the largest logit."""
    if run.kind.dtype == torch.float32:
        return 2e-5
    return 2 * torch.finfo(run.kind.dtype).eps * float(run.answers.abs().max())


def export(*arguments: Any) -> None:
    assert main(["export", *map(str, arguments)]) == 0
