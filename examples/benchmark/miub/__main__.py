"""``python -m examples.benchmark.miub [truth|families|cost] [--short] [--device cpu|cuda]``."""

from __future__ import annotations

import argparse

from examples.benchmark.machine import machine
from examples.benchmark.miub import cost, families, ground_truth
from scalora.device_option import add_device_option

_ALL = ["truth", "families", "cost"]


def main() -> None:
    """Run the chosen benchmarks and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.miub", description=__doc__)
    parser.add_argument("which", nargs="*", help=f"of {', '.join(_ALL)}; default: all")
    parser.add_argument(
        "--short", action="store_true", help="truth: N = 128 alone; families: 2,000"
    )
    add_device_option(parser)
    arguments = parser.parse_args()
    which = arguments.which or _ALL
    unknown = set(which) - set(_ALL)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}")
    device = arguments.device
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
