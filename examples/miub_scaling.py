"""Does MIUB fall with rank, model size and the complexity of the data, as its paper reports?

    python examples/miub_scaling.py            # about fifteen minutes on two CPU cores
    python examples/miub_scaling.py --short    # a few minutes: that everything works

Pretrains three sizes of a byte-level Llama on English (the help texts of Python), then fine-tunes
them with plain LoRA in three sweeps, each with several seeds: the rank, the size of the model, and
the complexity of the data (bits per byte after compression). After each run, 512 held-out tokens
tell the mutual information of every layer's two paths, by every estimator at every noise level,
beside the held-out cross-entropy and perplexity.

Prints a table of the runs and one of the trends; writes results.json and the picture scaling.png
and .svg to --output.
"""

import argparse
import json
import logging
import math
import os
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# They say on import which optional kernels they lack, and what of torch they still use.
for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)

import miub_scaling_data as data
import miub_scaling_report as report
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import Progress
from transformers import LlamaConfig, LlamaForCausalLM

from miub import MIUBMonitor
from miub.estimators import ESTIMATORS, Estimate

NOISES = (0.001, 0.01, 0.1)
WIDTHS = (64, 128, 256)
RANKS = (2, 4, 8, 16, 32, 64)
WIDTH, RANK, TEXT = 128, 8, "Python"  # where a sweep does not change them
BATCH, BYTES = 16, 96


@dataclass
class Run:
    """One fine-tuning and what was measured at its end."""

    width: int
    rank: int
    text: str
    seed: int
    parameters: int = 0
    cross_entropy: float = math.nan
    information: dict[str, float] = field(default_factory=dict)  # "estimator, noise" -> nats

    @property
    def complexity(self) -> float:
        return data.complexity(self.text)


def planned(seeds: int, short: bool) -> list[Run]:
    """Every run of the three sweeps, once."""
    ranks, widths = (RANKS[::2], WIDTHS[:2]) if short else (RANKS, WIDTHS)
    width = widths[-1] if short else WIDTH
    configurations = [(width, rank, TEXT) for rank in ranks]
    configurations += [(other, RANK, TEXT) for other in widths]
    configurations += [(width, RANK, text) for text in data.TEXTS]
    return [
        Run(width, rank, text, seed)
        for width, rank, text in dict.fromkeys(configurations)
        for seed in range(seeds)
    ]


def new_model(width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=BYTES,
        )
    )


def train(model, text, steps, rate, seed, device, *, optimizer=torch.optim.AdamW) -> None:
    """Train on random pieces of the text; the rate is warmed up and decayed to zero."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(trainable, lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        batch = data.pieces(text, BATCH, BYTES, generator).to(device)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def cross_entropy(model, text, device, *, batches=20) -> float:
    """Return nats per byte over the same batches of the held-out text for each run."""
    generator = torch.Generator().manual_seed(10**6)
    held_out = [data.pieces(text, BATCH, BYTES, generator).to(device) for _ in range(batches)]
    model.eval()
    return statistics.fmean(model(input_ids=b, labels=b).loss.item() for b in held_out)


@torch.no_grad()
def paths(model, text, seed, device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Samples of both paths of every layer, 512 held-out tokens; layers of one shape together."""
    found: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def keep(u: torch.Tensor, v: torch.Tensor, *, noise: float) -> Estimate:
        found.setdefault((u.shape, v.shape), []).append((u, v))
        return Estimate(u.new_zeros(()), u.new_zeros(()), len(u))

    generator = torch.Generator().manual_seed(10**6 + seed)
    batch = data.pieces(text, BATCH, BYTES, generator).to(device)
    with MIUBMonitor(model, every=1, tokens=512, estimator=keep, seed=seed):
        model(input_ids=batch)
    return [
        (torch.stack([u for u, _ in same]), torch.stack([v for _, v in same]))
        for same in found.values()
    ]


def measure(samples, seed) -> dict[str, float]:
    """Mean over the layers for every estimator and noise level."""
    information = {}
    for name, estimator in ESTIMATORS.items():
        for noise in NOISES:
            values = [estimator(u, v, noise=noise).value for u, v in samples]
            information[f"{name}, {noise:g}"] = torch.cat(values).mean().item()
    return information


def fine_tune(run: Run, pretrained: dict, steps: int, device: torch.device) -> None:
    """Fill in what the run measures."""
    base = new_model(run.width)
    base.load_state_dict(pretrained[run.width])
    run.parameters = sum(p.numel() for p in base.parameters())
    torch.manual_seed(run.seed)
    # The scale s is 1 at every rank.
    lora = LoraConfig(r=run.rank, lora_alpha=run.rank, target_modules="all-linear")
    model = get_peft_model(base, lora).to(device)
    training, held_out = data.load(run.text)
    train(model, training, steps, 1e-2, run.seed, device)
    run.cross_entropy = cross_entropy(model, held_out, device)
    run.information = measure(paths(model, held_out, run.seed, device), run.seed)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo-output/miub_scaling"))
    add("--short", action="store_true", help="fewer runs of fewer steps; says nothing of trends")
    add("--seeds", type=int, default=3, help="default: %(default)s")
    add("--steps", type=int, help="of a fine-tuning; default: 200, short: 10")
    add("--pretraining", type=int, help="steps; default: 600, short: 20")
    args = parser.parse_args(argv)
    args.steps = args.steps or (10 if args.short else 200)
    args.pretraining = args.pretraining or (20 if args.short else 600)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    console = Console(soft_wrap=True)
    runs = planned(args.seeds, args.short)
    widths = sorted({run.width for run in runs})
    english, _ = data.load("English")
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("pretraining", total=len(widths) + len(runs))
        pretrained = {}
        for width in widths:
            model = new_model(width).to(device)
            train(model, english, args.pretraining, 2e-3, 0, device)
            pretrained[width] = {k: w.clone() for k, w in model.state_dict().items()}
            progress.advance(task)
        for run in runs:
            progress.update(task, description=f"r={run.rank}, {run.text}, width {run.width}")
            fine_tune(run, pretrained, args.steps, device)
            progress.advance(task)
    sweeps = report.sweeps(runs, WIDTH if not args.short else widths[-1], RANK, TEXT)
    report.print_runs(runs, console)
    trends = report.trends(sweeps)
    report.print_trends(trends, sweeps, console)
    args.output.mkdir(parents=True, exist_ok=True)
    content = {"runs": [asdict(run) for run in runs], "trends": trends}
    path = args.output / "results.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for suffix in ("png", "svg"):
        report.plot(sweeps, args.output / f"scaling.{suffix}")
    console.print(f"Wrote results.json, scaling.png and scaling.svg to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
