"""``scalora export`` on checkpoints of real, tiny training runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from exported_runs import CARRIED, KINDS, STATE, Runs, answers, export, tolerance_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import scalora

pytestmark = [
    pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a kind -> its `Run`; each is trained once, when it is first asked for."""
    return Runs(tmp_path_factory.mktemp("runs"))


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


@pytest.mark.slow
def test_command_runs_as_a_module(runs: Runs, tmp_path: Path) -> None:
    run = runs["NF4"]
    command = [sys.executable, "-m", "scalora", "export", run.checkpoint, tmp_path / "adapter"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "adapter of rank" in done.stdout
    torch.testing.assert_close(run.loaded(tmp_path / "adapter"), run.answers, rtol=0, atol=2e-5)
