"""What a Trainer's run leaves, as its users load it: checkpoints and what is saved at the end."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import scalora

IDS = models.token_ids(8, 9)
STEPS = 6
CARD = "README.md"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pretrained model."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    models.llama(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return folder


def pretrained(base: Path, kind: str = "") -> Any:
    options: dict[str, Any] = {}
    if kind == "NF4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        )
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)


def adapted(base: Path, kind: str = "", name: str = "default", **lora: Any) -> Any:
    torch.manual_seed(1)
    options = {"r": 3, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    config = LoraConfig(**{**options, **lora})
    return get_peft_model(pretrained(base, kind), config, adapter_name=name)


def trainer_of(
    model: Any, folder: Path, callback: scalora.ScaLoRACallback | None, **options: Any
) -> Trainer:
    arguments: dict[str, Any] = dict(
        max_steps=STEPS,
        save_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    made = {"model": model} if isinstance(model, torch.nn.Module) else {"model_init": model}
    return Trainer(
        **made,
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **options}),
        train_dataset=models.Sequences(),
        eval_dataset=models.Sequences(),
        callbacks=[] if callback is None else [callback],
    )


def callback_of(kind: str, **options: Any) -> scalora.ScaLoRACallback:
    accumulator = "auto" if kind == "NF4" else kind
    return scalora.ScaLoRACallback(**{"rule": "exact", "accumulator": accumulator, **options})


def answers(model: Any) -> Tensor:
    """With gradients: bitsandbytes rounds the scales of 4 bits to evaluate on a CPU."""
    return model.train()(input_ids=IDS).logits.detach()


def trained(base: Path, folder: Path, kind: str, **options: Any) -> tuple[Trainer, Tensor]:
    """A run that is over, in which a warning about what is saved is an error."""
    trainer = trainer_of(adapted(base, kind), folder, callback_of(kind), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ScaLoRA")
        trainer.train()
        trainer.save_model(str(folder / "final"))
    return trainer, answers(trainer.model)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


kinds = pytest.mark.parametrize("kind", ["dense", "carry", "NF4"])


@kinds
def test_model_that_is_saved_at_the_end_loads_whole_without_scalora(
    kind: str, base: Path, tmp_path: Path
) -> None:
    if kind == "NF4":
        pytest.importorskip("bitsandbytes")
    trainer, expected = trained(base, tmp_path, kind)
    assert (answers(pretrained(base, kind)) - expected).abs().max() > 0.03
    final = tmp_path / "final"
    assert_same(answers(PeftModel.from_pretrained(pretrained(base, kind), final)), expected)
    by_transformers = pretrained(base, kind)
    by_transformers.load_adapter(str(final))
    assert_same(answers(by_transformers), expected)
    trainer.model.save_pretrained(tmp_path / "again")
    assert_same(
        answers(PeftModel.from_pretrained(pretrained(base, kind), tmp_path / "again")), expected
    )


def test_checkpoint_of_a_folded_base_loads_whole(base: Path, tmp_path: Path) -> None:
    _, expected = trained(base, tmp_path, "dense")
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    with pytest.warns(UserWarning, match="ScaLoRA's changed base weights come with this adapter"):
        loaded = PeftModel.from_pretrained(pretrained(base), checkpoint)
    assert torch.equal(answers(loaded), expected)
    scalora.load_rebased_weights(loaded, checkpoint)
    assert torch.equal(answers(loaded), expected)


def test_checkpoint_without_its_carry_says_so_and_is_completed(base: Path, tmp_path: Path) -> None:
    _, expected = trained(base, tmp_path, "carry")
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    with pytest.warns(UserWarning, match="carry is missing here: call scalora.load_rebased_weigh"):
        loaded = PeftModel.from_pretrained(pretrained(base), checkpoint)
    assert (answers(loaded) - expected).abs().max() > 1e-3  # what the warning says is so
    scalora.load_rebased_weights(loaded, checkpoint)
    assert_same(answers(loaded), expected)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("kind", ["dense", "carry"])
def test_variants_of_lora_are_saved_whole(
    kind: str, lora: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(adapted(base, **lora), tmp_path, callback_of(kind))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(pretrained(base), tmp_path / "final")
    assert_same(answers(loaded), answers(trainer.model))


@pytest.mark.parametrize("kind", ["dense", "carry"])
def test_adapter_of_another_name_is_saved_whole(kind: str, base: Path, tmp_path: Path) -> None:
    callback = callback_of(kind, adapter_name="mine")
    trainer = trainer_of(adapted(base, name="mine"), tmp_path, callback)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(pretrained(base), tmp_path / "final" / "mine")
    assert_same(answers(loaded), answers(trainer.model))


@pytest.mark.parametrize("kind", ["dense", "carry"])
def test_best_model_is_the_one_that_is_saved_at_the_end(
    kind: str, base: Path, tmp_path: Path
) -> None:
    trainer, expected = trained(
        base,
        tmp_path,
        kind,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # of a loss: so that the best is not the last
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    loaded = PeftModel.from_pretrained(pretrained(base), tmp_path / "final")
    assert_same(answers(loaded), expected)


@pytest.mark.parametrize("kind", ["dense", "carry"])
def test_checkpoint_that_cannot_be_resumed_is_whole(kind: str, base: Path, tmp_path: Path) -> None:
    _, expected = trained(base, tmp_path, kind, save_only_model=True)
    loaded = PeftModel.from_pretrained(pretrained(base), tmp_path / f"checkpoint-{STEPS}")
    assert_same(answers(loaded), expected)


@pytest.mark.parametrize(
    ("kind", "final", "checkpoint"),
    [
        ("dense", "holds those weights of the base model", "holds those weights of the base model"),
        ("carry", "This adapter is whole", "not whole: a carry belongs to this adapter"),
    ],
)
def test_model_card_says_what_is_there_once(
    kind: str, final: str, checkpoint: str, base: Path, tmp_path: Path
) -> None:
    trainer, _ = trained(base, tmp_path / "out", kind)
    cards = {name: tmp_path / "out" / name / CARD for name in ("final", f"checkpoint-{STEPS}")}
    assert final in cards["final"].read_text(encoding="utf-8")
    assert checkpoint in cards[f"checkpoint-{STEPS}"].read_text(encoding="utf-8")
    trainer.save_model()
    trainer.create_model_card(model_name="mine")  # as push_to_hub does, over what was there
    text = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert text.count("## ScaLoRA") == 1 and final in text and "mine" in text


def test_checkpoint_is_not_resumed_without_the_callback(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path, "carry")
    checkpoint = str(tmp_path / "checkpoint-3")
    forgotten = trainer_of(adapted(base), tmp_path, None)
    with pytest.raises(ValueError, match=r"callbacks=\[scalora\.ScaLoRACallback"):
        forgotten.train(resume_from_checkpoint=checkpoint)


def test_optimizer_file_is_read_where_scalora_is_imported_and_not_before(
    base: Path, tmp_path: Path
) -> None:
    """The callback is not needed: a loop reads the file before `load_training_state`."""
    trained(base, tmp_path, "carry")
    script = f"""
