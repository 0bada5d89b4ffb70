"""What is saved answers as the model in memory did, here and where scalora is not installed."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from training import optimizer_of, rebase
from transformers import BertForSequenceClassification, GPT2LMHeadModel

import scalora

GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]
BERT_TARGETS = ["query", "value", "dense"]


@dataclass(frozen=True)
class Case:
    base: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    config: dict[str, Any] = field(default_factory=dict)

    def fine_tuned(self, **changes: Any) -> FineTuned:
        base = self.base()
        start = copy.deepcopy(base)
        model = models.with_lora(base, **{**self.config, **changes})
        optimizer = optimizer_of(model)
        inputs = self.inputs()
        models.train(model, optimizer, inputs, steps=6)
        return FineTuned(model, optimizer, start, inputs)


@dataclass
class FineTuned:
    model: Any
    optimizer: scalora.ScaLoRA
    start: nn.Module
    inputs: Tensor

    def answers(self) -> Tensor:
        return models.answers(self.model, self.inputs)

    def reloaded(self, folder: Path) -> Any:
        return PeftModel.from_pretrained(copy.deepcopy(self.start), folder)


def _perceptron(**config: Any) -> Case:
    return Case(
        models.Perceptron,
        lambda: models.vectors(64, 12),
        {"target_modules": ["first", "second"], **config},
    )


def _embedder(**config: Any) -> Case:
    return Case(
        models.Embedder,
        lambda: models.token_ids(16, 7),
        {"target_modules": ["tokens", "head"], **config},
    )


def _images(**config: Any) -> Case:
    return Case(
        lambda: models.Convolutions(nn.Conv2d(3, 6, 3, stride=2, padding=1)),
        lambda: models.vectors(12, 3, 9, 8),
        {"target_modules": ["convolution", "head"], **config},
    )


def _gpt2(**config: Any) -> Case:
    return Case(
        models.gpt2,
        lambda: models.token_ids(12, 9),
        {"target_modules": GPT2_TARGETS, "fan_in_fan_out": True, **config},
    )


def _bert(**config: Any) -> Case:
    return Case(
        models.bert, lambda: models.token_ids(12, 9), {"target_modules": BERT_TARGETS, **config}
    )


CASES = {
    "linear": _perceptron(),
    "rsLoRA": _perceptron(use_rslora=True),
    "lora_bias": _perceptron(lora_bias=True),
    "every bias": _perceptron(bias="all"),
    "ranks and alphas by pattern": _perceptron(
        rank_pattern={"first": 5}, alpha_pattern={"second": 1}
    ),
    "embedding": _embedder(),
    "conv2d 3x3": _images(),
    "conv2d 1x1": Case(
        lambda: models.Convolutions(nn.Conv2d(3, 6, 1)),
        lambda: models.vectors(12, 3, 9, 8),
        {"target_modules": ["convolution", "head"]},
    ),
    "conv1d": Case(
        lambda: models.Convolutions(nn.Conv1d(3, 6, 4)),
        lambda: models.vectors(24, 3, 17),
        {"target_modules": ["convolution", "head"]},
    ),
    "conv3d": Case(
        lambda: models.Convolutions(nn.Conv3d(2, 5, 2)),
        lambda: models.vectors(12, 2, 4, 5, 4),
        {"target_modules": ["convolution", "head"]},
    ),
    "conv3d 1x1x1": Case(
        lambda: models.Convolutions(nn.Conv3d(2, 5, 1)),
        lambda: models.vectors(12, 2, 4, 5, 4),
        {"target_modules": ["convolution", "head"], "r": 2},
    ),
    "Conv1D in GPT-2": _gpt2(),
    "modules_to_save in BERT": _bert(modules_to_save=["classifier"]),
    "every linear layer of BERT": _bert(target_modules="all-linear", task_type="SEQ_CLS"),
    "DoRA linear": _perceptron(use_dora=True),
    "DoRA embedding": _embedder(use_dora=True),
    "DoRA conv2d": _images(use_dora=True),
    "DoRA Conv1D in GPT-2": _gpt2(use_dora=True),
    "PiSSA": _perceptron(init_lora_weights="pissa"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_saved_adapter_of_full_rank_answers_the_same(case: Case, tmp_path: Path) -> None:
    tuned = case.fine_tuned()
    before, bits = tuned.answers(), models.bits(tuned.model)
    errors = scalora.save_adapter(tuned.model, tmp_path, rank=10**6, base=tuned.start)
    assert errors.keys() == {pair.name for pair in tuned.optimizer.rebased_pairs}
    assert max(errors.values()) < 1e-5
    models.assert_same_bits(tuned.model, bits)
    torch.testing.assert_close(
        models.answers(tuned.reloaded(tmp_path), tuned.inputs), before, rtol=0, atol=1e-5
    )
    assert models.answers(tuned.start, tuned.inputs).sub(before).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["linear", "DoRA linear", "conv2d 3x3", "Conv1D in GPT-2"])
def test_rank_is_chosen_by_layer_to_keep_the_error_below_one_in_ten_thousand(
    name: str, tmp_path: Path
) -> None:
    tuned = CASES[name].fine_tuned()
    errors = scalora.save_adapter(tuned.model, tmp_path, base=tuned.start)
    assert max(errors.values()) <= 1.01e-4
    torch.testing.assert_close(
        models.answers(tuned.reloaded(tmp_path), tuned.inputs), tuned.answers(), rtol=0, atol=1e-3
    )
    ranks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    for layer, spectrum in scalora.delta_spectrum(tuned.model, tuned.start).items():
        k = ranks[f"^{re.escape(layer)}"]
        assert spectrum[k:].norm() <= 1.01e-4 * spectrum.norm()
        assert k == 1 or spectrum[k - 1 :].norm() > 0.99e-4 * spectrum.norm(), "one less would do"


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d 3x3", "Conv1D in GPT-2"])
def test_error_of_a_cut_rank_is_the_least_possible(name: str, rank: int, tmp_path: Path) -> None:
    tuned = CASES[name].fine_tuned()
    errors = scalora.save_adapter(tuned.model, tmp_path, rank=rank, base=tuned.start)
    spectra = scalora.delta_spectrum(tuned.model, tuned.start)
    reloaded = tuned.reloaded(tmp_path)
    start = dict(tuned.start.named_modules())
    for pair in tuned.optimizer.rebased_pairs:
        # Eckart and Young 1936: no matrix of that rank comes closer than the cut singular values.
        spectrum = spectra[pair.name]
        least = spectrum[rank:].norm() / spectrum.norm()
        assert errors[pair.name] == pytest.approx(float(least), rel=1e-3, abs=1e-6)

        learned, kept = models.layer(tuned.model, pair.name), models.layer(reloaded, pair.name)
        change = (
            learned.get_base_layer().weight
            + learned.get_delta_weight("default")
            - start[pair.name].weight
        )
        change = change.detach()
        missing = change - kept.get_delta_weight("default").detach()
        relative = float(missing.norm() / change.norm())
        assert relative == pytest.approx(errors[pair.name], rel=1e-3, abs=1e-6)
        assert kept.r["default"] == min(rank, len(spectrum))


def test_model_that_learned_nothing_saves_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    base = models.Perceptron()
    start = copy.deepcopy(base)
    model = models.with_lora(base, target_modules=["first", "second"])
    assert scalora.save_adapter(model, tmp_path) == {"first": 0.0, "second": 0.0}
    inputs = models.vectors(8, 12)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path)
    assert torch.equal(models.answers(reloaded, inputs), models.answers(start, inputs))


def test_saved_adapter_keeps_layers_apart_whose_names_match_each_others_pattern(
    tmp_path: Path,
) -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(12, 12)})
            self.a_b = nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a_b(torch.tanh(self.a["b"](x)))

    case = Case(
        Names,
        lambda: models.vectors(64, 12),
        {"target_modules": ["a.b", "a_b"], "rank_pattern": {"a_b": 1}},
    )
    tuned = case.fine_tuned()
    scalora.save_adapter(tuned.model, tmp_path, base=tuned.start)
    torch.testing.assert_close(
        models.answers(tuned.reloaded(tmp_path), tuned.inputs), tuned.answers(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half_adapters", [False, True])
def test_half_precision_model_saves_an_adapter_of_its_own_change(
    dtype: torch.dtype, half_adapters: bool, tmp_path: Path
) -> None:
    base = models.Perceptron()
    wide = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = models.with_lora(
        base.to(dtype),
        autocast_adapter_dtype=not half_adapters,
        target_modules=["first", "second"],
    )
    inputs = models.vectors(64, 12).to(dtype)
    inner = torch.optim.SGD(models.trainable(model), lr=0.1)
    models.train(model, inner, inputs, steps=4)
    # Nothing was folded: the change has the adapter's rank, whatever W0 lost on its way to half.
    spectra = scalora.delta_spectrum(model, wide)
    for layer, spectrum in spectra.items():
        assert (spectrum > 1e-5 * spectrum[0]).sum() == 3, layer
    errors = scalora.save_adapter(model, tmp_path, base=wide)
    assert max(errors.values()) < 1e-5
    ranks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert set(ranks.values()) == {3}


@pytest.fixture(scope="module")
def reloaded_without_scalora(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Case -> the answers in memory, and those of a process that cannot import scalora."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("elsewhere")
    chosen = {
        "linear": models.Perceptron,
        "embedding": models.Embedder,
        "lora_bias": models.Perceptron,
        "DoRA linear": models.Perceptron,
        "modules_to_save in BERT": models.bert,
        "DoRA Conv1D in GPT-2": models.gpt2,
    }
    here = {}
    for number, (name, base) in enumerate(chosen.items()):
        tuned = CASES[name].fine_tuned()
        scalora.save_adapter(tuned.model, folder / str(number), rank=10**6, base=tuned.start)
        torch.save(tuned.start.state_dict(), folder / str(number) / "base.pt")
        torch.save((base.__name__, tuned.inputs), folder / str(number) / "inputs.pt")
        here[name] = tuned.answers()
    script = f"""{models.WITHOUT_SCALORA}
