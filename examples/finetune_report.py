"""Report that compares the runs: memory, the table, the plot."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from miub import MIUBReport
from scalora.plotting import new_figure, write_figure
from scalora.plotting.figures import LORA, SCALORA, style

# Color and line of each method in turn; the first shows beneath one that equals it.
STROKES = ((LORA, "-", 4.0), (SCALORA, "-", 2.0), ("#aa3377", (0, (5, 2)), 1.6))
SMOOTHING = 20  # steps: the window of the training loss in the table and in the plot


INTRODUCTION = """\
Is a sentence {classes}? {training:,} sentences to train on, {held_out:,} held out to test on.
Each of three methods trains {steps} steps on {device}:
  LoRA          an adapter of rank {rank} beside every pretrained weight, which is frozen
  ScaLoRA       the same, re-based: once in 10 steps a part of what the adapter has learned
                moves into the weight; no answer changes, and the adapter has room for more.
                In the warm-up and the 100 steps after it, it also finds how long its
                steps should be
  paper's rule  ScaLoRA, re-based on every step, as in the paper (arXiv 2510.23818)
Each runs from two seeds. A seed draws the classification head, the batches and the dropout,
the same for every method; the pretrained weights are always the same.
"""


def seconds_a_step(seconds: list[float], interval: int) -> float:
    """Return the median over windows of `interval` steps of their mean.

    Each window holds one re-basing, so its cost is spread over the steps it serves. The
    first window is left out: it warms caches up.
    """
    whole = len(seconds) // interval * interval
    windows = np.reshape(seconds[:whole], (-1, interval)).mean(axis=1)
    return float(np.median(windows[1:] if len(windows) > 1 else seconds))


def smoothed(losses: list[float], window: int = SMOOTHING) -> np.ndarray:
    """Return the mean of each loss with up to window - 1 losses before it."""
    sums = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def print_table(results: dict[str, dict[str, list[float]]], console: Console) -> None:
    """Print one column for each method: means over the seeds, and how far these lie apart."""
    table = Table(title="Mean of two seeds ± half their difference")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right", no_wrap=True)
    for label, key, form in ROWS:
        table.add_row(label, *(form.format(*across(result[key])) for result in results.values()))
    console.print(table)
    console.print(
        "±: what another seed alone changes; a smaller gap between two methods may be chance.\n"
        f"Loss: cross-entropy in nats; in training, mean of the last {SMOOTHING} steps.\n"
        "Effective rank: over how many directions the change of a weight spreads (exp of the\n"
        "entropy of its singular values), mean of the layers. Seconds: median.\n"
        "Peak memory: weights, optimizer state, what ScaLoRA keeps, and the most that torch\n"
        "allocates on top of them in a step that re-bases; the process itself holds more.",
        style="dim",
    )


def across(seeds: Sequence[float]) -> tuple[float, float]:
    """Return the mean over the seeds and half of how far they lie apart."""
    return float(np.mean(seeds)), float(np.ptp(seeds) / 2)


ROWS = (  # a form that leaves out the second number: one that no seed changes
    ("held-out loss", "held_out_loss", "{:.4f} ± {:.4f}"),
    ("held-out accuracy", "held_out_accuracy", "{:.1%} ± {:.1%}"),
    ("training loss", "training_loss", "{:.4f} ± {:.4f}"),
    ("times re-based", "rebased", "{:.0f}"),
    ("effective rank", "effective_rank", "{:.1f} ± {:.1f}"),
    ("seconds per step", "seconds_per_step", "{:.3f} ± {:.3f}"),
    ("peak memory, MiB", "peak_mebibytes", "{:.1f}"),
)


def print_reliance(layers: MIUBReport, console: Console) -> None:
    """Print the mutual information between frozen and learned path for each kind of layer."""
    table = Table(title="MIUB of ScaLoRA's last run, nats")
    for column in ("kind of layer", "layers", "mean", "from", "to"):
        table.add_column(column, justify="left" if column == "kind of layer" else "right")
    for kind, total in layers.by_kind().items():
        values = [row.value for row in layers if row.kind == kind]
        numbers = (f"{value:.2f}" for value in (total.mean, min(values), max(values)))
        table.add_row(kind, str(total.layers), *numbers)
    console.print(table)
    console.print(
        "MIUB: an upper bound on the mutual information between what the pretrained weight and\n"
        "what the change of it give to a layer's output, on held-out sentences. Lower: the change\n"
        "leans less on what was pretrained. Every layer is in miub.json and miub.png.",
        style="dim",
    )


def print_proof(
    reloaded: dict[str, dict[str, float]],
    sentences: int,
    adapter_error: float,
    bound: float,
    console: Console,
) -> None:
    """Say of each reloaded model how its answers compare with the trained model's."""
    console.print(f"Saved and loaded again; answers to {sentences} held-out sentences:")
    for name, result in reloaded.items():
        difference, agreement = result["logit_difference"], result["agreement"]
        verdict = "same" if difference <= bound else "DIFFERENT"
        console.print(
            f"  {name + '/':8} {verdict}: logits within {difference:.1e} (bound {bound:g}), "
            f"{agreement:.1%} of answers equal"
        )
    console.print(
        f"  The adapter keeps every layer's change to a relative error of {adapter_error:.1e}."
    )


def plot_losses(
    losses: dict[str, list[list[float]]], held_out: dict[str, list[float]], path: Path
) -> None:
    """Draw each method's training curve, its seeds behind it, and the held-out loss at the end.

    Written to `path` and, as a vector file, beside it with the suffix .svg.
    """
    with style():
        figure = loss_figure(losses, held_out)
    for file in (path, path.with_suffix(".svg")):
        write_figure(figure, file)


def loss_figure(losses: dict[str, list[list[float]]], held_out: dict[str, list[float]]) -> Figure:
    """Return the figure of `plot_losses`."""
    figure, ((axes,),) = new_figure(7, 4.2)
    for (name, seeds), (color, line, width) in zip(losses.items(), STROKES, strict=True):
        curves = [smoothed(values) for values in seeds]
        steps = np.arange(1, len(curves[0]) + 1)
        for curve in curves:
            axes.plot(steps, curve, color=color, alpha=0.3, linewidth=0.8)
        mean = np.mean(curves, axis=0)
        axes.plot(steps, mean, color=color, linestyle=line, linewidth=width, label=name)
        end = np.mean(held_out[name])
        axes.plot(steps[-1], end, "o", color=color, markersize=4 + 1.5 * width, clip_on=False)
    axes.plot([], [], color="black", alpha=0.3, linewidth=0.8, label="each of two seeds")
    axes.plot([], [], "o", color="black", label="held out, at the end")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats, lower is better)")
    axes.set_title(f"Training loss, mean of {SMOOTHING} steps and of two seeds")
    axes.set_xlim(1, len(steps))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure
