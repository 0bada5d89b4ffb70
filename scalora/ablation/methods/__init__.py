"""The methods that are compared: plain LoRA, full fine-tuning, their rivals, and re-basing.

Held by tests/ablation/test_ablation_methods.py and test_ablation_methods_apart.py.

A method is a frozen dataclass of its options (:class:`Recipe`); a spec such as
``scalora:rule=exact:interval=10`` names one.
"""

from scalora.ablation.methods.full import Full, FullAdapted
from scalora.ablation.methods.initialisations import LoRAGA, PiSSA
from scalora.ablation.methods.lora import DoRA, LoRA
from scalora.ablation.methods.method import Method, Recipe, Setup, Training
from scalora.ablation.methods.optimizers import LoRAFA, LoRAPlus, Riemannian
from scalora.ablation.methods.other_adapters import GraLoRA, HiRA, MiSS, RandLoRA
from scalora.ablation.methods.rebasing import Rebased
from scalora.ablation.methods.reflora import RefLoRA
from scalora.ablation.methods.relora import ReLoRA
from scalora.ablation.methods.spec import canonical, parse

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe
    for recipe in (
        *(Full, FullAdapted, LoRA, Rebased),
        *(LoRAPlus, Riemannian, LoRAFA, RefLoRA),
        *(DoRA, PiSSA, LoRAGA, ReLoRA),
        *(HiRA, RandLoRA, MiSS, GraLoRA),
    )
}
"""Every method, by its name in a spec."""


def method_of(spec: str) -> Method:
    """Return the method that a spec, ``name[:option=value]*``, asks for.

    Its name is the spec with options in their order and defaults left out: one method, one name.

    Raises:
        ValueError: an unknown name or option, or a value that the option does not take; the
            message lists what there is.
    """
    recipe = parse(spec, RECIPES)
    return Method(canonical(recipe), recipe.start, recipe.rate, recipe.dtype)


def label_of(spec: str, rank: int) -> str:
    """Return a method's name in pictures: "LoRA, r = 8" for ``lora:ranks=2`` where rank is 4.

    Other options follow, one per line. A spec of an earlier version that is unknown by now is its
    own label.

    Args:
        spec: as of `method_of`.
        rank: the task's r.
    """
    try:
        recipe = parse(spec, RECIPES)
    except ValueError:
        return spec
    options = [option.replace("=", " = ") for option in canonical(recipe).split(":")[1:]]
    shown = [option for option in options if option.partition(" ")[0] not in ("r", "ranks")]
    return "\n".join([recipe.label(rank), *(f"   {option}" for option in shown)])


def _rebased(*rules: str) -> tuple[str, ...]:
    """Return rules x intervals x accumulators; on a float base, "auto" is "dense"."""
    return tuple(
        method_of(f"scalora:rule={rule}:interval={interval}:accumulator={accumulator}").name
        for rule in rules
        for interval in (1, 10, 30)
        for accumulator in ("auto", "carry")
    )


SUITES: dict[str, tuple[str, ...]] = {
    "short": ("lora", "lora:ranks=8", "full-adapted", "full", "scalora"),
    "peers": tuple(RECIPES),
    "rules": (
        *("lora", "scalora:rule=age", "scalora:rule=expected"),
        *_rebased("auto", "exact", "paper", "scalar", "direction"),
    ),
}
"""Methods that are compared together, by what the comparison asks."""

__all__ = ["RECIPES", "SUITES", "Method", "Recipe", "Setup", "Training", "label_of", "method_of"]
