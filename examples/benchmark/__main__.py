"""``python -m examples.benchmark [step|overhead|quantized|...] [--device cpu|cuda]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from examples.benchmark import (
    carry_bytes,
    checkpoint,
    communication,
    drift,
    fold,
    long_run,
    overhead,
    step,
    survival,
)
from examples.benchmark.machine import machine
from scalora.device_option import add_device_option

BENCHMARKS: dict[str, Callable[[torch.device], str]] = {
    "step": step.run,
    "overhead": overhead.run,
    "quantized": step.run_quantized,
    "carry": carry_bytes.run,
    "survival": survival.run,
    "fold": fold.run,
    "drift": drift.run,
    "checkpoint": checkpoint.run,
    "long-run": long_run.run,
    "communication": communication.run,
}


def main() -> None:
    """Run the chosen benchmarks and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark", description=__doc__)
    names = f"of {', '.join(BENCHMARKS)}; default: all but long-run"
    parser.add_argument("which", nargs="*", help=names)
    add_device_option(parser)
    parser.add_argument("--plot", type=Path, help="survival: draw its curves to this file")
    parser.add_argument("--steps", type=int, default=long_run.STEPS, help="long-run: of each row")
    parser.add_argument(
        "--blocks", type=int, default=step.BLOCKS, help="step, quantized: of ten rounds each"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.which) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}")
    benchmarks = dict(BENCHMARKS)
    for name, run in (("step", step.run), ("quantized", step.run_quantized)):
        benchmarks[name] = partial(run, blocks=arguments.blocks)
    benchmarks["survival"] = partial(survival.run, plot=arguments.plot)
    benchmarks["long-run"] = partial(long_run.run, steps=arguments.steps)
    print(machine(arguments.device))
    for name in arguments.which or [name for name in BENCHMARKS if name != "long-run"]:
        print(f"\n## {name}\n", flush=True)
        print(benchmarks[name](arguments.device), flush=True)


if __name__ == "__main__":
    main()
