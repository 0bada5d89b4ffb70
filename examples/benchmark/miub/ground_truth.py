"""Every estimator on pairs whose mutual information is known."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from examples.benchmark.miub.distributions import Pair, suite
from examples.benchmark.miub.published_club import vclub
from examples.benchmark.table import markdown
from miub.estimators import Estimate, club, gaussian, infonce, l1out, ranked, tempered, vub
from miub.estimators.crossfit import fewest_in_a_half

_REPETITIONS = {128: 20, 512: 10, 4096: 4}
_TOGETHER = 10 * 512 * 512  # numbers of u in one call, or the pairs of all would not fit
_COVERED = 0.9
_ON_HALVES = {"club", "vub", "l1out", "infonce"}
_UPPER: dict[str, Callable[..., Estimate]] = {
    "tempered": tempered,
    "ranked": ranked,
    "gaussian": gaussian,
    "club": club,
    "vub": vub,
    "l1out": l1out,
}
_FEW = 5  # repetitions of vCLUB, which trains networks
_LOWER = {"infonce": infonce}
_SMALLEST = 1e-2  # nats: a bound that misses by less is not called broken


@dataclass(frozen=True)
class _Result:
    pair: Pair
    estimator: str
    values: list[float]
    covered: float
    seconds: float

    @property
    def bias(self) -> float:
        return statistics.fmean(self.values) - self.pair.truth

    @property
    def spread(self) -> float:
        return statistics.stdev(self.values)


def run(device: torch.device, sizes: tuple[int, ...] = tuple(_REPETITIONS)) -> str:
    """A table for each sample size, and a summary of all."""
    parts, everything = [], []
    for n in sizes:
        results = _results(n, device)
        everything += results
        parts.append(f"### N = {n}, {_REPETITIONS[n]} repetitions\n\n{_table(results)}")
    parts.append(f"### Summary\n\n{_summary(everything)}\n\n{_NOTE}")
    return "\n\n".join(parts)


_NOTE = (
    "Cells: bias ± standard deviation in nats, and the share of repetitions with estimate >= truth "
    "- 2 standard\nerrors (infonce: <= truth + 2); empty where so few samples are refused. vCLUB, "
    "vCLUB-S: 5 repetitions, as described\nin arXiv 2006.12013, trained and evaluated on the same "
    "samples; they have no standard error and no noise model, so their\n"
    "noise is drawn.\nSummary: covered: rows and sizes in which at least 90 % of the repetitions "
    "are, or the mean misses by less than\n"
    f"{_SMALLEST:g} nats; looseness: median of estimate / truth where the truth is at least 2 "
    "nats; ms: a call, median."
)


def _results(n: int, device: torch.device) -> list[_Result]:
    pairs = [p for p in suite() if n < 4096 or not p.family.startswith("layer")]
    results = []
    for number, pair in enumerate(track(pairs, f"N = {n}", transient=True)):
        generator = torch.Generator(device).manual_seed(1000 * n + number)
        u, v = pair.sample((_REPETITIONS[n], n), generator)
        for name, estimator in {**_UPPER, **_LOWER}.items():
            results += _one(pair, name, estimator, u, v)
        if pair.noise in (0, 0.01):  # networks take long
            results += _published(pair, u[:_FEW], v[:_FEW], generator)
    return results


def _one(
    pair: Pair, name: str, estimator: Callable[..., Estimate], u: Tensor, v: Tensor
) -> list[_Result]:
    """The result, or nothing where the estimator refuses so few samples."""
    if not pair.noise and name in _ON_HALVES:
        fewest = 2 * fewest_in_a_half(v.shape[-1])
        if u.shape[-2] < fewest:
            return []
    started = time.perf_counter()
    together = max(1, _TOGETHER // (u.shape[-2] * max(512, *u.shape[-2:])))
    parts = zip(u.split(together), v.split(together), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of heavy tails, which are what is measured
        found = [estimator(a, b, noise=pair.noise) for a, b in parts]
    values = torch.cat([e.value for e in found]).double().cpu()
    errors = torch.cat([e.stderr for e in found]).double().cpu()
    seconds = (time.perf_counter() - started) / len(values)
    covered = share_within(values.tolist(), errors.tolist(), pair.truth, lower=name in _LOWER)
    return [_Result(pair, name, values.tolist(), covered, seconds)]


def share_within(
    values: Sequence[float], errors: Sequence[float], truth: float, *, lower: bool
) -> float:
    """Share of the bounds that are on their side of the truth, two standard errors allowed."""
    sign = -1 if lower else 1
    inside = [sign * (v - truth) >= -2 * e for v, e in zip(values, errors, strict=True)]
    return sum(inside) / len(inside)


def is_covered(
    values: Sequence[float], errors: Sequence[float], truth: float, *, lower: bool
) -> bool:
    """Return whether 90 % of the bounds hold, or their mean misses by less than 0.01 nats."""
    missed = (statistics.fmean(values) - truth) * (1 if lower else -1)
    share = share_within(values, errors, truth, lower=lower)
    return share >= _COVERED or missed < _SMALLEST


def _published(pair: Pair, u: Tensor, v: Tensor, generator: torch.Generator) -> list[_Result]:
    u, v = (_noisy(x, pair.noise, generator) for x in (u, v))
    started = time.perf_counter()
    all_pairs, sampled = (values.double().cpu() for values in vclub(u, v))
    seconds = (time.perf_counter() - started) / len(u)
    return [
        _Result(pair, name, values.tolist(), (values >= pair.truth).double().mean().item(), seconds)
        for name, values in (("vCLUB", all_pairs), ("vCLUB-S", sampled))
    ]


def _noisy(x: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    spread = (noise * x.var(-2, keepdim=True).mean(-1, keepdim=True)).sqrt()
    return x + spread * torch.randn(x.shape, generator=generator, device=x.device)


def _names(results: list[_Result]) -> list[str]:
    return list(dict.fromkeys(result.estimator for result in results))


def _table(results: list[_Result]) -> str:
    rows: dict[tuple[str, str, float], dict[str, str]] = {}
    for result in results:
        cell = f"{_short(result.bias)} ± {_short(result.spread).lstrip('+')} ({result.covered:.0%})"
        key = (result.pair.family, result.pair.name, result.pair.truth)
        rows.setdefault(key, {})[result.estimator] = cell
    names = _names(results)
    header = ["pair", "", "truth", *names]
    body = [
        [family, name, f"{truth:.2f}", *(cells.get(n, "") for n in names)]
        for (family, name, truth), cells in rows.items()
    ]
    return markdown(header, body)


def _short(x: float) -> str:
    if not math.isfinite(x):
        return str(x)
    return f"{x:+.2f}" if abs(x) < 10 else f"{x:+.0f}" if abs(x) < 1e4 else f"{x:+.0e}"


def _summary(results: list[_Result]) -> str:
    rows = []
    for name in _names(results):
        own = [r for r in results if r.estimator == name]
        rows.append(
            [
                name,
                _share(own, ("Gaussian", "independent", "rotation")),
                _share(own, ("layer",)),
                _share(own, ("cube", "asinh", "half-cube", "spiral")),
                _share(own, ("Student-t", "mixture")),
                f"{_looseness(own, 'Gaussian'):.2f}",
                f"{_looseness(own, 'layer'):.2f}",
                f"{1e3 * statistics.median(r.seconds for r in own):.0f}",
            ]
        )
    header = [
        "estimator",
        "covered: Gaussian",
        "layers",
        "images",
        "t, mixture",
        "looseness: Gaussian",
        "layers",
        "ms",
    ]
    return markdown(header, rows)


def _share(results: list[_Result], families: tuple[str, ...]) -> str:
    chosen = [r for r in results if r.pair.family.startswith(families)]
    lower = chosen[0].estimator in _LOWER
    good = [
        r for r in chosen if r.covered >= _COVERED or (r.bias if lower else -r.bias) < _SMALLEST
    ]
    return f"{len(good)} of {len(chosen)}"


def _looseness(results: list[_Result], family: str) -> float:
    chosen = [r for r in results if r.pair.family.startswith(family) and r.pair.truth >= 2]
    return statistics.median(statistics.fmean(r.values) / r.pair.truth for r in chosen)
