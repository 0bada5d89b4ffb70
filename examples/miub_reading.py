"""How to read MIUB: what a value is compared with, and what three decisions gain from it.

    python examples/miub_reading.py            # about five minutes on one CPU core
    python examples/miub_reading.py --short    # half a minute: that everything works

Pretrains a byte-level Llama (width 64, 4 blocks, 28 LoRA layers of r = 8) on English, fine-tunes it
on other texts with three seeds each, and asks of the mutual information, 512 held-out bytes:

* how large is it beside that of an adapter of random numbers on the same layer, and what moves it
  (tokens, noise, rank)?
* which layers: does it tell how much the loss rises without a layer's adapter, or where more rank
  pays?
* which run: does it tell a pretrained model from one of random weights, or one text from another,
  beyond what the adapter of random numbers tells?
* since when: at which step is it, and at which is the held-out loss, as good as at the end?

Prints a table for each, and writes results.json and the picture of one run's report (.png, .svg).
"""

import argparse
import json
import statistics
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import miub_scaling as scaling
import miub_scaling_data as data
import torch
from miub_scaling_report import spearman
from peft import LoraConfig, get_peft_model

from miub import MIUBMonitor, MIUBReport

WIDTH, RANK, TEXT, RATE = 64, 8, "Python", 1e-2
TEXTS = ("English", "table", "Python", "shuffled Python")
MORE, LESS = 12, 4  # ranks of two halves of the layers, for as many parameters as with 8
CPU = torch.device("cpu")


@dataclass
class Sizes:
    """How much is computed."""

    pretraining: int = 500
    steps: int = 100
    seeds: int = 3
    every: int = 5


@dataclass
class Run:
    """A fine-tuned model, its report on held-out text, and what was noted while it trained."""

    model: torch.nn.Module
    report: MIUBReport
    loss: float
    during: MIUBReport | None = None
    losses: dict[int, float] = field(default_factory=dict)


def fine_tuned(weights, text, seed, sizes, *, ranks=None, watched=False) -> Run:
    """Fine-tune with LoRA; ``ranks`` has the r of layers that do not have 8."""
    base = scaling.new_model(WIDTH)
    base.load_state_dict(weights)
    torch.manual_seed(seed)
    ranks = ranks or {}
    lora = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules="all-linear",
    )
    model = get_peft_model(base, lora)
    training, held_out = data.load(text)
    run = Run(model, None, 0.0)
    if watched:
        run.during, run.losses = watch(model, training, held_out, seed, sizes)
    else:
        scaling.train(model, training, sizes.steps, RATE, seed, CPU)
    run.loss = scaling.cross_entropy(model, held_out, CPU)
    run.report = measured(model, held_out)
    return run


def watch(model, training, held_out, seed, sizes) -> tuple[MIUBReport, dict[int, float]]:
    """Train, and note MIUB and the held-out loss at every ``sizes.every``-th step."""
    losses = {}

    class Noting(torch.optim.AdamW):
        def step(self, closure=None):
            result = super().step(closure)
            taken = self.state[next(iter(self.state))]["step"]
            if int(taken) % sizes.every == 0:
                monitor.detach()
                losses[int(taken)] = scaling.cross_entropy(model, held_out, CPU)
                model.train()
                monitor.attach()
            return result

    monitor = MIUBMonitor(model, every=sizes.every)
    with monitor:
        scaling.train(model, training, sizes.steps, RATE, seed, CPU, optimizer=Noting)
    return monitor.report(), losses


@torch.no_grad()
def measured(model, text, **options) -> MIUBReport:
    """Return the report on one batch of held-out text, the same for each model."""
    model.eval()
    batch = data.pieces(text, 24, scaling.BYTES, torch.Generator().manual_seed(10**6))
    with MIUBMonitor(model, every=1, **options) as monitor:
        model(input_ids=batch)
    return monitor.report()


def randomised(weights, r=RANK):
    """Return the model with an adapter of random numbers: what a layer's shape alone gives."""
    base = scaling.new_model(WIDTH)
    base.load_state_dict(weights)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=r, lora_alpha=r, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model


@torch.no_grad()
def rise_without(run, layer, text) -> float:
    """Return how much the held-out loss rises with one layer's adapter switched off."""
    module = run.model.get_base_model().get_submodule(layer)
    scale, module.scaling["default"] = module.scaling["default"], 0.0
    loss = scaling.cross_entropy(run.model, text, CPU, batches=4)
    module.scaling["default"] = scale
    return loss


def change_norm(run, layer) -> float:
    module = run.model.get_base_model().get_submodule(layer)
    return module.get_delta_weight("default").norm().item()


def plus_minus(values) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2f} ± {spread:.2f}"


