"""MIUBCallback in a real Trainer, and the command line on a real adapter."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import bert, gpt2, token_ids, train, trainable, with_lora
from transformers import (
    BertForSequenceClassification,
    BertTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import scalora
from miub import MIUBCallback, MIUBMonitor
from miub.cli import main
from miub.report.report import MIUBReport


class Examples(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(1, 23, (64, 10), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = self.ids[i]
        return {"input_ids": ids, "attention_mask": ids > 3, "labels": ids.sum() % 3}


class Listener(TrainerCallback):
    """Stands where an integration such as TensorBoard's stands: before the user's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def make_trainer(folder, callbacks, **arguments):
    torch.manual_seed(0)
    model = with_lora(bert(), target_modules=["query", "dense"], task_type="SEQ_CLS")
    defaults = dict(
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    examples = Examples()
    return Trainer(model, args, train_dataset=examples, eval_dataset=examples, callbacks=callbacks)


@pytest.mark.filterwarnings("ignore:.*16 are needed")
def test_the_trainers_own_logs_carry_the_values_also_to_callbacks_that_come_first(tmp_path):
    callback, listener = MIUBCallback(every=4, tokens=32), Listener()
    trainer = make_trainer(tmp_path, [listener, callback])
    trainer.train()
    logged = [logs for logs in listener.logs if "miub/mean" in logs]
    report = callback.report()
    assert [row.step for row in next(iter(report.history.values()))] == [4, 8]
    assert len(logged) == 2
    assert logged[-1]["miub/mean"] == report.mean
    assert logged[-1]["miub/mean_per_rank"] == report.mean_per_rank
    for row in report:
        assert logged[-1][f"miub/{row.layer}"] == row.value > 0
    history = [entry for entry in trainer.state.log_history if "miub/mean" in entry]
    assert [entry["step"] for entry in history] == [4, 8]
    assert "loss" in history[0]


@pytest.mark.filterwarnings("ignore:.*16 are needed")
def test_evaluation_is_not_measured_and_no_hook_stays(tmp_path):
    callback = MIUBCallback(every=3, tokens=32, per_layer=False)
    trainer = make_trainer(tmp_path, [callback], eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert [row.step for row in next(iter(callback.report().history.values()))] == [3, 6]
    logged = [set(logs) for logs in trainer.state.log_history if "miub/mean" in logs]
    assert logged
    assert all(
        {k for k in keys if "miub" in k} == {"miub/mean", "miub/mean_per_rank"} for keys in logged
    )
    modules = trainer.model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@pytest.mark.filterwarnings("ignore:.*16 are needed")
def test_training_is_the_same_with_it(tmp_path):
    plain, watched = (
        make_trainer(tmp_path / name, callbacks)
        for name, callbacks in (("plain", []), ("watched", [MIUBCallback(every=2, tokens=32)]))
    )
    losses = []
    for trainer in (plain, watched):
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:.*16 are needed")
def test_it_works_beside_the_scalora_callback_and_flags_rebased_layers(tmp_path):
    callback = MIUBCallback(every=4, tokens=32)
    make_trainer(tmp_path, [scalora.ScaLoRACallback(rule="exact"), callback]).train()
    assert all(row.rebased for row in callback.report())


def test_gradient_accumulation_measures_one_pass_of_a_step(tmp_path):
    callback = MIUBCallback(every=2, tokens=32)
    with pytest.warns(UserWarning, match="16 are needed"):
        make_trainer(tmp_path, [callback], gradient_accumulation_steps=2, max_steps=4).train()
    report = callback.report()
    assert [(row.step, row.tokens) for row in next(iter(report.history.values()))] == [
        (2, 32),
        (4, 32),
    ]


def test_before_training_there_is_no_report():
    with pytest.raises(ValueError, match="training has not begun"):
        MIUBCallback().report()
    with pytest.raises(ValueError, match="every must be"):
        MIUBCallback(every=0)


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


@pytest.mark.slow
def test_python_m_miub_runs(trained):
    command = [sys.executable, "-m", "miub", *arguments(trained)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "all layers" in done.stdout


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
    command = arguments(trained)
    command[1], command[3] = str(tmp_path / "gpt2"), str(tmp_path / "gpt2-adapter")
    assert main(command) == 0
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
    command = arguments(trained, "--batches", "1", "--json", str(trained / "miub.json"))
    command[3] = str(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ScaLoRA")
        assert main(command) == 0
    rows = MIUBReport.from_json(trained / "miub.json")
    assert {row.layer for row in rows} == set(expected)
    for row in rows:
        assert row.value == pytest.approx(expected[row.layer], rel=1e-3, abs=1e-4)


def test_the_command_line_refuses_an_adapter_without_its_carry(trained, capsys):
    checkpoint, _ = checkpoint_of(trained, "carry")
    (checkpoint / "scalora.safetensors").unlink()
    command = arguments(trained)
    command[3] = str(checkpoint)
    assert main(command) == 2
    assert "carry belongs" in capsys.readouterr().err
