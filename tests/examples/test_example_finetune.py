import csv
import functools
import importlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertModel, BertTokenizerFast

from miub import MIUBReport

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = ["bright", "warm", "funny", "clever", "moving"]
BAD = ["dull", "cold", "flat", "stale", "tired"]
FILLING = ["a", "film", "story", "with", "the", "and", "scene", "end"]


@pytest.fixture
def finetune(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("finetune")
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def encoder(tmp_path):
    """A folder with a tiny BERT without a classification head, and its tokenizer."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLING]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "sentences.csv"
    rows = [
        (f"{FILLING[i % 8]} {FILLING[i // 8]} {words[i % 5]}", rating)
        for words, rating in ((GOOD, "2.5"), (BAD, "-1.5"))
        for i in range(40)
    ]
    write_csv(path, ("text", "rating"), rows)
    return path


def write_csv(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([header, *rows])


def run(finetune, encoder, sentences, output):
    sizes = ["--steps", "12", "--batch-size", "8", "--held-out", "16", "--rank", "2"]
    paths = ["--model", str(encoder), "--data", str(sentences), "--output", str(output)]
    status = finetune.main([*sizes, *paths, "--learning-rate", "0.01"])
    return status, json.loads((output / "results.json").read_text(encoding="utf-8"))


def test_the_demo_compares_saves_and_reloads(finetune, encoder, sentences, tmp_path, capsys):
    status, content = run(finetune, encoder, sentences, tmp_path / "out")
    printed = capsys.readouterr().out

    assert status == 0
    assert list(content["results"]) == ["LoRA", "ScaLoRA", "paper's rule"]
    peaks = [column.pop("peak_mebibytes") for column in content["results"].values()]
    assert list(map(len, peaks)) == [1, 1, 1]
    assert peaks[1] > peaks[0]  # what the calibration and the sketches keep counts
    for column in content["results"].values():
        for numbers in column.values():
            assert len(numbers) == 2
            assert all(math.isfinite(number) for number in numbers)
        assert all(0 <= accuracy <= 1 for accuracy in column["held_out_accuracy"])
        assert all(seconds > 0 for seconds in column["seconds_per_step"])
    plain, default, paper = content["results"].values()
    assert plain["rebased"] == [0, 0]
    assert default["rebased"] == [1, 1]
    assert paper["rebased"] == [12, 12]
    assert max(plain["effective_rank"]) <= 2 < min(paper["effective_rank"])

    # A seed is the same draw for all methods, and another one than the other seed.
    for first, second in zip(
        *(content["losses"][name] for name in ("LoRA", "ScaLoRA")), strict=True
    ):
        assert first[0] == second[0]
        assert first != second
    one, other = content["losses"]["LoRA"]
    assert one[0] != other[0]

    assert content["adapter_error"] <= 1e-3
    for reloaded in content["reloaded"].values():
        assert reloaded["logit_difference"] <= finetune.LOGIT_BOUND

    for row in ("training loss", "held-out loss", "held-out accuracy", "times re-based"):
        assert row in printed
    for row in ("effective rank", "seconds per step", "peak memory", "MIUB"):
        assert row in printed
    for picture in ("loss.png", "miub.png", "spectrum.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert (
        len(MIUBReport.from_json(tmp_path / "out" / "miub.json")) == 12
    )  # the pooler has too few tokens
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_table_says_how_far_two_seeds_lie_apart(finetune):
    console = Console(record=True, width=100, file=io.StringIO())
    column = {key: [1.0, 2.0] for _, key, _ in finetune.report.ROWS}

    finetune.report.print_table({"LoRA": column}, console)

    assert "1.5000 ± 0.5000" in console.export_text()


def test_without_rebasing_two_columns_are_the_same(
    finetune, encoder, sentences, tmp_path, monkeypatch
):
    plain_lora = functools.partial(finetune.scalora.ScaLoRA, rule="none")
    monkeypatch.setattr(finetune.scalora, "ScaLoRA", plain_lora)
    monkeypatch.setattr(finetune, "SEEDS", 1)
    status, content = run(finetune, encoder, sentences, tmp_path / "out")

    assert status == 0
    assert content["losses"]["LoRA"] == content["losses"]["ScaLoRA"]
    plain, wrapped, _ = content["results"].values()
    for key in ("training_loss", "held_out_loss", "held_out_accuracy", "effective_rank"):
        assert plain[key] == wrapped[key]


def test_a_reloaded_model_that_answers_otherwise_fails_the_demo(
    finetune, encoder, sentences, tmp_path, monkeypatch
):
    def reload_another(args, classes):
        return {"merged": finetune.load_base(args.model, classes, args.seed + 1)}

    monkeypatch.setattr(finetune, "reload", reload_another)
    monkeypatch.setattr(finetune, "SEEDS", 1)
    status, _ = run(finetune, encoder, sentences, tmp_path / "out")

    assert status == 1