import torch, models
from peft import PeftModel
found = []
for number in range({len(chosen)}):
    folder = {str(folder)!r} + "/" + str(number)
    maker, inputs = torch.load(folder + "/inputs.pt")
    base = getattr(models, maker)()
    base.load_state_dict(torch.load(folder + "/base.pt"))
    found.append(models.answers(PeftModel.from_pretrained(base, folder), inputs))
torch.save(found, {str(folder / "found.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder, timeout=300)
    there = torch.load(folder / "found.pt")
    return {name: (here[name], there[i]) for i, name in enumerate(chosen)}


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "embedding",
        "lora_bias",
        "DoRA linear",
        "modules_to_save in BERT",
        "DoRA Conv1D in GPT-2",
    ],
)
def test_saved_adapter_loads_where_scalora_cannot_be_imported(
    name: str, reloaded_without_scalora: dict[str, tuple[Tensor, Tensor]]
) -> None:
    here, there = reloaded_without_scalora[name]
    torch.testing.assert_close(there, here, rtol=0, atol=1e-5)


def test_base_may_be_a_model_its_weights_or_the_folder_it_loads_from(tmp_path: Path) -> None:
    tuned = _bert().fine_tuned()
    tuned.start.save_pretrained(tmp_path / "start")
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "start")
    adapted = models.with_lora(copy.deepcopy(tuned.start), target_modules=BERT_TARGETS)
    headless = models.bert_without_head()
    headless.load_state_dict(tuned.start.bert.state_dict())
    expected = scalora.delta_spectrum(tuned.model, tuned.start)
    for base in (
        fresh,
        tuned.start.state_dict(),
        str(tmp_path / "start"),
        tmp_path / "start",
        adapted,
        adapted.state_dict(),
        headless,
        headless.state_dict(),
    ):
        found = scalora.delta_spectrum(tuned.model, base)
        assert found.keys() == expected.keys()
        for layer, spectrum in expected.items():
            assert torch.equal(found[layer], spectrum)


