"""The optimizer classes that are known, each with its `Moments`; and why others cannot be.

Held by tests/moments/test_moments.py and tests/optimizer/test_torch_optimizers.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from scalora.arguments import described
from scalora.moments import bitsandbytes, directions
from scalora.moments.directions import Direction
from scalora.moments.moments import Moments

_STEP = {"step": 0}
_ADAM = {**_STEP, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}

_TABLE: dict[type[torch.optim.Optimizer], Moments] = {
    torch.optim.Adam: Moments(_ADAM, directions.adam),
    torch.optim.AdamW: Moments(_ADAM, directions.adam),
    torch.optim.NAdam: Moments({**_ADAM, "mu_product": 0}, directions.nadam),
    torch.optim.RAdam: Moments(_ADAM, directions.radam),
    torch.optim.Adamax: Moments({**_STEP, "exp_avg": 1, "exp_inf": 1}, directions.adamax),
    torch.optim.SGD: Moments({"momentum_buffer": 1}, directions.sgd, direction_degree=1),
    torch.optim.RMSprop: Moments(
        {**_STEP, "square_avg": 2, "grad_avg": 1, "momentum_buffer": 0}, directions.rmsprop
    ),
    torch.optim.Adagrad: Moments({**_STEP, "sum": 2}, directions.adagrad),
    torch.optim.Adafactor: Moments(
        {**_STEP, "row_var": 2, "col_var": 2, "variance": 2},
        directions.adafactor,
        partners={"row_var": "col_var", "col_var": "row_var"},
        linear_in_rate=False,
    ),
}

# Classes of libraries that need not be installed, by their full names.
_BY_NAME: Mapping[str, Moments] = bitsandbytes.BY_NAME

# Beginnings of the full names of classes that no degrees describe -> why, and what to use instead.
_IMPOSSIBLE = {
    "transformers.optimization.Adafactor": (
        "its second moment is factored. Use torch.optim.Adafactor instead; in a Trainer pass "
        "optimizer_cls_and_kwargs=(torch.optim.Adafactor, {'lr': ...}) in place of "
        "optim='adafactor'"
    ),
    "torchao.": (
        "its states are codes. Use an 8-bit optimizer of bitsandbytes.optim instead; in a Trainer "
        "optim='adamw_bnb_8bit'"
    ),
    "bitsandbytes.optim.lamb.": (
        "its step depends on the norms of whole parameters. Use bitsandbytes.optim.AdamW instead"
    ),
    "bitsandbytes.optim.lars.": (
        "its step depends on the norms of whole parameters. Use bitsandbytes.optim.SGD instead"
    ),
    "torch.optim.lbfgs.": (
        "it keeps the history of all parameters in one. Use torch.optim.AdamW instead"
    ),
    "schedulefree.": (
        "it keeps values of the parameters themselves in its state. Use torch.optim.AdamW or SGD "
        "with a schedule instead"
    ),
}


def register_moments(
    optimizer_class: type[torch.optim.Optimizer],
    degrees: Mapping[str, int],
    *,
    direction: Direction | None = None,
    direction_degree: int = 0,
) -> None:
    """Teach ScaLoRA another optimizer class (exactly that class, not its subclasses).

    Args:
        optimizer_class: the class.
        degrees: the name of every tensor it keeps in ``optimizer.state[param]`` -> degree of
            homogeneity in the gradient history: 1 for a momentum, 2 for an average of squares,
            0 for a counter or anything that was already divided by a root of a second moment.
        direction: ``f(param, grad, state, group) -> Tensor``, the direction of the coming step
            (the optimizer subtracts ``lr * direction``), without weight decay.  All tensors have a
            batch dimension in front.  ``rule="direction"``, ``"age"`` and ``"expected"`` need it,
            ``"exact"``, ``"paper"`` and ``"scalar"`` match the magnitude by it if it is there, and
            the report tells the age of columns by it.  ``grad`` may be zero: the direction is then
            that of the batches before.
        direction_degree: 1 if the step grows with the gradient, else 0.

    Raises:
        TypeError: ``optimizer_class`` is no optimizer class.
        ValueError: a degree that is not a non-negative integer.
    """
    if not (
        isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    ):
        raise TypeError(
            f"optimizer_class is {described(optimizer_class)}, not a subclass of "
            "torch.optim.Optimizer."
        )
    for name, degree in degrees.items():
        if not isinstance(degree, int) or degree < 0:
            raise ValueError(f"degree {degree!r} of state {name!r} must be an integer, 0 or more.")
    if direction_degree not in (0, 1):
        raise ValueError(f"direction_degree={direction_degree!r} must be 0 or 1.")
    _TABLE[optimizer_class] = Moments(
        {**_STEP, **degrees}, direction, direction_degree, linear_in_rate=False
    )


def moments_of(optimizer: torch.optim.Optimizer) -> Moments:
    """Return the entry of the optimizer's class; one that was registered has precedence.

    Raises:
        TypeError: the class is not in the table.  A subclass is not its parent: it may
            precondition gradients or keep other state.
    """
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    entry = _TABLE.get(type(optimizer), _BY_NAME.get(name))
    if entry is not None:
        return entry
    for beginning, reason in _IMPOSSIBLE.items():
        if name.startswith(beginning):
            raise TypeError(
                f"ScaLoRA cannot carry the state of {name} across a re-basing: {reason}."
            )
    others = (full.split(".") for full in _BY_NAME)
    known = ", ".join([*(cls.__name__ for cls in _TABLE), *(f"{o[0]}.{o[-1]}" for o in others)])
    raise TypeError(
        f"ScaLoRA does not know how the state of {name} depends on the gradient, so it cannot "
        f"carry it across a re-basing. Known: {known}. Use one of those; or, if every tensor of "
        "its state has a column for each of the adapter's r and is no code, register it with "
        f"scalora.register_moments({type(optimizer).__name__}, {{'exp_avg': 1, 'exp_avg_sq': 2}}), "
        "giving the degree of each in the gradient history."
    )
