"""Writing one re-basing so that every layer takes all of it or nothing.

Held by tests/rebasing/test_faults.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scalora import sharding
from scalora.moments.history import Write


def write_all(writes: Sequence[Write], layers: Sequence[int], done: Callable[[], None]) -> None:
    """Write some layers, whatever is raised in between.

    Writing twice does no harm, so an interruption is answered by writing again.

    Args:
        writes: stacks over the same layers, and their targets.
        layers: the places of those to write.
        done: called last; it may be called twice.
    """
    pieces: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for targets, _, new in writes:
        own, values = pieces.setdefault((new.dtype, targets[0].device), ([], []))
        rows = new.unbind()
        held = [*map(sharding.local, targets)] if sharding.is_sharded(targets[0]) else targets
        whole = len(layers) == len(targets)
        own += held if whole else [held[i] for i in layers]
        values += rows if whole else [rows[i] for i in layers]

    def write() -> None:
        for own, values in pieces.values():
            torch._foreach_copy_(own, values)
        done()

    try:
        write()
    except BaseException:
        write()
        raise


def commit(
    fold: Callable[[], None],
    bases: Sequence[Tensor],
    writes: Sequence[Write],
    done: Callable[[int], None],
) -> None:
    """Fold, then write the rest for exactly those layers whose base has changed.

    Folding twice would do harm: a base's version counter tells whether it has taken its increment.

    Args:
        fold: changes the bases, one after the other.
        bases: one per layer.
        writes: as for `write_all`.
        done: called with the place of each layer that has changed, last.
    """
    versions = [base._version for base in bases]

    def follow() -> None:
        folded = [i for i, base in enumerate(bases) if base._version != versions[i]]

        def note() -> None:
            for i in folded:
                done(i)

        if folded:
            write_all(writes, folded, note)

    # Following twice does no harm.  Not `finally`: an interrupt may come between two lines of that.
    try:
        fold()
        follow()
    except BaseException:
        follow()
        raise