def table(title, header, rows) -> None:
    print(f"\n{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def scale_of_a_value(run, weights, text) -> dict:
    """Print each kind of module beside a random adapter, and what moves the mean."""
    chance = measured(randomised(weights), text)
    kinds = run.report.by_kind()
    table(
        "A trained adapter (Python, seed 0) beside a random one, nats",
        ("kind of module", "outputs x inputs", "trained", "random", "trained / random"),
        [
            (
                kind,
                "{} x {}".format(*shape_of(run, kind)),
                f"{total.mean:.2f}",
                f"{chance.by_kind()[kind].mean:.2f}",
                f"{total.mean / chance.by_kind()[kind].mean:.2f}",
            )
            for kind, total in kinds.items()
        ],
    )
    moved = {"as above": run.report.mean}
    for name, options in (
        ("128 tokens", {"tokens": 128}),
        ("2048 tokens", {"tokens": 2048}),
        ("tau = 0.001", {"noise": 0.001}),
        ("tau = 0.1", {"noise": 0.1}),
        ("other 512 tokens", {"seed": 1}),
    ):
        moved[name] = measured(run.model, text, **options).mean
    for r in (2, 32):
        moved[f"random, r = {r}"] = measured(randomised(weights, r), text).mean
    moved["random, r = 8"] = chance.mean
    table("What moves it: mean of the layers, nats", ("", "MIUB"), rounded(moved))
    return {"chance": chance.mean, "moved": moved}


def shape_of(run, kind):
    layer = next(row.layer for row in run.report if row.kind == kind)
    return tuple(run.model.get_base_model().get_submodule(layer).get_base_layer().weight.shape)


def rounded(values) -> list[tuple[str, str]]:
    return [(name, f"{value:.2f}") for name, value in values.items()]


def which_layers(runs, weights, text, sizes) -> dict:
    """Print what a layer's value tells of its adapter's worth, and where more rank pays."""
    found = []
    for run in runs:
        whole = scaling.cross_entropy(run.model, text, CPU, batches=4)
        rises = [rise_without(run, row.layer, text) - whole for row in run.report]
        values = [row.value for row in run.report]
        norms = [change_norm(run, row.layer) for row in run.report]
        found.append((spearman(values, rises)[0], spearman(norms, rises)[0]))
    by_miub, by_norm = zip(*found, strict=True)
    table(
        "Does it tell how much the loss rises without a layer's adapter? Spearman's rho, 28 layers",
        ("by", "rho"),
        [("MIUB", plus_minus(by_miub)), ("norm of the layer's change", plus_minus(by_norm))],
    )
    halves = {"8 everywhere": None, "12 where MIUB is high, 4 where low": True, "reverse": False}
    losses = {}
    for name, high in halves.items():
        losses[name] = [
            run.loss
            if high is None
            else fine_tuned(weights, TEXT, seed, sizes, ranks=halved(run.report, high)).loss
            for seed, run in enumerate(runs)
        ]
    table(
        "Where does more rank pay? Held-out loss, nats per byte, with as many parameters",
        ("r", "loss"),
        [(name, three(values)) for name, values in losses.items()],
    )
    return {"rho": {"miub": by_miub, "norm": by_norm}, "losses": losses}


def three(values) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f} ± {spread:.4f}"


def halved(report, high) -> dict[str, int]:
    """Return a rank for each layer: of each kind, one half of the blocks has more."""
    ranks = {}
    for kind in report.by_kind():
        rows = sorted((row for row in report if row.kind == kind), key=lambda row: row.value)
        for i, row in enumerate(rows):
            ranks[row.layer] = MORE if (i >= len(rows) / 2) == high else LESS
    return ranks


def which_run(runs, weights, sizes) -> dict:
    """Print texts, and the same training on frozen random weights, beside each other."""
    frozen = {"pretrained": weights, "random": scaling.new_model(WIDTH).state_dict()}
    found = {}
    for kind, name in (*(("pretrained", name) for name in TEXTS), ("random", TEXT)):
        same = runs
        if (kind, name) != ("pretrained", TEXT):
            same = [fine_tuned(frozen[kind], name, seed, sizes) for seed in range(sizes.seeds)]
        found[f"{kind}, {name}"] = {
            "chance": measured(randomised(frozen[kind]), data.load(name)[1]).mean,
            "miub": [run.report.mean for run in same],
            "loss": [run.loss for run in same],
        }
    table(
        "Which run leans more? r = 8, 512 held-out bytes of the run's own text",
        ("frozen weights, text", "MIUB, nats", "of a random adapter", "ratio", "held-out loss"),
        [
            (
                name,
                plus_minus(row["miub"]),
                f"{row['chance']:.2f}",
                f"{statistics.fmean(row['miub']) / row['chance']:.2f}",
                plus_minus(row["loss"]),
            )
            for name, row in found.items()
        ],
    )
    return found


def since_when(run) -> dict:
    """Print the first step from which MIUB, and the loss, stay near their last value."""
    steps = sorted(run.losses)
    total = {
        step: statistics.fmean(
            row.value for rows in run.during.history.values() for row in rows if row.step == step
        )
        for step in steps
    }
    settled = {}
    for name, curve in (("MIUB", total), ("held-out loss", run.losses)):
        last = curve[steps[-1]]
        for share in (0.1, 0.05):
            far = [s for s in steps if abs(curve[s] - last) > share * abs(last)]
            later = [s for s in steps if s > max(far, default=0)]
            settled[f"{name}, within {share:.0%}"] = later[0]
    table("Since when is it as at the end? First step", ("", "step"), list(settled.items()))
    return {"settled": settled, "miub": total, "loss": run.losses}


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo-output/miub_reading"))
    add("--short", action="store_true", help="fewer steps, one seed; says nothing")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse(argv)
    sizes = Sizes(20, 10, 1, 5) if args.short else Sizes()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    model = scaling.new_model(WIDTH)
    scaling.train(model, data.load("English")[0], sizes.pretraining, 2e-3, 0, CPU)
    weights = model.state_dict()
    _, text = data.load(TEXT)
    runs = [
        fine_tuned(weights, TEXT, seed, sizes, watched=seed == 0) for seed in range(sizes.seeds)
    ]
    results = {
        "scale": scale_of_a_value(runs[0], weights, text),
        "layers": which_layers(runs, weights, text, sizes),
        "runs": which_run(runs, weights, sizes),
        "settling": since_when(runs[0]),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for suffix in ("png", "svg"):
        runs[0].during.plot(args.output / f"miub_reading.{suffix}")
    print(f"\nWrote results.json, miub_reading.png and miub_reading.svg to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
