"""What an adapter's model card says of ScaLoRA."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

_HEADING = "## ScaLoRA"
_SECTION = re.compile(rf"\n*{_HEADING}\n.*?(?=\n#|\Z)", re.DOTALL)
_NOTES = {
    "with base": (
        "Trained with ScaLoRA. Beside the adapter, `adapter_model.safetensors` holds those weights "
        "of the base model into which part of what was learned was folded. PEFT and transformers "
        "load them with the adapter: give it a base of its own, since other adapters there, or the "
        "base with this adapter disabled or deleted, would compute with the changed weights."
    ),
    "wide": (
        "Trained with ScaLoRA. This adapter is whole: it has the adapter in training and all that "
        "was frozen beside the base, so its rank is higher than that in training."
    ),
    "without carry": (
        "Trained with ScaLoRA, and not whole: a carry belongs to this adapter (in "
        "`scalora.safetensors`, if that is here). After `PeftModel.from_pretrained(base, folder)` "
        "call `scalora.load_rebased_weights(model, folder)`; or write a whole adapter with "
        "`scalora export`."
    ),
    "alone": (
        "Trained with ScaLoRA, and not whole: part of what was learned is in the base weights, or "
        "in a carry beside them. On the original base this adapter is not the model that was "
        "trained. Save that with `scalora.save_merged` or `scalora.save_adapter`."
    ),
}


def note_in_model_card(folder: Path, forms: Collection[str]) -> None:
    """Put into the card in ``folder``, if there is one, what the adapters' files are.

    Args:
        folder: with ``README.md``.
        forms: of `scalora.peft_layers.methods.pretrained_methods`.
    """
    card = folder / "README.md"
    if not card.is_file():
        return
    text = _SECTION.sub("", card.read_text(encoding="utf-8")).rstrip()
    notes = [note for form, note in _NOTES.items() if form in forms]
    if notes:
        text = "\n\n".join([text, _HEADING, *notes])
    card.write_text(text + "\n", encoding="utf-8")
