"""Report that compares the four runs: bytes, the base's own bytes, the table, the plot."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from finetune_report import smoothed
from rich.console import Console
from rich.table import Table
from torch import Tensor

import scalora

UNCHANGED = "unchanged"
MEBIBYTE = 2**20

ROWS = (
    ("held-out loss before", "held_out_before", "{:.4f}"),
    ("training loss, last {window} steps", "training_loss", "{:.4f}"),
    ("held-out loss", "held_out_loss", "{:.4f}"),
    ("base, MiB", "base_bytes", "{:.2f}"),
    ("  layers with an adapter", "layer_bytes", "{:.2f}"),
    ("adapter, MiB", "adapter_bytes", "{:.2f}"),
    ("optimizer's state, MiB", "state_bytes", "{:.2f}"),
    ("calibration, reports, MiB", "own_bytes", "{:.2f}"),
    ("carry, MiB", "carry_bytes", "{:.2f}"),
    ("columns of a carry, most", "carry_columns", "{}"),
    ("re-basings", "rebasings", "{}"),
    ("largest cut energy", "largest_cut", "{:.1e}"),
    ("base after training", "base", "{}"),
    ("seconds per step (median)", "seconds_a_step", "{:.3f}"),
)


def measure(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]
) -> dict[str, Any]:
    """Return what can be told of a trained run without computing with it."""
    return {
        "training_loss": float(smoothed(losses, window_of(len(losses)))[-1]),
        "base_bytes": stored_bytes(base_tensors(model)),
        "layer_bytes": stored_bytes(base_tensors(model, layers_only=True)),
        "adapter_bytes": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "state_bytes": stored_bytes(state_tensors(optimizer)),
        **rebasing(optimizer),
    }


def rebasing(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what re-basing did; None where there is no such thing."""
    found: dict[str, Any] = dict.fromkeys(
        ("own_bytes", "carry_bytes", "carry_columns", "rebasings", "largest_cut")
    )
    if not isinstance(optimizer, scalora.ScaLoRA):
        return found
    own = stored_bytes(optimizer.kept_tensors())
    layers = optimizer.report()
    found["rebasings"] = optimizer.rebase_count
    if any(layer.accumulator == "carry" for layer in layers):
        found["carry_bytes"] = sum(layer.bytes for layer in layers)
        found["carry_columns"] = max(layer.columns for layer in layers)
        found["largest_cut"] = layers.largest_cut
    found["own_bytes"] = own - (found["carry_bytes"] or 0)
    return found


def base_tensors(model: torch.nn.Module, layers_only: bool = False) -> Iterator[Tensor]:
    """Yield all that a PEFT model's base is stored in: weights, codes and their scales."""
    for name, module in model.named_modules():
        if ".lora_" in name or (layers_only and not name.endswith(".base_layer")):
            continue
        for parameter in module.parameters(recurse=False):
            yield parameter.detach()
            yield from scales(getattr(parameter, "quant_state", None))


def scales(state: Any) -> Iterator[Tensor]:
    """Yield what dequantizes the codes of a 4-bit weight; double quantization nests it."""
    if state is None:
        return
    yield from filter(torch.is_tensor, (state.absmax, state.code, state.offset))
    yield from scales(state.state2)


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the optimizer's own state."""
    for entry in optimizer.state.values():
        yield from filter(torch.is_tensor, entry.values())


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all of them, each once: weights are tied, tables of levels shared."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return a hash of their very bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def compare(expected: Tensor, answered: Tensor) -> dict[str, float]:
    """Return how far the logits of a reloaded model lie from those of the trained one."""
    same = (expected.argmax(-1) == answered.argmax(-1)).float().mean().item()
    return {"logit_difference": (expected - answered).abs().max().item(), "agreement": same}


def window_of(steps: int) -> int:
    """Return how many steps the training loss is a mean of."""
    return max(1, min(20, steps // 2))


def print_table(results: dict[str, dict[str, Any]], steps: int, console: Console) -> None:
    """Print one column for each run; a cell is empty where a run has no such thing."""
    table = Table(title="Same seed, same adapter, same batches")
    table.add_column("", no_wrap=True)
    for name in results:
        table.add_column("\n".join(name.split(", ")), justify="right")
    for label, key, form in ROWS:
        values = [result[key] for result in results.values()]
        if key.endswith("_bytes"):
            values = [None if value is None else value / MEBIBYTE for value in values]
        cells = ["" if value is None else form.format(value) for value in values]
        table.add_row(label.format(window=window_of(steps)), *cells)
    console.print(table)
    console.print(
        "Base: codes, scales and everything that is not quantized (embeddings, norms).\n"
        "Calibration: three numbers per element of the adapter, until 100 steps after the peak\n"
        "of the learning rate.\n"
        "Cut energy: of the layer that lost most, relative to what it has learned.",
        style="dim",
    )


def print_proof(
    reloaded: dict[str, dict[str, float]], tokens: int, bound: float, console: Console
) -> None:
    """Say of each reloaded model how its logits compare with the trained model's."""
    console.print(
        f"ScaLoRA in NF4, saved and loaded again; logits of {tokens} held-out tokens, in float32:"
    )
    for name, result in reloaded.items():
        difference, agreement = result["logit_difference"], result["agreement"]
        verdict = "same" if difference <= bound else "DIFFERENT"
        console.print(
            f"  {name + '/':8} {verdict}: logits within {difference:.1e} (bound {bound:g}), "
            f"{agreement:.1%} of next tokens equal"
        )


def write_json(options: dict[str, Any], content: dict[str, Any]) -> None:
    """Write the numbers to the output beside the settings that they were measured with."""
    settings = {**options, "device": options["device"].type, "torch": torch.__version__}
    settings["text"] = [path.name for path in options["text"] or ()]
    for path in ("model", "output"):
        settings[path] = Path(options[path]).name
    text = json.dumps({"settings": settings, **content}, indent=2)
    (options["output"] / "results.json").write_text(text + "\n", encoding="utf-8")


def plot_losses(losses: dict[str, list[float]], held_out: dict[str, float], path: Path) -> None:
    """Draw the training curves, smoothed, and the held-out losses at the end."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    window = window_of(max(map(len, losses.values())))
    for name, values in losses.items():
        color = "#c2410c" if name.startswith("ScaLoRA") else "#7f7f7f"
        style = "-" if name.endswith("NF4") else ":"
        steps = np.arange(1, len(values) + 1)
        axes.plot(steps, smoothed(values, window), style, color=color, linewidth=2, label=name)
        marker = "o" if name.endswith("NF4") else "x"
        axes.plot(len(values), held_out[name], marker, color=color, clip_on=False)
    axes.plot([], [], "o", color="black", label="held out, at the end, NF4")
    axes.plot([], [], "x", color="black", label="held out, at the end, float32")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(f"Training loss, mean of {window} steps", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
