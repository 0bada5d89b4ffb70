"""Models whose adapter came without a PeftModel: saved, exported, warned of like any other."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from training import optimizer_of, rebase
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

import scalora
from scalora.saving import export_checkpoint

IDS = models.token_ids(8, 9)
CONFIG = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
accumulators = pytest.mark.parametrize("accumulator", ["dense", "carry"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pretrained model."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    models.llama(vocab_size=models.VOCABULARY).save_pretrained(folder)
    return folder


def adapted(base: Path) -> Any:
    """By transformers' own ``add_adapter``."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(CONFIG)
    return model


def tuned(base: Path, accumulator: str) -> tuple[Any, Tensor]:
    """A model that was re-based, and what it answers."""
    model = adapted(base)
    rebase(model, IDS, 6, accumulator=accumulator)
    return model, models.answers(model, IDS)


def assert_learned(base: Path, answers: Tensor) -> None:
    assert (
        models.answers(AutoModelForCausalLM.from_pretrained(base), IDS) - answers
    ).abs().max() > 0.02


@accumulators
@pytest.mark.parametrize("load", ["PeftModel", "transformers"])
def test_saved_adapter_answers_as_the_model_in_training(
    accumulator: str, load: str, base: Path, tmp_path: Path
) -> None:
    model, expected = tuned(base, accumulator)
    assert_learned(base, expected)
    scalora.save_adapter(model, tmp_path, rank=64, base=str(base))
    if load == "PeftModel":
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(models.answers(loaded, IDS), expected, rtol=0, atol=2e-5)


