"""What the two runs are compared by: memory, the table, the plot."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from miub import MIUBReport

SMOOTHING = 20  # steps: the window of the training loss in the table and in the plot


def bytes_held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the model's weights and buffers and of the optimizer's state."""
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    tensors = [*model.parameters(), *model.buffers(), *filter(torch.is_tensor, state)]
    return sum(tensor.nbytes for tensor in tensors)


def peak_growth(work: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes that `work` had allocated at any one time beyond what was there.

    Both counts are of torch's own allocator: of tensors, not of the process.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocations = [event for event in events if event.get("name") == "[memory]"]
    allocations.sort(key=lambda event: event["ts"])
    growth = np.cumsum([event["args"]["Bytes"] for event in allocations])
    return int(max(growth, default=0))


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


def print_table(results: dict[str, dict[str, float]], console: Console) -> None:
    """Print one column for each run."""
    table = Table(title="Same seed, same weights, same batches")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for label, key, form in ROWS:
        table.add_row(label, *(form.format(result[key]) for result in results.values()))
    console.print(table)
    console.print(
        "Rank: singular values above 1/1000 of the largest, mean over the layers.\n"
        "Memory: weights, optimizer state and the most that torch allocates on top of\n"
        "them in a step that re-bases; the process itself holds more.",
        style="dim",
    )


ROWS = (
    (f"training loss (last {SMOOTHING} steps)", "training_loss", "{:.4f}"),
    ("held-out loss", "held_out_loss", "{:.4f}"),
    ("held-out accuracy", "held_out_accuracy", "{:.1%}"),
    ("rank of the change", "rank", "{:.1f}"),
    ("effective rank of the change", "effective_rank", "{:.1f}"),
    ("MIUB, mean of the layers, nats", "miub", "{:.2f}"),
    ("seconds a step (median)", "seconds_a_step", "{:.3f}"),
    ("peak memory, MiB", "peak_mebibytes", "{:.1f}"),
)


def print_reliance(reports: dict[str, MIUBReport], console: Console) -> None:
    """Print each run's mutual information between frozen and learned path, layer by layer."""
    first = next(iter(reports.values()))
    table = Table(title="MIUB: how much the change leans on the pretrained weights, in nats")
    table.add_column("layer", no_wrap=True)
    for name in reports:
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("least", justify="right", no_wrap=True)
    for layer in first.layers:
        rows = [measured[layer] for measured in reports.values()]
        cells = [(f"{row.value:.2f} ± {row.stderr:.2f}", f"{row.lower:.2f}") for row in rows]
        table.add_row(short_name(layer), *(text for cell in cells for text in cell))
    table.add_section()
    for kind in first.by_kind():
        means = [measured.by_kind()[kind].mean for measured in reports.values()]
        table.add_row(f"mean of {kind}", *(t for mean in means for t in (f"{mean:.2f}       ", "")))
    means = [measured.mean for measured in reports.values()]
    table.add_row("mean of all", *(t for mean in means for t in (f"{mean:.2f}       ", "")))
    console.print(table)
    console.print(
        f"Upper bound ({first.estimator}) ± standard error, and a lower bound (InfoNCE), of the\n"
        "mutual information between what the pretrained weight and what the whole change give to\n"
        f"a layer's output; noise tau = {first.noise:g}, {next(iter(first)).tokens:,} held-out "
        "tokens. Lower: the change relies less on\nwhat was pretrained. LoRA's change has "
        f"{next(iter(first)).rank} coordinates, ScaLoRA's up to 64: compare layers, not runs.",
        style="dim",
    )


def short_name(layer: str) -> str:
    """Return the layer's name from its block's number on: "0.attention.self.query"."""
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] :]) if numbers else layer


def plot_reliance(reports: dict[str, MIUBReport], path: Path) -> None:
    """Draw the runs' upper bounds, a point for each layer, grouped by kind of module."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    kinds = list(next(iter(reports.values())).by_kind())
    for offset, color, (name, measured) in zip(
        (-0.15, 0.15), ("#7f7f7f", "#c2410c"), reports.items(), strict=True
    ):
        rows = list(measured)
        x = [kinds.index(row.kind) + offset for row in rows]
        axes.plot(x, [row.value for row in rows], "o", color=color, alpha=0.6, label=name)
    axes.set_xticks(range(len(kinds)), kinds, rotation=25, ha="right")
    axes.set_ylabel("MIUB (nats)")
    axes.set_title("Reliance on the pretrained weights, a point a layer", loc="left")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


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


def plot_losses(losses: dict[str, list[float]], held_out: dict[str, float], path: Path) -> None:
    """Draw both training curves, raw and smoothed, and the held-out losses at the end."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, values), color in zip(losses.items(), ("#7f7f7f", "#c2410c"), strict=True):
        steps = np.arange(1, len(values) + 1)
        axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smoothed(values), color=color, linewidth=2, label=name)
        axes.plot(len(values), held_out[name], "o", color=color, clip_on=False)
    axes.plot([], [], "o", color="black", label="held out, at the end")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats)")
    axes.set_title(f"Training loss, mean of {SMOOTHING} steps", loc="left")
    axes.set_xlim(1, max(len(values) for values in losses.values()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
