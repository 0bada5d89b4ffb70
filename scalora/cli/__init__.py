"""The ``scalora`` command: ``export`` is here, ``ablate`` in `scalora.ablation.command`."""

from scalora.cli.command import main

__all__ = ["main"]