import torch
def load():  # as a Trainer does
    return torch.load({str(tmp_path / "checkpoint-3" / "optimizer.pt")!r}, weights_only=True)
try:
    load()
except Exception as error:
    print(error)
import scalora
scalora.ScaLoRA
print(load()["scalora"]["in_file"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "scalora.resuming.in_file.resumed_with_scalora_callback" in done.stdout
    assert done.stdout.strip().endswith("True")


def from_the_start(model: Any, folder: Path) -> Trainer:
    return trainer_of(model(), folder, callback_of("carry"))


def added_later(model: Any, folder: Path) -> Trainer:
    trainer = trainer_of(model(), folder, None)
    trainer.add_callback(callback_of("carry"))
    return trainer


def made_by_the_trainer(model: Any, folder: Path) -> Trainer:
    return trainer_of(model, folder, callback_of("carry"))


@pytest.mark.parametrize("make", [from_the_start, added_later, made_by_the_trainer])
def test_checkpoint_is_resumed_whichever_way_the_callback_came(
    make: Callable[[Any, Path], Trainer], base: Path, tmp_path: Path
) -> None:
    whole = make(lambda: adapted(base), tmp_path)
    whole.train()
    trainer = make(lambda: adapted(base), tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(answers(trainer.model), answers(whole.model))


def test_folded_base_is_in_a_checkpoint_once(base: Path, tmp_path: Path) -> None:
    trainer, _ = trained(base, tmp_path, "dense")
    folder = tmp_path / f"checkpoint-{STEPS}"
    weights = sum(
        weight.numel() * 4
        for name, weight in trainer.model.named_parameters()
        if name.endswith("base_layer.weight")
    )
    adapter = (folder / "adapter_model.safetensors").stat().st_size
    assert weights < adapter < 1.5 * weights
    state = folder / "scalora.safetensors"
    # 64 x 64 numbers per layer at most, which in layers as small as these is all of the weight.
    sketches = sum(t.nbytes for name, t in load_file(state).items() if name.startswith("frozen:"))
    assert state.stat().st_size - sketches < 0.5 * weights
