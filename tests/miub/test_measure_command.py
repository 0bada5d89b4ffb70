"""``python -m miub`` on a real adapter."""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import bert, gpt2, token_ids, train, trainable, with_lora
from transformers import BertForSequenceClassification, BertTokenizerFast

import miub
import scalora
from miub import MIUBMonitor, MIUBReport, estimators
from miub.cli import command, main


@pytest.fixture
def trained(tmp_path):
    """Folders of a pretrained encoder with its tokenizer and of an adapter, and a text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(18))]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    base = bert()
    base.save_pretrained(tmp_path / "model")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    model = with_lora(base, target_modules=["query", "value"], task_type="SEQ_CLS")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    lines = [" ".join(f"w{(i * j) % 18}" for j in range(1, 3 + i % 9)) for i in range(64)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def arguments(folder, *more):
    return [
        *("--model", str(folder / "model"), "--adapter", str(folder / "adapter")),
        *("--text", str(folder / "text.txt"), *more),
    ]


def test_the_command_line_prints_a_table_and_writes_what_is_asked_for(trained, capsys):
    files = [str(trained / f"miub.{kind}") for kind in ("csv", "json", "png")]
    wanted = [x for pair in zip(("--csv", "--json", "--plot"), files, strict=True) for x in pair]
    assert main(arguments(trained, "--batch-size", "16", *wanted)) == 0
    printed = capsys.readouterr().out
    assert "bert.encoder.layer.0.attention.self.query" in printed
    assert "tempered" in printed
    rows = list(csv.DictReader(Path(files[0]).read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 4
    assert json.loads(Path(files[1]).read_text(encoding="utf-8"))["noise"] == 0.01
    assert Path(files[2]).read_bytes().startswith(b"\x89PNG")


def test_the_command_line_says_what_is_wrong_with_its_input(trained, capsys):
    (trained / "text.txt").write_text("\n \n", encoding="utf-8")
    assert main(arguments(trained)) == 2
    assert "has no text" in capsys.readouterr().err
    assert main([*arguments(trained)[:-1], str(trained / "absent.txt")]) == 2
    assert "absent.txt" in capsys.readouterr().err


# A command line that is answered without one of these libraries takes no time.
ANSWERED = """
import runpy, sys
try:
    runpy.run_module("miub", run_name="__main__")
except SystemExit as stopped:
    assert stopped.code == 0
heavy = {"torch", "transformers", "peft", "accelerate", "numpy"} & sys.modules.keys()
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("argument", "said"), [("--help", "--adapter"), ("--version", f"miub {scalora.__version__}")]
)
def test_help_and_version_are_answered_at_once_and_without_other_libraries(argument, said):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-c", ANSWERED, argument]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == ""
    assert said in done.stdout
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1  # seconds


def test_the_version_is_scaloras_and_every_public_name_is_there():
    assert miub.__version__ == scalora.__version__
    assert set(miub.__all__) <= set(dir(miub))
    assert all(hasattr(miub, name) for name in miub.__all__)
    with pytest.raises(AttributeError, match="'miub' has no attribute 'Monitor'"):
        miub.Monitor  # noqa: B018


def test_every_estimator_can_be_asked_for():
    assert list(command.ESTIMATORS) == sorted(estimators.ESTIMATORS)


@pytest.mark.slow
def test_python_m_miub_runs(trained):
    line = [sys.executable, "-m", "miub", *arguments(trained)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "all layers" in done.stdout and done.stderr == ""


def test_a_causal_language_model_without_a_padding_token_is_measured(tmp_path, trained, capsys):
    torch.manual_seed(0)
    base = gpt2()
    base.save_pretrained(tmp_path / "gpt2")
    BertTokenizerFast(
        vocab=str(trained / "vocab.txt"), pad_token=None, eos_token="[SEP]"
    ).save_pretrained(tmp_path / "gpt2")
    with_lora(base, target_modules=["c_attn"], task_type="CAUSAL_LM").save_pretrained(
        tmp_path / "gpt2-adapter"
    )
    line = arguments(trained)
    line[1], line[3] = str(tmp_path / "gpt2"), str(tmp_path / "gpt2-adapter")
    assert main(line) == 0
    assert "transformer.h.0.attn.c_attn" in capsys.readouterr().out


def checkpoint_of(folder, accumulator):
    """A checkpoint of a re-based model on the pretrained one, and what is to be measured of it."""
    base = BertForSequenceClassification.from_pretrained(folder / "model")
    torch.manual_seed(1)
    model = with_lora(base, target_modules=["query", "value"], task_type="SEQ_CLS")
    inner = torch.optim.AdamW(trainable(model), lr=3e-2)
    optimizer = scalora.ScaLoRA(inner, model, rule="exact", accumulator=accumulator)
    train(model, optimizer, token_ids(8, 9), 6)
    checkpoint = folder / "checkpoint-6"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="save_pretrained writes the adapter alone")
        model.save_pretrained(checkpoint)
    scalora.save_training_state(optimizer, checkpoint)
    tokenizer = BertTokenizerFast.from_pretrained(folder / "model")
    lines = (folder / "text.txt").read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if line][:32]
    reference = BertForSequenceClassification.from_pretrained(folder / "model")
    with MIUBMonitor(model.eval(), every=1, reference=reference) as monitor:
        model(**tokenizer(texts, return_tensors="pt", padding=True, truncation=True))
    return checkpoint, {row.layer: row.value for row in monitor.report()}


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
def test_the_command_line_measures_the_whole_of_a_checkpoint(trained, accumulator, capsys):
    checkpoint, expected = checkpoint_of(trained, accumulator)
    line = arguments(trained, "--batches", "1", "--json", str(trained / "miub.json"))
    line[3] = str(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ScaLoRA")
        assert main(line) == 0
    rows = MIUBReport.from_json(trained / "miub.json")
    assert {row.layer for row in rows} == set(expected)
    for row in rows:
        assert row.value == pytest.approx(expected[row.layer], rel=1e-3, abs=1e-4)


def test_the_command_line_refuses_an_adapter_without_its_carry(trained, capsys):
    checkpoint, _ = checkpoint_of(trained, "carry")
    (checkpoint / "scalora.safetensors").unlink()
    line = arguments(trained)
    line[3] = str(checkpoint)
    assert main(line) == 2
    assert "carry belongs" in capsys.readouterr().err
