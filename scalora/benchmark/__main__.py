"""``python -m scalora.benchmark [step|fold|drift] [--device cpu|cuda]``."""

from __future__ import annotations

import argparse
import platform

import peft
import torch
import transformers

from scalora.benchmark import drift, fold, step

BENCHMARKS = {"step": step.run, "fold": fold.run, "drift": drift.run}


def main() -> None:
    """Run the chosen benchmarks and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m scalora.benchmark", description=__doc__)
    parser.add_argument("which", nargs="*", choices=[*BENCHMARKS, []], help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(_machine(device))
    for name in arguments.which or BENCHMARKS:
        print(f"\n## {name}\n")
        print(BENCHMARKS[name](device))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return (
        f"{hardware}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}"
    )


if __name__ == "__main__":
    main()
