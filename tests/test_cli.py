"""``scalora export`` on checkpoints of real, tiny training runs."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import scalora
from scalora.cli import main

STATE = "scalora.safetensors"
STEPS = 8


class Sequences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(1, models.VOCABULARY, (9,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


class Classified(Sequences):
    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = super().__getitem__(i)["input_ids"]
        return {"input_ids": ids, "labels": ids.sum() % 3}


def llama(**changes: Any) -> LlamaForCausalLM:
    options = dict(
        vocab_size=models.VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


@dataclass(frozen=True)
class Kind:
    """One kind of training run."""

    dtype: torch.dtype = torch.float32
    quantized: bool = False
    classes: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    lora: tuple[tuple[str, Any], ...] = ()

    @property
    def model_class(self) -> Any:
        return BertForSequenceClassification if self.classes else LlamaForCausalLM

    def base(self, folder: Path) -> Any:
        """As a user loads it."""
        options: dict[str, Any] = {}
        if self.classes:
            options = {"num_labels": self.classes, "ignore_mismatched_sizes": True}
        if self.quantized:
            options["quantization_config"] = nf4()
        return self.model_class.from_pretrained(folder, dtype=self.dtype, **options)


KINDS = {
    "dense": Kind(),
    "dense, bfloat16": Kind(dtype=torch.bfloat16),
    "dense, no task type": Kind(lora=(("task_type", None),)),
    "dense, DoRA": Kind(lora=(("use_dora", True),)),
    "dense, PiSSA": Kind(lora=(("init_lora_weights", "pissa"),)),
    "carry": Kind(options=(("accumulator", "carry"),)),
    "carry, folded when full": Kind(
        options=(("accumulator", "carry"), ("carry_rank", 6), ("when_full", "fold"))
    ),
    "tied head": Kind(lora=(("target_modules", ["q_proj", "lm_head"]),)),
    "other adapter name": Kind(options=(("adapter_name", "mine"),)),
    "no re-basing": Kind(options=(("rule", "none"),)),
    "NF4": Kind(quantized=True),
    "NF4, DoRA": Kind(quantized=True, lora=(("use_dora", True),)),
    "NF4, DoRA, nothing carried yet": Kind(
        quantized=True, lora=(("use_dora", True),), options=(("interval", 100),)
    ),
    "three classes": Kind(classes=3),
    "three classes, carry": Kind(classes=3, options=(("accumulator", "carry"),)),
}
# Their adapter needs nothing of the base but its shapes.
CARRIED = [
    "carry",
    "no re-basing",
    "NF4",
    "NF4, DoRA",
    "NF4, DoRA, nothing carried yet",
    "three classes, carry",
]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(models.VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a kind -> its `Run`; each is trained once, when it is first asked for."""
    return Runs(tmp_path_factory.mktemp("runs"))


@dataclass
class Run:
    kind: Kind
    base: Path
    checkpoint: Path
    answers: Tensor

    def loaded(self, adapter: Path) -> Tensor:
        """What the adapter answers on the base that was trained."""
        return answers(PeftModel.from_pretrained(self.kind.base(self.base), adapter))


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Run] = {}
        torch.manual_seed(0)
        llama().save_pretrained(folder / "llama")
        llama(tie_word_embeddings=True).save_pretrained(folder / "tied")
        models.bert(num_labels=2).save_pretrained(folder / "bert")

    def __getitem__(self, name: str) -> Run:
        if name not in self.done:
            self.done[name] = self.trained(name)
        return self.done[name]

    def trained(self, name: str) -> Run:
        kind = KINDS[name]
        base = self.folder / ("bert" if kind.classes else "tied" if "tied" in name else "llama")
        torch.manual_seed(1)
        model = kind.base(base)
        if kind.quantized:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        options = dict(
            r=3,
            task_type="SEQ_CLS" if kind.classes else "CAUSAL_LM",
            target_modules=["query", "dense"] if kind.classes else ["q_proj", "down_proj"],
        )
        adapter = dict(kind.options).get("adapter_name", "default")
        model = get_peft_model(
            model, LoraConfig(**{**options, **dict(kind.lora)}), adapter_name=adapter
        )
        folder = self.folder / name.replace(" ", "-")
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            save_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Classified() if kind.classes else Sequences(),
            callbacks=[scalora.ScaLoRACallback(**{"rule": "exact", **dict(kind.options)})],
            processing_class=tokenizer(),
        )
        trainer.train()
        return Run(kind, base, folder / f"checkpoint-{STEPS}", answers(model))


