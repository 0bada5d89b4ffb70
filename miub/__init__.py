"""MIUB: how much each LoRA layer leans on the frozen model (arXiv 2501.03152).

An upper bound on the mutual information between what a layer's frozen weight contributes and what
its adapter contributes, in nats, during training or of a finished adapter.
"""

from miub import estimators
from miub.callback import MIUBCallback
from miub.monitor import MIUBMonitor
from miub.report.report import MIUBReport

__all__ = ["MIUBCallback", "MIUBMonitor", "MIUBReport", "estimators"]
