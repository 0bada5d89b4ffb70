"""Which of the forty tasks of the "Beyond Normal" benchmark each estimator covers."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track

from examples.benchmark.miub.beyond_normal import tasks
from examples.benchmark.miub.distributions import Pair
from examples.benchmark.miub.ground_truth import is_covered
from examples.benchmark.table import markdown
from miub.estimators import Estimate, club, gaussian, infonce, l1out, ranked, tempered, vub
from miub.estimators.estimate import is_heavy

_SAMPLES = 10_000  # as in the paper
_REPETITIONS = 5
_OF_PAIRS = {"club", "l1out", "infonce"}
_FEWER = 4096  # of those whose cost is that of all pairs
_ESTIMATORS: dict[str, Callable[..., Estimate]] = {
    "tempered": tempered,
    "ranked": ranked,
    "gaussian": gaussian,
    "club": club,
    "vub": vub,
    "l1out": l1out,
    "infonce": infonce,
}

_NOTE = (
    "Cells: mean of the estimates, nats; club, l1out and infonce, which take all pairs, of at most "
    f"{_FEWER} samples.\n*: not covered: fewer than 90 % of the repetitions are at least the truth "
    "- 2 standard errors (infonce: at most + 2),\nand the mean misses by 0.01 nats or more. ~: in "
    "most repetitions a single sample holds more than a tenth of the\nvariance, and the estimator "
    "warns; it covers nothing then."
)


@dataclass(frozen=True)
class _Cell:
    mean: float
    covered: bool
    heavy: bool

    def __str__(self) -> str:
        mark = " ~" if self.heavy else "" if self.covered else " *"
        return f"{self.mean:.2f}{mark}"


def run(
    device: torch.device,
    samples: int = _SAMPLES,
    repetitions: int = _REPETITIONS,
    *,
    pairs: Sequence[Pair] | None = None,
) -> str:
    """Return a line for each task, and for each family how many of its tasks are covered.

    Args:
        device: of the samples.
        samples: of each task.
        repetitions: with other samples.
        pairs: None: all forty tasks.
    """
    pairs = tasks() if pairs is None else pairs
    results = [
        (pair, _cells(pair, number, samples, repetitions, device))
        for number, pair in enumerate(track(pairs, "tasks", transient=True))
    ]
    title = f"### Families\n\n{_families(results)}\n\n### N = {samples}, {repetitions} repetitions"
    return f"{title}\n\n{_table(results)}\n\n{_NOTE}"


def _cells(
    pair: Pair, number: int, samples: int, repetitions: int, device: torch.device
) -> dict[str, _Cell]:
    generator = torch.Generator(device).manual_seed(number)
    found: dict[str, list[Estimate]] = {name: [] for name in _ESTIMATORS}
    # One at a time: the pairs of thousands of samples take much memory.
    for _ in range(repetitions):
        u, v = pair.sample((samples,), generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the table has a mark for it
            for name, estimator in _ESTIMATORS.items():
                n = min(samples, _FEWER) if name in _OF_PAIRS else samples
                found[name].append(estimator(u[:n], v[:n]))
    return {name: _cell(pair, estimates, name) for name, estimates in found.items()}


def _cell(pair: Pair, estimates: list[Estimate], name: str) -> _Cell:
    values = [float(estimate.value) for estimate in estimates]
    errors = [float(estimate.stderr) for estimate in estimates]
    lower = name == "infonce"
    # A lower bound is one whatever the moments are.
    heavy = (
        not lower
        and statistics.median(
            e.heaviest is not None and is_heavy(float(e.heaviest), e.n) for e in estimates
        )
        == 1
    )
    covered = not heavy and is_covered(values, errors, pair.truth, lower=lower)
    return _Cell(statistics.fmean(values), covered, heavy)


def _table(results: list[tuple[Pair, dict[str, _Cell]]]) -> str:
    body = [
        [pair.family, pair.name, f"{pair.truth:.2f}", *map(str, cells.values())]
        for pair, cells in results
    ]
    return markdown(["family", "task", "truth", *_ESTIMATORS], body)


def _families(results: list[tuple[Pair, dict[str, _Cell]]]) -> str:
    families = dict.fromkeys(pair.family for pair, _ in results)
    body = []
    for family in (*families, "all"):
        own = [cells for pair, cells in results if family in (pair.family, "all")]
        counts = [sum(cells[name].covered for cells in own) for name in _ESTIMATORS]
        body.append([family, *(f"{count} of {len(own)}" for count in counts)])
    return markdown(["covered", *_ESTIMATORS], body)