def answers(model: Any) -> Tensor:
    """Logits, with gradients: bitsandbytes rounds the scales of 4 bits to evaluate on a CPU."""
    model.train()
    return model(torch.stack([Sequences()[i]["input_ids"] for i in range(8)])).logits.detach()


def tolerance_of(run: Run) -> float:
    """Round-off; of bfloat16, two units in the last place of the largest logit."""
    if run.kind.dtype == torch.float32:
        return 2e-5
    return 2 * torch.finfo(run.kind.dtype).eps * float(run.answers.abs().max())


pytestmark = [
    pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]


def export(*arguments: Any) -> None:
    assert main(["export", *map(str, arguments)]) == 0


@pytest.mark.parametrize("name", KINDS)
def test_exported_adapter_answers_as_the_model_in_training(
    name: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs[name]
    capsys.readouterr()
    rank = () if name in CARRIED else ("--rank", 64)
    export(run.checkpoint, tmp_path / "adapter", *rank)
    out, err = capsys.readouterr()
    assert err == ""
    assert "mean of" in out and "adapter of rank" in out
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert f"{size:,} bytes" in " ".join(out.split())
    tolerance = tolerance_of(run)
    torch.testing.assert_close(
        run.loaded(tmp_path / "adapter"), run.answers, rtol=0, atol=tolerance
    )
    torch.manual_seed(0)  # the head that some bases lack
    moved = (answers(run.kind.base(run.base)) - run.answers).abs().max()
    assert moved > 5 * tolerance and moved > 0.05, "the test needs a run that learned something"


@pytest.mark.parametrize("name", KINDS)
def test_exported_model_is_a_plain_one_that_answers_as_the_model_in_training(
    name: str, runs: Runs, tmp_path: Path
) -> None:
    run = runs[name]
    export(run.checkpoint, tmp_path / "merged", "--merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    merged = run.kind.model_class.from_pretrained(tmp_path / "merged")
    assert merged.dtype == run.kind.dtype
    half = run.kind.dtype == torch.bfloat16
    torch.testing.assert_close(answers(merged), run.answers, rtol=0, atol=0.03 if half else 2e-5)


@pytest.mark.parametrize("name", CARRIED)
def test_adapter_of_a_carry_is_written_where_its_base_is_not_to_be_had(
    name: str, runs: Runs, tmp_path: Path
) -> None:
    run = runs[name]
    shutil.copytree(run.checkpoint, tmp_path / "checkpoint")
    config = tmp_path / "checkpoint" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(run.base), "/nowhere"))
    export(tmp_path / "checkpoint", tmp_path / "adapter")
    torch.testing.assert_close(run.loaded(tmp_path / "adapter"), run.answers, rtol=0, atol=2e-5)


