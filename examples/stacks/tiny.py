"""Model and data of the scripts beside this one: a tiny byte-level Llama and a few lines of text.

Everything is made on the spot, nothing is downloaded.  The model has random weights, so the runs
show that a stack works, not that one optimizer is better than another.
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass

# They say on import which optional kernels they lack, and what of torch they still use.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import scalora

TEXT = [
    "The model is frozen, and two thin matrices beside every weight are trained.",
    "The adapter remembers the last steps, and the weight remembers the rest.",
    "The function of the model does not change when a part of it is frozen.",
    "A sum of many increments of low rank has a high rank.",
]
LENGTH = 32  # tokens of an example
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass
class Run:
    """Result of a script: what it has trained."""

    model: nn.Module
    optimizer: scalora.ScaLoRA
    losses: list[float]

    def __str__(self) -> str:
        first, last = self.losses[0], self.losses[-1]
        places = sorted({row.accumulator for row in self.optimizer.report()})
        return (
            f"loss {first:.3f} -> {last:.3f}, "
            f"re-based {self.optimizer.rebase_count} times ({', '.join(places)})"
        )


def steps(description: str | None, default: int) -> int:
    """The number of optimizer steps, from the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=default, help="default: %(default)s")
    return parser.parse_args().steps


def base_model() -> LlamaForCausalLM:
    """Always the same weights; about 80,000 of them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    return LlamaForCausalLM(config)


def lora_model() -> nn.Module:
    """The same with an adapter."""
    return get_peft_model(base_model(), LORA)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def examples() -> Tensor:
    """Token ids, (examples, LENGTH): every window of the text."""
    ids = torch.tensor(tokenizer()(" ".join(TEXT))["input_ids"])
    return ids.unfold(0, LENGTH, 1)


def batches(count: int, size: int = 8) -> list[Tensor]:
    """The same ones every time, each (size, LENGTH)."""
    windows, generator = examples(), torch.Generator().manual_seed(0)
    return [
        windows[torch.randint(len(windows), (size,), generator=generator)] for _ in range(count)
    ]
