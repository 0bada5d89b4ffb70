"""The bounds of one layer: which estimator, from how many tokens.

Held by tests/miub/test_monitor.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from miub.estimators import ESTIMATORS, Estimate
from miub.estimators.bracket import bracket
from miub.estimators.crossfit import fewest_in_a_half
from miub.estimators.design import design_by_columns
from miub.estimators.infonce import infonce

FEWEST_TOKENS = 16
_ORDERS = {"tempered": 0.5, "gaussian": 1.0}
# Where the base does not compress, what it knows of the adapter's code is limited by the noise
# alone, and so is the penalty; elsewhere leaving one out chooses.
_NOISE_ALONE = (0.0,)
_FEW_PENALTIES = (0.0, 0.03, 0.3, 3.0)


class Bounds:
    """An upper and a lower bound of the mutual information of a layer's two paths.

    Args:
        estimator: a name of `miub.estimators.ESTIMATORS`, or a function of its kind.
        noise: tau of the noise model.

    Attributes:
        name: of the estimator.
        noise: as above.

    Raises:
        ValueError: an unknown estimator, negative or infinite noise.
    """

    def __init__(self, estimator: str | Callable[..., Estimate], noise: float) -> None:
        if not 0 <= noise < float("inf"):
            raise ValueError(f"noise must be finite and at least 0, got {noise}.")
        if not callable(estimator) and estimator not in ESTIMATORS:
            raise ValueError(
                f"estimator must be one of {sorted(ESTIMATORS)} or a function, got {estimator!r}."
            )
        self.noise = noise
        if isinstance(estimator, str):
            self.name, function = estimator, ESTIMATORS[estimator]
            self._order = _ORDERS.get(estimator)
        else:
            self.name = getattr(estimator, "__name__", type(estimator).__name__)
            function, self._order = estimator, None
        # Without its warning: the report gives it, for samples on any device.
        self._function = inspect.unwrap(function)

    @property
    def fits_on_halves(self) -> bool:
        """Whether the estimator may fit on one half of the samples; functions may as well."""
        return self._order is None

    def fewest_tokens(self, coordinates: int) -> int:
        """Return the fewest tokens for a learned path with that many coordinates."""
        if self.fits_on_halves and self.noise == 0:
            return max(FEWEST_TOKENS, 2 * fewest_in_a_half(coordinates))
        return FEWEST_TOKENS

    def of(
        self, columns: Callable[[int, int], Tensor], outputs: int, inputs: int, v: Tensor
    ) -> tuple[Estimate, Tensor]:
        """Return the estimate, and the value of the lower bound.

        Args:
            columns: reads u (k, outputs), some columns at a time.
            outputs: of the layer.
            inputs: of the layer.
            v: (k, coordinates), the learned path.
        """
        if self._order is None:
            u = columns(0, outputs)
            upper = self._function(u, v, noise=self.noise)
            lower = upper if self._function is infonce else infonce(u, v, noise=self.noise)
            return upper, lower.value
        compresses = len(v) <= outputs < inputs
        upper, lower = bracket(
            design_by_columns(columns, outputs, v, self.noise),
            order=self._order,
            penalties=_FEW_PENALTIES if compresses else _NOISE_ALONE,
        )
        return upper, lower.value
