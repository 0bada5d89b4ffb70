"""Rows with settings of ours, and a tokenizer, for the scripts of `examples/paper`."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAPER = Path(__file__).parents[3] / "examples" / "paper"
ROWS = PAPER / "configurations"


def row(path, name, **changes):
    """One of the rows, with other settings of ours."""
    content = json.loads((ROWS / f"{name}.json").read_text(encoding="utf-8"))
    for setting, value in changes.items():
        section = next((s for s in content.values() if setting in s), content["ours"])
        section[setting] = value
    path.write_text(json.dumps(content))
    return str(path)


def save_tokenizer(folder, pairs):
    """A token a byte; with pairs, [CLS] a [SEP] b [SEP]."""
    special = ["<pad>", "</s>", "[CLS]", "[SEP]"]
    signs = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    return len(signs)
