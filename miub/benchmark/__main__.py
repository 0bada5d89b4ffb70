"""``python -m miub.benchmark [truth|families|cost] [--short] [--device cpu|cuda]``."""

from __future__ import annotations

import argparse

import torch

from miub.benchmark import cost, families, ground_truth
from scalora.benchmark.machine import machine

_ALL = ["truth", "families", "cost"]


def main() -> None:
    """Run the chosen benchmarks and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m miub.benchmark", description=__doc__)
    parser.add_argument("which", nargs="*", help=f"of {', '.join(_ALL)}; default: all")
    parser.add_argument(
        "--short", action="store_true", help="truth: N = 128 alone; families: 2,000"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    which = arguments.which or _ALL
    unknown = set(which) - set(_ALL)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    print(machine(device))
    if "truth" in which:
        sizes = {"sizes": (128,)} if arguments.short else {}
        print(f"\n## truth\n\n{ground_truth.run(device, **sizes)}", flush=True)
    if "families" in which:
        table = families.run(device, 2000, 4) if arguments.short else families.run(device)
        print(f"\n## families\n\n{table}", flush=True)
    if "cost" in which:
        print(f"\n## cost\n\n{cost.run(device)}", flush=True)


if __name__ == "__main__":
    main()
