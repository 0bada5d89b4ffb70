"""One colour, line and marker per method, the same in every picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scalora.ablation.methods import RECIPES, label_of
from scalora.ablation.methods.adapter import Adapter
from scalora.ablation.methods.lora import LoRA
from scalora.ablation.methods.spec import parse
from scalora.ablation.plan import TaskPlan
from scalora.ablation.report.results import MethodResult
from scalora.plotting.figures import FULL, LORA, SCALORA

_COLOURS = {
    "lora": LORA,
    "scalora": SCALORA,
    "full": FULL,
    "full-adapted": "#777777",
    "lora+": "#33bbee",
    "riemannian": "#009988",
    "lora-fa": "#88ccee",
    "reflora": "#117733",
    "dora": "#332288",
    "pissa": "#44aa99",
    "lora-ga": "#999933",
    "relora": "#aa4499",
    "hira": "#cc6677",
    "randlora": "#b8a53e",
    "miss": "#661100",
    "gralora": "#888888",
}
"""Colours by the name of a recipe; Paul Tol's vibrant and muted schemes."""
_VARIANTS = ("#ee7733", "#aa3377", "#c9a227", "#882255", "#ee3377", "#8c510a", "#e07b91")
"""Colours of ScaLoRA with other options than the default's, in turn."""
_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_MARKERS = {"lora": "o", "scalora": "D", "full": "*", "full-adapted": "P"}
_OTHER_MARKERS = ("s", "^", "v", "X", "<", ">", "p", "h", "d")


class Look(NamedTuple):
    """The look of one method."""

    color: str
    line: str | tuple[float, tuple[float, ...]]
    marker: str
    width: float
    label: str


def looks_of(plan: TaskPlan, results: Sequence[MethodResult]) -> dict[str, Look]:
    """Return, by the name of a method, its look; the same for the same methods of a plan."""
    variants = [m for m in plan.methods if m.startswith("scalora:")]
    others = [m for m in plan.methods if _recipe(m) not in _MARKERS]
    return {result.method: _look(result.method, plan.rank, variants, others) for result in results}


def lora_rank(method: str, rank: int) -> int | None:
    """Return r of plain LoRA at this or another rank; None: it is another method.

    Args:
        method: its name.
        rank: the task's r.
    """
    try:
        recipe = parse(method, RECIPES)
    except ValueError:
        return None
    if type(recipe) is not LoRA or recipe != LoRA(r=recipe.r, ranks=recipe.ranks):
        return None
    return recipe.rank_in(rank)


def adapter_rank(method: str, rank: int) -> int | None:
    """Return r of a method's adapter; None: it has none, or the method is unknown.

    Args:
        method: its name.
        rank: the task's r.
    """
    try:
        recipe = parse(method, RECIPES)
    except ValueError:
        return None
    return recipe.rank_in(rank) if isinstance(recipe, Adapter) else None


def _look(method: str, rank: int, variants: Sequence[str], others: Sequence[str]) -> Look:
    recipe = _recipe(method)
    color, line = _COLOURS.get(recipe, "#555555"), 0
    marker = _MARKERS.get(recipe) or _OTHER_MARKERS[others.index(method) % len(_OTHER_MARKERS)]
    r = lora_rank(method, rank)
    if r is not None and r != rank:
        color, line = _shade(LORA, math.log2(r / rank)), 1
    elif method in variants:
        place = variants.index(method)
        color, line = _VARIANTS[place % len(_VARIANTS)], 1 + place % (len(_LINES) - 1)
        marker = _OTHER_MARKERS[place % len(_OTHER_MARKERS)]
    elif ":" in method:
        line = 1
    main = method in ("lora", "scalora")
    label = label_of(method, rank)
    return Look(color, _LINES[line % len(_LINES)], marker, 2.2 if main else 1.5, label)


def _recipe(method: str) -> str:
    return method.partition(":")[0]


def _shade(color: str, doublings: float) -> str:
    """Return a colour, darker for each doubling of the rank and lighter for each halving."""
    end, share = (0, min(0.75, 0.25 * doublings)) if doublings > 0 else (255, -0.25 * doublings)
    share = min(share, 0.75)
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + share * (end - part)):02x}" for part in parts)