def test_folder_of_save_pretrained_and_save_training_state_is_a_checkpoint(
    runs: Runs, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(runs["dense"].base)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    optimizer = scalora.create_scalora_optimizer(model, torch.optim.AdamW, lr=1e-2, rule="exact")
    models.train(model, optimizer, models.token_ids(4, 9), steps=4)
    model.save_pretrained(tmp_path / "checkpoint")
    scalora.save_training_state(optimizer, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "adapter", "--rank", 64)
    base = LlamaForCausalLM.from_pretrained(runs["dense"].base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(answers(loaded), answers(model), rtol=0, atol=2e-5)
    assert not list((tmp_path / "adapter").glob("tokenizer*"))


def factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> lora_B (m, k), lora_A (k, n) in float64, as the file has them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    suffix = ".lora_B.weight"
    return {
        name.removesuffix(suffix): (
            tensor.double(),
            tensors[name.replace("lora_B", "lora_A")].double(),
        )
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    }


@pytest.mark.parametrize("name", ["dense", "NF4"])
def test_rank_cuts_to_the_errors_that_are_printed(
    name: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = runs[name].checkpoint
    export(checkpoint, tmp_path / "whole", "--rank", 64)
    capsys.readouterr()
    export(checkpoint, tmp_path / "cut", "--rank", 2)
    out = capsys.readouterr().out
    whole, cut = factors(tmp_path / "whole"), factors(tmp_path / "cut")
    errors = []
    for layer, (B, A) in whole.items():
        kept_B, kept_A = cut[layer]
        assert kept_B.shape[1] == 2
        errors.append(float((B @ A - kept_B @ kept_A).norm() / (B @ A).norm()))
    assert f"{max(errors):.1e}" in _row(out, "largest")
    assert f"{sum(errors) / len(errors):.1e}" in _row(out, "mean")
    assert "adapter of rank 2" in out


def _row(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if name in line)


def test_merged_weights_are_written_in_the_dtype_asked_for(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["NF4"]
    export(run.checkpoint, tmp_path / "exact", "--merged")
    capsys.readouterr()
    export(run.checkpoint, tmp_path / "half", "--merged", "--dtype", "bfloat16")
    out = capsys.readouterr().out
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    half = load_file(tmp_path / "half" / "model.safetensors")
    for name, weight in exact.items():
        assert torch.equal(half[name], weight.bfloat16()), name
    export(run.checkpoint, tmp_path / "adapter")
    errors = []
    for layer, (B, A) in factors(tmp_path / "adapter").items():
        name = layer.removeprefix("base_model.model.") + ".weight"
        errors.append(float((half[name].double() - exact[name]).norm() / (B @ A).norm()))
    assert f"{max(errors):.1e}" in _row(out, "largest")


def test_quantized_run_is_merged_onto_weights_in_full_precision(runs: Runs, tmp_path: Path) -> None:
    run = runs["NF4"]
    export(run.checkpoint, tmp_path / "m", "--merged", "--full-precision-base", run.base)
    export(run.checkpoint, tmp_path / "adapter")
    wide = LlamaForCausalLM.from_pretrained(run.base)
    expected = answers(PeftModel.from_pretrained(wide, tmp_path / "adapter"))
    found = answers(LlamaForCausalLM.from_pretrained(tmp_path / "m"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (found - run.answers).abs().max() > 1e-3, "not the quantized base"


def test_base_may_be_named(runs: Runs, tmp_path: Path) -> None:
    run = runs["dense"]
    shutil.copytree(run.checkpoint, tmp_path / "checkpoint")
    shutil.copytree(run.base, tmp_path / "moved")
    config = tmp_path / "checkpoint" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(run.base), "/nowhere"))
    for options in (["--rank", 64], ["--merged"]):
        folder = tmp_path / str(options[0])
        export(tmp_path / "checkpoint", folder, *options, "--base", tmp_path / "moved")
    torch.testing.assert_close(run.loaded(tmp_path / "--rank"), run.answers, rtol=0, atol=2e-5)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "--merged")
    torch.testing.assert_close(answers(merged), run.answers, rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_tokenizer_comes_along(options: list[str], runs: Runs, tmp_path: Path) -> None:
    checkpoint = runs["carry"].checkpoint
    export(checkpoint, tmp_path / "out", *options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not {"optimizer.pt", "training_args.bin", STATE} & {
        path.name for path in (tmp_path / "out").iterdir()
    }
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert loaded("w3 w5")["input_ids"] == [3, 5]


def _flip_a_bit(folder: Path) -> None:
    whole = bytearray((folder / STATE).read_bytes())
    whole[-8] ^= 1
    (folder / STATE).write_bytes(whole)


def _swap_the_adapter(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def _drop_a_factor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, path, metadata={"format": "pt"})


def _change_the_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))


FAULTS: dict[str, tuple[str, Any, list[str], str]] = {
    "no such folder": ("dense", shutil.rmtree, [], "nothing to export"),
    "adapter alone": ("dense", lambda f: (f / STATE).unlink(), [], STATE),
    "no adapter": ("carry", lambda f: (f / "adapter_config.json").unlink(), [], "no adapter"),
    "no weights of the adapter": (
        "carry",
        lambda f: (f / "adapter_model.safetensors").unlink(),
        [],
        "adapter.*could not be loaded",
    ),
    "config that is not JSON": (
        "carry",
        lambda f: (f / "adapter_config.json").write_text("{"),
        [],
        "adapter.*could not be loaded",
    ),
    "cut short": ("dense", lambda f: (f / STATE).write_bytes(b"x" * 99), [], "cannot be read"),
    "one bit flipped": ("dense", _flip_a_bit, [], "damaged"),
    "one bit of a carry flipped": ("carry", _flip_a_bit, [], "damaged"),
    "another adapter": ("carry", _swap_the_adapter, [], "adapter is not the one"),
    "a factor missing": ("carry", _drop_a_factor, [], "missing adapter keys"),
    "another rank": ("carry", _change_the_rank, [], "could not be loaded.*size mismatch"),
    "rank 0": ("carry", None, ["--rank", "0"], "at least 1"),
    "rank that is no number": ("carry", None, ["--rank", "x"], "invalid int"),
    "rank of a merged model": ("carry", None, ["--rank", "2", "--merged"], "--rank"),
    "dtype of an adapter": ("carry", None, ["--dtype", "bfloat16"], "--merged"),
    "unknown dtype": ("carry", None, ["--merged", "--dtype", "int8"], "invalid choice"),
    "full precision without merging": ("NF4", None, ["--full-precision-base", "x"], "--merged"),
    "no such base": ("dense", None, ["--base", "/nowhere"], "base /nowhere could not be loaded"),
    "no such base to merge": (
        "NF4",
        None,
        ["--merged", "--full-precision-base", "/nowhere"],
        "/nowhere could not be loaded",
    ),
    "unknown option": ("carry", None, ["--best"], "unrecognized"),
}


@pytest.mark.parametrize("name, change, options, message", FAULTS.values(), ids=FAULTS.keys())
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    name: str,
    change: Any,
    options: list[str],
    message: str,
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(runs[name].checkpoint, tmp_path / "checkpoint")
    if change is not None:
        change(tmp_path / "checkpoint")
    before = sorted(tmp_path.rglob("*"))
    _assert_refused([tmp_path / "checkpoint", tmp_path / "new" / "out", *options], message, capsys)
    assert sorted(tmp_path.rglob("*")) == before


def _assert_refused(arguments: list[Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    try:
        status: Any = main(["export", *map(str, arguments)])
    except SystemExit as stopped:  # of argparse
        status = stopped.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("scalora") and err.count("\n") == 1 and err.endswith("\n")
    assert re.search(message, err), err


@pytest.mark.parametrize("base", ["bert", "narrow"])
@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_base_of_another_model_is_refused(
    base: str,
    options: list[str],
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = runs.folder / "bert"
    if base == "narrow":
        folder = tmp_path / "narrow"
        llama(intermediate_size=48).save_pretrained(folder)
    arguments = [runs["dense"].checkpoint, tmp_path / "out", "--base", folder, *options]
    _assert_refused(arguments, "base|no weight|has a weight", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_folder_with_something_in_it_is_left_alone(
    options: list[str], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    _assert_refused([runs["carry"].checkpoint, tmp_path / "out", *options], "empty folder", capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_empty_folder_is_filled(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(runs["carry"].checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_write_that_fails_leaves_nothing(
    options: list[str],
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = runs["carry"].checkpoint

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("scalora.export.shutil.copyfile", fail)  # the last thing that is written
    _assert_refused([checkpoint, tmp_path / "out", *options], "disk full", capsys)
    assert not list(tmp_path.iterdir())


def test_command_runs_as_a_module(runs: Runs, tmp_path: Path) -> None:
    run = runs["NF4"]
    command = [sys.executable, "-m", "scalora", "export", run.checkpoint, tmp_path / "adapter"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "adapter of rank" in done.stdout
    torch.testing.assert_close(run.loaded(tmp_path / "adapter"), run.answers, rtol=0, atol=2e-5)


def test_module_exits_with_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scalora", "export", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("scalora", run_name="__main__")
    assert stopped.value.code == 2


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"scalora {scalora.__version__}\n"
    assert main([]) == 0
    assert "export" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for option in ("--base", "--rank", "--merged", "--full-precision-base", "--dtype"):
        assert option in out
