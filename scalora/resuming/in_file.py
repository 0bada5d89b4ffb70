"""A Trainer's ``optimizer.pt`` whose state of re-basing is in the file beside it.

Such a file must not be taken for plain LoRA's: whoever reads it is asked for what reads the rest.
Torch reads it where an optimizer of this package was made, for which this module is imported then;
elsewhere it refuses to, and names the function.

Held by tests/integrations/test_trainer_ends.py.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch


class InFile:
    """Entry of ``optimizer.pt`` which says that the rest of the state is in the file beside it.

    It is pickled as the name of a function that torch calls when it reads the file.
    """

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return resumed_with_scalora_callback, ()


def resumed_with_scalora_callback() -> bool:
    """Return True; its name is in ``optimizer.pt``, and it is called whenever that is read.

    Raises:
        ValueError: a Trainer without `scalora.ScaLoRACallback` reads it, to resume.
    """
    callbacks = _callbacks_of_resuming_trainer()
    if callbacks is not None and not any(
        getattr(callback, "restores_rebasing", False) for callback in callbacks
    ):
        raise ValueError(
            "this checkpoint was written with a scalora.ScaLoRACallback, and the Trainer that "
            "resumes from it has none: what had been frozen beside the adapter would be missing, "
            "and training would go on as plain LoRA. Pass "
            "callbacks=[scalora.ScaLoRACallback(...)] with the same options; or begin anew from "
            "the model that `scalora export` makes of the checkpoint."
        )
    return True


torch.serialization.add_safe_globals([resumed_with_scalora_callback])


def _callbacks_of_resuming_trainer() -> list[Any] | None:
    """Return the callbacks of the Trainer that is reading an optimizer's state, if one is.

    It is looked for further up the stack, by what it calls: transformers may not be there at all.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_load_optimizer_and_scheduler":
        frame = frame.f_back
    caller = None if frame is None else frame.f_locals.get("self")
    handler = getattr(caller, "callback_handler", None)
    return None if handler is None else handler.callbacks
