"""``python -m scalora.benchmark [step|fold|drift|language] [--device cpu|cuda]``."""

from __future__ import annotations

import argparse
import platform

import peft
import torch
import transformers

from scalora.benchmark import drift, fold, language, step

BENCHMARKS = {"step": step.run, "fold": fold.run, "drift": drift.run, "language": language.run}


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
    print(_machine(device))
    for name in arguments.which or BENCHMARKS:
        print(f"\n## {name}\n", flush=True)
        print(BENCHMARKS[name](device), flush=True)


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
