"""MIUB: how much each LoRA layer leans on the frozen model (arXiv 2501.03152).

An upper bound on the mutual information between what a layer's frozen weight contributes and what
its adapter contributes, in nats, during training or of a finished adapter.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from scalora import __version__ as __version__

if TYPE_CHECKING:
    from miub import estimators
    from miub.callback import MIUBCallback
    from miub.monitor import MIUBMonitor
    from miub.report import MIUBReport

__all__ = ["MIUBCallback", "MIUBMonitor", "MIUBReport", "estimators"]

# Imported when first asked for (PEP 562): torch, transformers and PEFT take seconds to import, and
# `python -m miub --help` needs none of them.
_MODULES = {
    "MIUBCallback": "miub.callback",
    "MIUBMonitor": "miub.monitor",
    "MIUBReport": "miub.report",
}

if not TYPE_CHECKING:  # a type checker would take any name for one of this module's

    def __getattr__(name: str) -> Any:
        """Import a public name from the module that defines it, and keep it; or a submodule."""
        if name in _MODULES:
            found = globals()[name] = getattr(import_module(_MODULES[name]), name)
            return found
        # A name with a dot would be looked for in a package that may not be there.
        is_public = name.isidentifier() and not name.startswith("_")
        if is_public and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Return the module's names, those that are not imported yet included."""
        return sorted({*globals(), *__all__})