def test_headless_checkpoint_serves_as_the_base_of_a_model_with_a_head(tmp_path: Path) -> None:
    models.bert_without_head().save_pretrained(tmp_path / "headless")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "headless", num_labels=3)
    case = Case(lambda: base, lambda: models.token_ids(12, 9), {"target_modules": BERT_TARGETS})
    tuned = case.fine_tuned(modules_to_save=["classifier"])
    by_folder = scalora.save_adapter(tuned.model, tmp_path / "a", 2, tmp_path / "headless")
    by_name = scalora.save_adapter(tuned.model, tmp_path / "b", 2)
    assert by_folder == by_name == scalora.save_adapter(tuned.model, tmp_path / "c", 2, tuned.start)


def test_folder_that_the_model_came_from_is_used_when_no_base_is_given(tmp_path: Path) -> None:
    models.gpt2().save_pretrained(tmp_path / "start")
    case = Case(
        lambda: GPT2LMHeadModel.from_pretrained(tmp_path / "start"),
        lambda: models.token_ids(12, 9),
        {"target_modules": GPT2_TARGETS, "fan_in_fan_out": True},
    )
    tuned = case.fine_tuned()
    scalora.save_adapter(tuned.model, tmp_path / "adapter", rank=16)
    torch.testing.assert_close(
        models.answers(tuned.reloaded(tmp_path / "adapter"), tuned.inputs),
        tuned.answers(),
        rtol=0,
        atol=1e-5,
    )


