"""``python -m scalora.benchmark [step|quantized|fold|drift|language] [--device cpu|cuda]``."""

from __future__ import annotations

import argparse

import torch

from scalora.benchmark import drift, fold, language, step
from scalora.benchmark.machine import machine

BENCHMARKS = {
    "step": step.run,
    "quantized": step.run_quantized,
    "fold": fold.run,
    "drift": drift.run,
    "language": language.run,
}


def main() -> None:
    """Run the chosen benchmarks and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m scalora.benchmark", description=__doc__)
    parser.add_argument("which", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    unknown = set(arguments.which) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}")
    device = torch.device(arguments.device)
    print(machine(device))
    for name in arguments.which or BENCHMARKS:
        print(f"\n## {name}\n", flush=True)
        print(BENCHMARKS[name](device), flush=True)


if __name__ == "__main__":
    main()
