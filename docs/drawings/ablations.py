"""Draw the ablations' pictures again from the records in docs/ablations/records.

    python docs/drawings/ablations.py
    python docs/drawings/ablations.py domain-shift-range  # only some, by their prefixes

Each record folder is copied, reported by ``scalora ablate --report-only``, and the pictures named
below are put into docs/ablations, as SVG and PNG.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scalora import cli

ABLATIONS = Path(__file__).parents[1] / "ablations"

BY_RANK = (
    "lora:r=1,lora:r=2,lora,lora:r=8,lora:r=16,lora:r=32,full-adapted,full,"
    "scalora:r=1,scalora,scalora:accumulator=carry:carry_rank=16"
)
PEERS = "lora,lora+,dora,pissa,lora-ga,relora,reflora,hira,lora-fa,riemannian,scalora"
FOUR_RATES = ("--learning-rates", "2e-3,1e-2,2e-2,6e-2")
TWO_RATES = ("--learning-rates", "1e-2,2e-2")
ONE_SEARCHED = ("--seeds", "3", "--search-seeds", "1")

PICTURES = {
    "domain-shift": (
        ("--methods", "lora,scalora", *TWO_RATES, *ONE_SEARCHED),
        ("learning-curves", "spectra"),
    ),
    "domain-shift-range": (
        ("--methods", "lora,scalora,scalora:calibration=0", *FOUR_RATES, "--seeds", "1"),
        ("learning-rates",),
    ),
    "domain-shift-peers": (
        ("--methods", PEERS, *TWO_RATES, *ONE_SEARCHED),
        ("learning-and-forgetting",),
    ),
    "domain-shift-ranks": (
        ("--methods", BY_RANK, *TWO_RATES, "--seeds", "1"),
        ("training-state", "trainable-parameters", "learning-and-forgetting"),
    ),
    "4000-steps": (
        ("--methods", "lora,scalora", "--steps", "4000", *TWO_RATES, *ONE_SEARCHED),
        ("learning-curves",),
    ),
    "capacity": (
        ("--methods", "lora,lora:ranks=2,lora:r=4,lora:r=8,scalora", *TWO_RATES, *ONE_SEARCHED),
        ("trainable-parameters", "learning-and-forgetting"),
    ),
    "capacity-peers": (
        ("--methods", PEERS, *TWO_RATES, *ONE_SEARCHED),
        ("learning-and-forgetting",),
    ),
    "regression": (
        (
            *("--methods", "lora:r=1,lora:r=2,lora,lora:r=8,scalora"),
            *ONE_SEARCHED,
        ),
        ("trainable-parameters",),
    ),
    "regression-rules": (
        ("--methods", "lora,scalora,scalora:memory=15,scalora:rule=paper", *ONE_SEARCHED),
        ("learning-rates",),
    ),
}
"""Prefix of the pictures (records' folder, a suffix or none) -> what is compared, what is drawn."""

RECORDS = ("domain-shift", "4000-steps", "capacity", "regression")
"""Folders of records."""

TASKS = {"4000-steps": "domain-shift"}
"""Folder of records -> its task, where that is not its name."""


def main(prefixes: Sequence[str]) -> None:
    """Draw those with these prefixes, or all of them."""
    for prefix in prefixes or PICTURES:
        compared, names = PICTURES[prefix]
        records = next(name for name in RECORDS if prefix.startswith(name))
        task = TASKS.get(records, records)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / records
            shutil.copytree(ABLATIONS / "records" / records, output)
            cli.main(
                ["ablate", "--report-only", "--task", task, *compared, "--output", str(output)]
            )
            for name in names:
                for kind in ("svg", "png"):
                    drawn = output / task / f"{name}.{kind}"
                    shutil.copyfile(drawn, ABLATIONS / f"{prefix}-{name}.{kind}")


if __name__ == "__main__":
    main(sys.argv[1:])
