"""What is compared: plain LoRA, full fine-tuning, their rivals, and re-basing.

A method is a frozen dataclass of its options (:class:`Recipe`); a spec such as
``scalora:rule=exact:interval=10`` names one.
"""

from scalora.ablation.methods.full import Full, FullAdapted
from scalora.ablation.methods.initialisations import LoRAGA, PiSSA
from scalora.ablation.methods.lora import DoRA, LoRA
from scalora.ablation.methods.method import Method, Setup, Training
from scalora.ablation.methods.optimizers import LoRAFA, LoRAPlus, Riemannian
from scalora.ablation.methods.other_adapters import GraLoRA, HiRA, MiSS, RandLoRA
from scalora.ablation.methods.rebasing import Rebased
from scalora.ablation.methods.recipe import Recipe
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

    Its name is the spec with the options in their order and defaults left out, so that one method
    has one name.

    Raises:
        ValueError: an unknown name or option, or a value that the option does not take; the
            message lists what there is.
    """
    recipe = parse(spec, RECIPES)
    return Method(canonical(recipe), recipe.start, recipe.rate)


def _rebased(*rules: str) -> tuple[str, ...]:
    """Rules x intervals x accumulators, each by its one name; of a float base, auto is dense."""
    return tuple(
        method_of(f"scalora:rule={rule}:interval={interval}:accumulator={accumulator}").name
        for rule in rules
        for interval in (1, 10, 30)
        for accumulator in ("auto", "carry")
    )


SUITES: dict[str, tuple[str, ...]] = {
    "short": ("lora", "lora:ranks=8", "full-adapted", "full", "scalora"),
    "peers": tuple(RECIPES),
    "rules": ("lora", *_rebased("auto", "exact", "paper", "scalar", "direction")),
}
"""Methods that are compared together, by what the comparison asks."""

__all__ = ["RECIPES", "SUITES", "Method", "Recipe", "Setup", "Training", "method_of"]
