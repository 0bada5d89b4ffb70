"""The bounds of one layer: which estimator, from how many tokens.

Held by tests/miub/test_monitor.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from miub.estimators import ESTIMATORS, Estimate
from miub.estimators.bracket import Bracketed, bracket, fit_bracket
from miub.estimators.crossfit import fewest_in_a_half
from miub.estimators.design import design_by_columns
from miub.estimators.infonce import infonce

# A fit, or the upper and the lower bound.
Begun = Bracketed | tuple[Estimate, Estimate]

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
        """Return whether the estimator may fit on a half of the samples, as functions may."""
        return self._order is None

    def fewest_tokens(self, coordinates: int) -> int:
        """Return the fewest tokens for a learned path with that many coordinates."""
        if self.fits_on_halves and self.noise == 0:
            return max(FEWEST_TOKENS, 2 * fewest_in_a_half(coordinates))
        return FEWEST_TOKENS

    def begun(
        self, columns: Callable[[int, int], Tensor], outputs: int, inputs: int, v: Tensor
    ) -> Begun:
        """Return the estimate, or a fit to it that is evaluated with those of other layers.

        Args:
            columns: reads u (k, outputs), some columns at a time.
            outputs: of the layer.
            inputs: of the layer.
            v: (k, coordinates), the learned path.
        """
        if self._order is not None:
            compresses = len(v) <= outputs < inputs
            design = design_by_columns(columns, outputs, v, self.noise)
            return fit_bracket(design, _FEW_PENALTIES if compresses else _NOISE_ALONE)
        u = columns(0, outputs)
        upper = self._function(u, v, noise=self.noise)
        lower = upper if self._function is infonce else infonce(u, v, noise=self.noise)
        return upper, lower

    def finished(self, begun: Sequence[Begun]) -> tuple[Estimate, Estimate]:
        """Return the upper and the lower bound, (layers,), of layers that `together` allows."""
        fits = [one for one in begun if isinstance(one, Bracketed)]
        if self._order is not None:
            return bracket(fits, order=self._order)
        estimates = [one for one in begun if not isinstance(one, Bracketed)]
        upper, lower = (_stacked(same) for same in zip(*estimates, strict=True))
        return upper, lower


def together(coordinates: int) -> int:
    """Return how many layers with that many coordinates are evaluated in one go.

    More take fewer calls; the pairs of 256 tokens of 8 layers are 2 MiB.
    """
    return max(1, 64 // max(coordinates, 8))


def _stacked(estimates: Sequence[Estimate]) -> Estimate:
    """Return the estimates (layers,), float32; a share that was not looked at is 0."""
    shares = [torch.zeros_like(e.value) if e.heaviest is None else e.heaviest for e in estimates]
    columns = ([e.value for e in estimates], [e.stderr for e in estimates], shares)
    value, stderr, heaviest = (torch.stack([x.float() for x in column]) for column in columns)
    return Estimate(value, stderr, estimates[0].n, heaviest)
