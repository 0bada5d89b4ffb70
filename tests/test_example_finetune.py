import csv
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

EXAMPLES = Path(__file__).parents[1] / "examples"
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


def run(finetune, encoder, sentences, output, *extra):
    sizes = ["--steps", "12", "--batch-size", "8", "--held-out", "16", "--rank", "2"]
    paths = ["--model", str(encoder), "--data", str(sentences), "--output", str(output)]
    status = finetune.main([*sizes, *paths, "--learning-rate", "0.01", "--interval", "2", *extra])
    return status, json.loads((output / "results.json").read_text(encoding="utf-8"))


def test_the_demo_compares_saves_and_reloads(finetune, encoder, sentences, tmp_path, capsys):
    status, content = run(finetune, encoder, sentences, tmp_path / "out")
    printed = capsys.readouterr().out

    assert status == 0
    assert list(content["results"]) == ["LoRA", "ScaLoRA"]
    for column in content["results"].values():
        assert all(math.isfinite(value) for value in column.values())
        assert 0 <= column["held_out_accuracy"] <= 1
        assert column["seconds_a_step"] > 0
        assert column["peak_mebibytes"] > 0
    plain, rebased = content["results"].values()
    assert plain["rank"] <= 2 < rebased["rank"]
    assert content["losses"]["LoRA"][0] == content["losses"]["ScaLoRA"][0]
    assert content["losses"]["LoRA"] != content["losses"]["ScaLoRA"]

    assert content["adapter_error"] <= 1e-3
    for reloaded in content["reloaded"].values():
        assert reloaded["logit_difference"] <= finetune.LOGIT_BOUND

    for row in ("training loss", "held-out loss", "held-out accuracy", "rank of the change"):
        assert row in printed
    assert "seconds a step" in printed
    assert "peak memory" in printed
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_without_rebasing_both_columns_are_the_same(finetune, encoder, sentences, tmp_path):
    status, content = run(finetune, encoder, sentences, tmp_path / "out", "--rule", "none")

    assert status == 0
    assert content["losses"]["LoRA"] == content["losses"]["ScaLoRA"]
    plain, wrapped = content["results"].values()
    for key in ("training_loss", "held_out_loss", "held_out_accuracy", "rank"):
        assert plain[key] == wrapped[key]


def test_a_reloaded_model_that_answers_otherwise_fails_the_demo(
    finetune, encoder, sentences, tmp_path, monkeypatch
):
    def reload_another(args, classes):
        return {"merged": finetune.load_base(args.model, classes, args.seed + 1)}

    monkeypatch.setattr(finetune, "reload", reload_another)
    status, _ = run(finetune, encoder, sentences, tmp_path / "out")

    assert status == 1
