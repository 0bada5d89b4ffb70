"""Content of an adapter's files, and the note about it in the model card.

Held by tests/integrations/test_trainer_ends.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import Enum
from pathlib import Path


class Content(Enum):
    """Content of the files of a re-based model's adapter."""

    AS_IT_IS = "the adapter, to which nothing else belongs"
    WITH_BASE = "the adapter and the base weights that were folded into"
    WIDE = "adapter and carry as one adapter"
    WITHOUT_CARRY = "the adapter at the rank in training, to resume from, without its carry"
    ALONE = "the adapter without what belongs to it"


_HEADING = "## ScaLoRA"
_SECTION = re.compile(rf"\n*{_HEADING}\n.*?(?=\n#|\Z)", re.DOTALL)
_NOTES = {
    Content.WITH_BASE: (
        "Trained with ScaLoRA. Beside the adapter, `adapter_model.safetensors` holds those weights "
        "of the base model into which part of what was learned was folded. PEFT and transformers "
        "load them with the adapter: give it a base of its own, since other adapters there, or the "
        "base with this adapter disabled or deleted, would compute with the changed weights."
    ),
    Content.WIDE: (
        "Trained with ScaLoRA. This adapter is whole: it has the adapter in training and all that "
        "was frozen beside the base, so its rank is higher than that in training."
    ),
    Content.WITHOUT_CARRY: (
        "Trained with ScaLoRA, and not whole: a carry belongs to this adapter (in "
        "`scalora.safetensors`, if that is here). After `PeftModel.from_pretrained(base, folder)` "
        "call `scalora.load_rebased_weights(model, folder)`; or write a whole adapter with "
        "`scalora export`."
    ),
    Content.ALONE: (
        "Trained with ScaLoRA, and not whole: part of what was learned is in the base weights, or "
        "in a carry beside them. On the original base this adapter is not the model that was "
        "trained. Save that with `scalora.save_merged` or `scalora.save_adapter`."
    ),
}


def note_in_model_card(folder: Path, contents: Collection[Content]) -> None:
    """Say in the model card what the adapters' files hold, in place of an earlier note.

    Args:
        folder: a folder; without a ``README.md`` in it nothing is done.
        contents: what the files of each adapter hold.
    """
    card = folder / "README.md"
    if not card.is_file():
        return
    text = _SECTION.sub("", card.read_text(encoding="utf-8")).rstrip()
    notes = [note for content, note in _NOTES.items() if content in contents]
    if notes:
        text = "\n\n".join([text, _HEADING, *notes])
    card.write_text(text + "\n", encoding="utf-8")
