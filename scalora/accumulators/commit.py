"""Writing one re-basing so that every layer takes all of it or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scalora.layer_batches import Write


def commit(
    land: Callable[[], None],
    witnesses: Sequence[Tensor],
    writes: Sequence[Write],
    done: Callable[[int], None],
) -> None:
    """Let the increments land, then write the rest for exactly those layers where they did.

    A layer's witness is the tensor that its increment lands in; its version counter tells whether
    it has.  Writing twice does no harm, so an interruption is answered by writing again.

    Args:
        land: changes the witnesses, one after the other.
        witnesses: one a layer.
        writes: with a stack over the same layers.
        done: called with the place of each layer that has changed, last.
    """
    versions = [witness._version for witness in witnesses]

    def landed() -> list[int]:
        return [i for i, witness in enumerate(witnesses) if witness._version != versions[i]]

    def write() -> None:
        layers = landed()
        if not layers:
            return
        for targets, _, new in writes:
            torch._foreach_copy_(
                [targets[i] for i in layers], [new[i].view_as(targets[i]) for i in layers]
            )

    try:
        land()
    finally:
        try:
            write()
        except BaseException:
            write()
            raise
        finally:
            for i in landed():
                done(i)
