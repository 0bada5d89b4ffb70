"""What only a GPU can show, in one table and under eight minutes.

    python -m examples.benchmark.gpu [--wheels FOLDER]

Every section runs in a process of its own, so one that fails or takes too long leaves the others'
rows.  ``--device cpu --small`` tries all of it out without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from examples.benchmark.gpu.sections import SECTIONS, Row
from examples.benchmark.machine import machine
from examples.benchmark.table import markdown
from scalora.device_option import add_device_option

_SECONDS = 460  # for all sections
_ROOT = Path(__file__).parents[3]


def main() -> None:
    """Run the sections, or one in this process, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_device_option(parser)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it out")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels to use beside what is installed: bitsandbytes"
    )
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=[*SECTIONS])
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section is not None:
        print(json.dumps(SECTIONS[arguments.section](arguments.device, arguments.small)))
        return
    with tempfile.TemporaryDirectory() as folder:
        variables = environment(arguments.wheels, folder)
        rows = all_rows(arguments.only, arguments.device, arguments.small, variables)
    print(f"{machine(arguments.device)}\n\n{markdown(['measured', 'value', 'beside'], rows)}")


def all_rows(
    names: Sequence[str], device: torch.device, small: bool, variables: Mapping[str, str]
) -> list[Row]:
    """Return the rows of these sections, each run with these environment variables."""
    end = time.monotonic() + _SECONDS
    rows = []
    for name in names:
        left = end - time.monotonic()
        print(f"{name} ({left:.0f} seconds left)", file=sys.stderr, flush=True)
        rows += _rows(_section_command(name, device, small), name, variables, left)
    return rows


def _section_command(name: str, device: torch.device, small: bool) -> list[str]:
    own = [sys.executable, "-m", "examples.benchmark.gpu", "--section", name]
    return [*own, "--device", str(device), *(["--small"] if small else [])]


def _rows(
    command: Sequence[str], name: str, variables: Mapping[str, str], seconds: float
) -> list[Row]:
    """Return a section's rows; one row that says why, if it has none."""
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            env=variables,
            capture_output=True,
            text=True,
            check=True,
            timeout=max(1.0, seconds),
        )
    except subprocess.TimeoutExpired:
        return [Row(name, "not finished", f"the time of all sections, {_SECONDS} s, was over")]
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr, flush=True)
        return [Row(name, "failed", (error.stderr.strip().splitlines() or [""])[-1])]
    return [Row(*row) for row in json.loads(done.stdout.strip().splitlines()[-1])]


def environment(wheels: Path | None, folder: str) -> dict[str, str]:
    """Return the variables of a section's process.

    Args:
        wheels: a folder of them, or None.
        folder: to write to; wheels in it come before what is installed.

    Raises:
        SystemExit: there are no wheels.
    """
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if wheels is not None:
        files = [str(path) for path in sorted(wheels.glob("*.whl"))]
        if not files:
            raise SystemExit(f"there are no wheels in {wheels}.")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--target", folder, *files], check=True)
        paths.insert(1, folder)
    # Triton writes what it compiles to the home folder, where not everybody may write.
    compiled = {"TRITON_CACHE_DIR": os.path.join(folder, "triton")}
    own = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return {**compiled, **os.environ, **own}


if __name__ == "__main__":
    main()