@accumulators
def test_merged_model_is_a_plain_one_and_the_one_in_training_goes_on(
    accumulator: str, base: Path, tmp_path: Path
) -> None:
    model, expected = tuned(base, accumulator)
    scalora.save_merged(model, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(models.answers(merged, IDS), expected, rtol=0, atol=2e-5)
    assert torch.equal(models.answers(model, IDS), expected)
    assert model.active_adapters() == ["default"]


def test_save_pretrained_brings_the_folded_base(base: Path, tmp_path: Path) -> None:
    model, expected = tuned(base, "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(models.answers(loaded, IDS), expected)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(models.answers(PeftModel.from_pretrained(plain, tmp_path), IDS), expected)


def test_save_pretrained_without_the_carry_warns_when_saved_and_when_loaded(
    base: Path, tmp_path: Path
) -> None:
    model, expected = tuned(base, "carry")
    with pytest.warns(UserWarning, match="writes the adapter alone.*save_adapter"):
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="ScaLoRA's carry is missing here"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.allclose(models.answers(loaded, IDS), expected, atol=1e-3)  # it is so


@pytest.mark.parametrize("method", ["disable_adapters", "delete_adapter"])
def test_method_that_shows_a_folded_base_says_so(method: str, base: Path) -> None:
    model, _ = tuned(base, "dense")
    arguments = ["default"] if method == "delete_adapter" else []
    with pytest.warns(UserWarning, match="ScaLoRA has folded part of what 'default' learned"):
        getattr(model, method)(*arguments)


def test_upload_that_would_come_before_completion_is_refused(base: Path, tmp_path: Path) -> None:
    model, _ = tuned(base, "dense")
    with pytest.raises(ValueError, match=r"call model\.push_to_hub"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


@accumulators
def test_plain_module_with_injected_layers_is_saved_as_an_adapter(
    accumulator: str, tmp_path: Path
) -> None:
    def plain() -> nn.Module:
        torch.manual_seed(0)
        return models.Perceptron()

    inputs = models.vectors(16, 12)
    model: Any = inject_adapter_in_model(LoraConfig(r=3, target_modules=["first"]), plain())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = optimizer_of(model, accumulator=accumulator)
    models.train(model, optimizer, inputs, 6)
    scalora.save_adapter(model, tmp_path, rank=12, base=plain())
    loaded = PeftModel.from_pretrained(plain(), tmp_path)
    torch.testing.assert_close(
        models.answers(loaded, inputs), models.answers(model, inputs), rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="Perceptron is not a transformers model"):
        scalora.save_merged(model, tmp_path / "merged")


def test_two_adapted_models_in_one_are_not_saved_as_if_they_were_one(
    base: Path, tmp_path: Path
) -> None:
    both = nn.ModuleList([tuned(base, "dense")[0], tuned(base, "dense")[0]])
    for save in (scalora.save_adapter, scalora.save_merged):
        with pytest.raises(ValueError, match=r"2 models with adapters, at \['0', '1'\]"):
            save(both, tmp_path)


class Wrapper(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_layers_have_the_names_that_they_have_without_what_is_around(base: Path) -> None:
    model = adapted(base)
    alone = [pair.name for pair in optimizer_of(model).rebased_pairs]
    around = [pair.name for pair in optimizer_of(Wrapper(model)).rebased_pairs]
    assert "model.layers.0.self_attn.q_proj" in alone
    assert around == alone


def trainer_of(model: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = scalora.ScaLoRACallback(rule="exact", **options)
    made = {"model_init": model} if callable(model) and not isinstance(model, nn.Module) else {}
    return Trainer(
        **(made or {"model": model}),
        args=arguments,
        train_dataset=models.Sequences(),
        callbacks=[callback],
    )


@accumulators
def test_checkpoint_is_exported_as_adapter_and_merged(
    accumulator: str, base: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(adapted(base), tmp_path, accumulator=accumulator)
    trainer.train()
    expected = models.answers(trainer.model, IDS)
    assert_learned(base, expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ScaLoRA")
        export_checkpoint(tmp_path / "checkpoint-6", tmp_path / "adapter", rank=64)
        export_checkpoint(tmp_path / "checkpoint-6", tmp_path / "merged", merged=True)
    for folder in ("adapter", "merged"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(models.answers(loaded, IDS), expected, rtol=0, atol=2e-5)


@accumulators
def test_model_that_a_trainer_saves_at_the_end_is_whole(
    accumulator: str, base: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(adapted(base), tmp_path, accumulator=accumulator)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ScaLoRA")
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    expected = models.answers(trainer.model, IDS)
    torch.testing.assert_close(models.answers(loaded, IDS), expected, rtol=0, atol=1e-5)


class Scored(nn.Module):
    """Without ``save_pretrained``: a Trainer saves its state dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = inject_adapter_in_model(CONFIG, model)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(input_ids=input_ids, labels=labels).loss}


@pytest.mark.parametrize("kind", ["add_adapter", "get_peft_model", "no transformers model"])
def test_search_over_hyper_parameters_completes_the_checkpoints_of_every_run(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(trial: Any = None) -> nn.Module:
        if kind == "add_adapter":
            return adapted(base)
        plain = AutoModelForCausalLM.from_pretrained(base)
        return (
            Scored(plain)
            if "no " in kind
            else models.with_lora(plain, r=3, target_modules=["q_proj"])
        )

    trainer = trainer_of(model, tmp_path)
    # As Trainer.hyperparameter_search sets them, whose backends need not be installed.
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda trial: trial.params
    for number in range(2):
        trial = SimpleNamespace(number=number, params={"learning_rate": 1e-2})
        trainer.train(trial=trial)
    written = {
        str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("scalora.safetensors")
    }
    assert written == {f"run-{run}/checkpoint-{step}" for run in range(2) for step in (3, 6)}


@accumulators
def test_sentence_transformer_is_saved_with_all_its_parts(accumulator: str, tmp_path: Path) -> None:
    parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    torch.manual_seed(0)
    models.bert_without_head().save_pretrained(tmp_path / "base")
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path / "base")

    def fresh() -> Any:
        transformer = parts.Transformer(str(tmp_path / "base"), max_seq_length=8)
        return SentenceTransformer(modules=[transformer, parts.Pooling(16)], device="cpu")

    def embeddings(model: Any) -> Tensor:
        return torch.tensor(model.encode(["a b c", "d e f", "h a b"]))

    torch.manual_seed(1)
    model = fresh()
    model.add_adapter(LoraConfig(r=3, target_modules=["query", "value"]))
    optimizer = optimizer_of(model, accumulator=accumulator)
    for _ in range(6):
        optimizer.zero_grad()
        features = model.preprocess(["a b c", "d e f", "g h a"])
        model(features)["sentence_embedding"].square().sum().backward()
        optimizer.step()
    expected = embeddings(model)
    assert (embeddings(fresh()) - expected).abs().max() > 0.01

    scalora.save_merged(model, tmp_path / "merged")
    merged = embeddings(SentenceTransformer(str(tmp_path / "merged"), device="cpu"))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    scalora.save_adapter(model, tmp_path / "adapter", rank=16, base=fresh())
    loaded = fresh()
    loaded.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(embeddings(loaded), expected, rtol=0, atol=1e-5)
    if accumulator == "dense":
        model.save_pretrained(str(tmp_path / "saved"))
        saved = embeddings(SentenceTransformer(str(tmp_path / "saved"), device="cpu"))
        torch.testing.assert_close(saved, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:save_pretrained writes", "ignore:ScaLoRA has folded part")
def test_positional_arguments_of_save_pretrained_are_those_by_name(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model = models.with_lora(base, target_modules=["0"])
    model.add_adapter("other", LoraConfig(r=3, target_modules=["1"]))
    for name in ("default", "other"):
        model.set_adapter(name)
        optimizer = optimizer_of(model, interval=1, adapter_name=name)
        models.train(model, optimizer, torch.randn(4, 16), 3)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "name": ((), {"selected_adapters": ["default"]}),
        "place": ((True, ["default"]), {}),
        "name, unsafe": ((), {"safe_serialization": False}),
        "place, unsafe": ((False,), {}),
        "name, other process": ((), {"is_main_process": False}),
        "place, other process": ((True, None, "auto", False), {}),
    }
    written = {}
    for call, (args, kwargs) in calls.items():
        folder = tmp_path / call
        folder.mkdir()
        model.save_pretrained(folder, *args, **kwargs)
        written[call] = {
            file.relative_to(folder): sorted(load_file(file))
            if file.suffix == ".safetensors"
            else []
            for file in sorted(folder.rglob("*.*"))
        }
    for call in ("", ", unsafe", ", other process"):
        assert written[f"name{call}"] == written[f"place{call}"]
    [tensors] = [names for names in written["place"].values() if names]
    assert "base_model.model.0.base_layer.weight" in tensors
    assert not [name for name in tensors if ".1." in name]
