"""Pictures: one style, and figures of numbers.

Held by tests/plotting/test_plotting.py.

A leaf of the package: it knows numbers, names and matplotlib, and nothing of models. Matplotlib is
imported when the first figure is made.
"""

from scalora.plotting.figures import encoded, new_figure, write_figure
from scalora.plotting.layers import LayerNumbers, layers_figure
from scalora.plotting.spectra import spectra_figure

__all__ = [
    "LayerNumbers",
    "encoded",
    "layers_figure",
    "new_figure",
    "spectra_figure",
    "write_figure",
]