def test_adapter_that_has_folded_nothing_needs_no_base(tmp_path: Path) -> None:
    case = _perceptron()
    base = case.base()
    start = copy.deepcopy(base)
    model = models.with_lora(base, **case.config)
    inputs = case.inputs()
    models.train(model, torch.optim.SGD(models.trainable(model), lr=0.3), inputs, steps=4)
    errors = scalora.save_adapter(model, tmp_path)
    assert max(errors.values()) < 1e-5
    reloaded = PeftModel.from_pretrained(start, tmp_path)
    torch.testing.assert_close(
        models.answers(reloaded, inputs), models.answers(model, inputs), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisation_that_moves_the_base_needs_a_base(init: str, tmp_path: Path) -> None:
    case = _perceptron(init_lora_weights=init)
    base = case.base()
    start = copy.deepcopy(base)
    model = models.with_lora(base, **case.config)
    with pytest.raises(ValueError, match="base"):
        scalora.save_adapter(model, tmp_path)
    scalora.save_adapter(model, tmp_path, rank=10**6, base=start)
    inputs = case.inputs()
    reloaded = PeftModel.from_pretrained(start, tmp_path)
    torch.testing.assert_close(
        models.answers(reloaded, inputs), models.answers(model, inputs), rtol=0, atol=1e-5
    )


def test_missing_base_is_refused_once_something_was_folded(tmp_path: Path) -> None:
    tuned = _perceptron().fine_tuned()
    with pytest.raises(ValueError, match="pass base="):
        scalora.save_adapter(tuned.model, tmp_path)
    with pytest.raises(ValueError, match="pass base="):
        scalora.delta_spectrum(tuned.model)
    assert not list(tmp_path.iterdir())


def test_base_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    tuned = _bert().fine_tuned()
    with pytest.raises(ValueError, match="base="):
        scalora.save_adapter(tuned.model, tmp_path / "adapter", base=tmp_path / "nothing here")


@pytest.mark.parametrize("base", [models.Perceptron(12, 21, 8), models.Embedder()], ids=type)
def test_base_of_another_model_is_refused(base: nn.Module, tmp_path: Path) -> None:
    tuned = _perceptron().fine_tuned()
    with pytest.raises(ValueError, match=r"base.*'first'"):
        scalora.save_adapter(tuned.model, tmp_path, base=base)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("as_weights", [False, True])
def test_base_that_was_folded_into_is_not_taken_for_the_pretrained_one(
    as_weights: bool, tmp_path: Path
) -> None:
    tuned = _perceptron().fine_tuned()
    own = tuned.model.get_base_model()  # the very object that get_peft_model was given
    with pytest.raises(ValueError, match="base"):
        scalora.save_adapter(tuned.model, tmp_path, base=own.state_dict() if as_weights else own)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one_is_refused(rank: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank"):
        scalora.save_adapter(_perceptron().fine_tuned().model, tmp_path, rank=rank)


def test_module_without_an_adapter_is_refused(tmp_path: Path) -> None:
    for save in (scalora.save_adapter, scalora.save_merged):
        with pytest.raises(ValueError, match="Perceptron is no model with PEFT's adapters"):
            save(models.Perceptron(), tmp_path)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_layer_that_stayed_plain_lora_is_saved_with_the_others(tmp_path: Path) -> None:
    case = Case(
        lambda: models.Convolutions(nn.Conv2d(4, 6, 3, groups=2)),
        lambda: models.vectors(12, 4, 9, 8),
        {"target_modules": ["convolution", "head"], "r": 2},
    )
    with pytest.warns(UserWarning, match="stay plain LoRA"):
        tuned = case.fine_tuned()
    scalora.save_adapter(tuned.model, tmp_path, rank=10**6, base=tuned.start)
    torch.testing.assert_close(
        models.answers(tuned.reloaded(tmp_path), tuned.inputs), tuned.answers(), rtol=0, atol=1e-5
    )


def test_adapter_is_chosen_by_name_or_because_it_is_the_active_one(tmp_path: Path) -> None:
    base = models.Perceptron()
    start = copy.deepcopy(base)
    model = models.with_lora(base, target_modules=["first", "second"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    assert scalora.save_adapter(model, tmp_path / "default").keys() == {"first", "second"}
    assert scalora.save_adapter(model, tmp_path / "other", adapter_name="other").keys() == {"first"}
    model.set_adapter("other")
    assert scalora.save_adapter(model, tmp_path / "active").keys() == {"first"}
    inputs = models.vectors(8, 12)
    for name in ("other", "active"):
        reloaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path / name)
        torch.testing.assert_close(
            models.answers(reloaded, inputs), models.answers(model, inputs), rtol=0, atol=1e-5
        )
    with pytest.raises(ValueError, match="no LoRA adapter named 'missing'"):
        scalora.save_adapter(model, tmp_path, adapter_name="missing")


MERGED = {
    "BERT": (_bert(), BertForSequenceClassification),
    "BERT, classifier saved": (
        _bert(modules_to_save=["classifier"]),
        BertForSequenceClassification,
    ),
    "BERT, DoRA": (_bert(use_dora=True), BertForSequenceClassification),
    "BERT, embedding": (_bert(target_modules=["word_embeddings"]), BertForSequenceClassification),
    "BERT, lora_bias": (_bert(lora_bias=True), BertForSequenceClassification),
    "GPT-2, tied head": (_gpt2(), GPT2LMHeadModel),
    "GPT-2, DoRA": (_gpt2(use_dora=True), GPT2LMHeadModel),
    # The head shares its weight with the embedding; only one of them changes.
    "GPT-2, adapted tied head": (_gpt2(target_modules=["c_attn", "lm_head"]), GPT2LMHeadModel),
    "GPT-2, adapted tied embedding": (_gpt2(target_modules=["c_attn", "wte"]), GPT2LMHeadModel),
}


@pytest.mark.parametrize("case, kind", MERGED.values(), ids=MERGED.keys())
def test_merged_checkpoint_answers_the_same_and_the_model_trains_on(
    case: Case, kind: Any, tmp_path: Path
) -> None:
    tuned = case.fine_tuned()
    before, bits = tuned.answers(), models.bits(tuned.model)
    scalora.save_merged(tuned.model, tmp_path)
    models.assert_same_bits(tuned.model, bits)
    assert not any(p.name.startswith("adapter") for p in tmp_path.iterdir())
    merged = kind.from_pretrained(tmp_path)
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(models.answers(merged, tuned.inputs), before, rtol=0, atol=1e-5)

    count = tuned.optimizer.rebase_count
    losses = models.train(tuned.model, tuned.optimizer, tuned.inputs, steps=4)
    assert losses[-1] < losses[0]
    assert tuned.optimizer.rebase_count == count + 4


def test_saving_in_between_does_not_change_the_run(tmp_path: Path) -> None:
    def run(save: bool) -> list[float]:
        torch.manual_seed(0)
        tuned = _bert().fine_tuned()
        if save:
            scalora.save_merged(tuned.model, tmp_path / "merged")
            scalora.save_adapter(tuned.model, tmp_path / "adapter", base=tuned.start)
        return models.train(tuned.model, tuned.optimizer, tuned.inputs, steps=4)

    assert run(save=True) == run(save=False)


def test_plain_module_is_not_saved_as_a_transformers_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Perceptron is not a transformers model"):
        scalora.save_merged(_perceptron().fine_tuned().model, tmp_path)


def _warnings_of_saving(model: Any, folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").exists()
    return [str(w.message) for w in caught if "ScaLoRA" in str(w.message)]


def test_save_pretrained_brings_the_base_from_the_first_fold_on(tmp_path: Path) -> None:
    case = _perceptron()
    start = case.base()
    model = models.with_lora(copy.deepcopy(start), **case.config)
    optimizer = optimizer_of(model, interval=3)
    for steps, brought in ((2, 0), (1, 2)):
        models.train(model, optimizer, case.inputs(), steps=steps)
        assert _warnings_of_saving(model, tmp_path) == []
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert len([name for name in tensors if "base_layer" in name]) == brought
        loaded = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path)
        assert torch.equal(
            models.answers(loaded, case.inputs()), models.answers(model, case.inputs())
        )


def test_save_pretrained_warns_from_the_first_carry_on(tmp_path: Path) -> None:
    case = _perceptron()
    model = models.with_lora(case.base(), **case.config)
    optimizer = rebase(model, case.inputs(), 2, interval=3, accumulator="carry")
    assert _warnings_of_saving(model, tmp_path / "before") == []
    models.train(model, optimizer, case.inputs(), steps=1)
    for _ in range(2):
        (message,) = _warnings_of_saving(model, tmp_path / "after")
        assert "save_merged" in message and "save_adapter" in message
    with pytest.warns(UserWarning, match="carry is missing here: call scalora.load_rebased"):
        PeftModel.from_pretrained(case.base(), tmp_path / "after")


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "pickle of a deepcopy"])
def test_copy_of_a_rebased_model_answers_for_itself(how: str, tmp_path: Path) -> None:
    tuned = _perceptron().fine_tuned()
    before = tuned.answers()
    twin = tuned.model
    if "deepcopy" in how:
        twin = copy.deepcopy(twin)
    if "pickle" in how:
        twin = pickle.loads(pickle.dumps(twin))
    assert torch.equal(models.answers(twin, tuned.inputs), before)

    with torch.no_grad():
        models.layer(twin, "first").lora_B["default"].weight.zero_()
    assert torch.equal(tuned.answers(), before)
    assert _warnings_of_saving(twin, tmp_path / "twin") == []
    saved = PeftModel.from_pretrained(copy.deepcopy(tuned.start), tmp_path / "twin")
    assert torch.equal(models.answers(saved, tuned.inputs), models.answers(twin, tuned.inputs))
    assert models.layer(saved, "first").lora_B["default"].weight.abs().max() == 0
    with pytest.raises(ValueError, match="pass base="):
        scalora.save_adapter(twin, tmp_path / "adapter")
    models.train(
        twin,
        scalora.create_scalora_optimizer(twin, torch.optim.AdamW, lr=1e-2, rule="exact"),
        tuned.inputs,
        steps=2,
    )
    assert torch.equal(tuned.answers(), before)


def test_model_and_optimizer_copied_together_go_on_alike() -> None:
    tuned = _perceptron().fine_tuned()
    model, optimizer = copy.deepcopy((tuned.model, tuned.optimizer))
    theirs = models.train(model, optimizer, tuned.inputs, steps=4)
    assert models.train(tuned.model, tuned.optimizer, tuned.inputs, steps=4) == theirs
    assert all(pair.module is models.layer(model, pair.name) for pair in optimizer.rebased_pairs)


def test_bias_of_an_adapter_without_one_of_the_base_is_not_merged(tmp_path: Path) -> None:
    model = models.with_lora(models.llama(), target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.q_proj' has no bias .*save_adapter"
    ):
        scalora.save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
