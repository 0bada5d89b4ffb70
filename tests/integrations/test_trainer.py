"""The Trainer callback: attach, checkpoint, resume, best model."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import scalora

STEPS = 12


class Examples(torch.utils.data.Dataset):
    def __init__(self, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, 50, (count, 10), generator=generator)
        self.labels = (self.ids.sum(1) % 2).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def make_model(intermediate_size: int = 40) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=intermediate_size,
        vocab_size=50,
        hidden_dropout_prob=0.1,
    )
    base = BertForSequenceClassification(config)
    return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear"))


def make_trainer(folder, *, model=None, callback=None, optimizers=(None, None), **arguments):
    defaults = dict(
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        warmup_steps=2,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return Trainer(
        model if model is not None else make_model(),
        args,
        train_dataset=Examples(),
        eval_dataset=Examples(16),
        callbacks=[callback if callback is not None else scalora.ScaLoRACallback(rule="exact")],
        optimizers=optimizers,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name
    }


pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone")


def test_callback_rebases_under_the_optimizer_that_the_trainer_made(tmp_path):
    callback = scalora.ScaLoRACallback(rule="exact", interval=2)
    trainer = make_trainer(tmp_path, callback=callback)
    before = base_weights(trainer.model)
    trainer.train()
    assert callback.optimizer is not None
    assert callback.optimizer.rebase_count == STEPS // 2
    after = base_weights(trainer.model)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_callback_gives_the_same_losses_as_the_optimizer_passed_in(tmp_path):
    by_callback = make_trainer(tmp_path / "callback")
    by_callback.train()
    model = make_model()
    optimizer = scalora.create_scalora_optimizer(
        model, torch.optim.AdamW, lr=1e-2, weight_decay=0, fused=True, rule="exact"
    )
    passed = make_trainer(tmp_path / "passed", model=model, optimizers=(optimizer, None))
    passed.train()
    assert losses(by_callback) == losses(passed)


@pytest.mark.parametrize("passed_in", [False, True])
def test_resumed_run_continues_to_the_same_numbers(tmp_path, passed_in):
    def trainer():
        model = make_model()
        optimizer = None
        if passed_in:
            optimizer = scalora.create_scalora_optimizer(
                model, torch.optim.AdamW, lr=1e-2, rule="exact"
            )
        return make_trainer(tmp_path, model=model, optimizers=(optimizer, None))

    whole = trainer()
    whole.train()
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed)[4:] == losses(whole)[4:]
    for name, weight in base_weights(whole.model).items():
        assert torch.equal(weight, base_weights(resumed.model)[name])


def test_checkpoint_in_another_folder_is_found_when_named(tmp_path):
    whole = make_trainer(tmp_path / "first")
    whole.train()
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "first" / "checkpoint-8", moved)
    lost = make_trainer(tmp_path / "second")
    with pytest.raises(ValueError, match="resume_from"):
        lost.train(resume_from_checkpoint=str(moved))
    found = make_trainer(
        tmp_path / "third", callback=scalora.ScaLoRACallback(rule="exact", resume_from=str(moved))
    )
    found.train(resume_from_checkpoint=str(moved))
    assert losses(found)[8:] == losses(whole)[8:]


def test_checkpoint_without_the_base_weights_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    (tmp_path / "checkpoint-8" / "scalora.safetensors").unlink()
    with pytest.raises(ValueError, match="incomplete"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_checkpoint_without_the_state_of_calibration_is_refused(tmp_path):
    # Nothing has been re-based by step 8, but the length of a step has been calibrated.
    make_trainer(tmp_path, callback=scalora.ScaLoRACallback()).train()
    (tmp_path / "checkpoint-8" / "scalora.safetensors").unlink()
    with pytest.raises(ValueError, match="incomplete"):
        make_trainer(tmp_path, callback=scalora.ScaLoRACallback()).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-8")
        )


def test_older_checkpoint_is_deleted_only_once_the_newer_one_is_whole(tmp_path, monkeypatch):
    def disk_full(*arguments, **options):
        raise OSError("disk full")

    trainer = make_trainer(tmp_path, save_total_limit=1)
    whole = {"adapter_model.safetensors", "optimizer.pt", "scalora.safetensors"}
    whole |= {"trainer_state.json", "scheduler.pt", "rng_state.pth"}
    save_file = scalora.files.save_file
    monkeypatch.setattr(
        "scalora.files.save_file",
        lambda *arguments, **options: (
            disk_full() if trainer.state.global_step == 8 else save_file(*arguments, **options)
        ),
    )
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert whole <= {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    with pytest.raises(FileNotFoundError, match=r"checkpoint-8/trainer_state\.json"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_checkpoint_that_is_written_over_is_not_whole_in_between(tmp_path, monkeypatch):
    make_trainer(tmp_path).train()
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    assert state.exists()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(PeftModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, learning_rate=2e-2).train()
    assert not state.exists()


@pytest.mark.parametrize("resumed_by", ["nothing", "the file"])
def test_what_the_file_holds_is_not_written_twice_and_is_missed(tmp_path, resumed_by):
    def model_and_optimizer():
        model = make_model()
        return model, scalora.create_scalora_optimizer(
            model, torch.optim.AdamW, lr=1e-2, rule="exact", accumulator="carry"
        )

    model, optimizer = model_and_optimizer()
    whole = make_trainer(tmp_path, model=model, optimizers=(optimizer, None))
    whole.train()
    folder = tmp_path / "checkpoint-8"
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    assert "layers" not in state["scalora"]
    assert "layers" in optimizer.state_dict()["scalora"]  # only while it was written

    model, optimizer = model_and_optimizer()
    adapter = load_file(folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, adapter)
    optimizer.load_state_dict(state)
    if resumed_by == "the file":
        scalora.load_training_state(optimizer, folder)
        optimizer.step()
        return
    with pytest.raises(ValueError, match=r"scalora\.safetensors.*load_training_state"):
        optimizer.step()


def test_copied_model_completes_no_checkpoint_of_the_original(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    twin = copy.deepcopy(trainer.model)
    twin.save_pretrained(tmp_path / "twin" / "checkpoint-1")
    assert not (tmp_path / "twin" / "checkpoint-1" / "scalora.safetensors").exists()


def test_training_that_is_over_leaves_its_checkpoints_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoint-8"
    before = (folder / "trainer_state.json").read_bytes()
    trainer.model.save_pretrained(folder)
    assert (folder / "trainer_state.json").read_bytes() == before
    assert "layers" in trainer.optimizer.state_dict()["scalora"]


def without_callback(folder, accumulator):
    model = make_model()
    optimizer = scalora.create_scalora_optimizer(
        model, torch.optim.AdamW, lr=1e-2, rule="exact", accumulator=accumulator
    )
    trainer = make_trainer(folder, model=model, optimizers=(optimizer, None))
    trainer.remove_callback(scalora.ScaLoRACallback)
    return trainer


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
def test_optimizer_passed_in_is_resumed_without_the_callback(tmp_path, accumulator):
    whole = without_callback(tmp_path, accumulator)
    whole.train()
    resumed = without_callback(tmp_path, accumulator)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert losses(resumed)[8:] == losses(whole)[8:]


def test_optimizer_passed_in_without_the_callback_refuses_to_resume_on_the_wrong_base(tmp_path):
    without_callback(tmp_path, "dense").train()
    file = tmp_path / "checkpoint-8" / "adapter_model.safetensors"
    factors = {k: v for k, v in load_file(file).items() if "base_layer" not in k}
    save_file(factors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="base weight"):
        without_callback(tmp_path, "dense").train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-8")
        )


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
@pytest.mark.parametrize("options", [{"rule": "exact"}, {"interval": 2, "calibration": 5}])
def test_best_model_at_the_end_has_the_base_that_belongs_to_it(tmp_path, options, accumulator):
    trainer = make_trainer(
        tmp_path,
        callback=scalora.ScaLoRACallback(**options, accumulator=accumulator),
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # of a loss: so that the best is not the last
        learning_rate=3e-2,
    )
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = max(evaluated, key=evaluated.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert best < STEPS, "the test needs a best model that is not the last"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], abs=1e-7)


def test_wrong_options_are_refused_before_training():
    with pytest.raises(ValueError, match="rule"):
        scalora.ScaLoRACallback(rule="best")


def test_plain_checkpoint_can_be_continued_with_scalora(tmp_path):
    plain = make_trainer(tmp_path)
    plain.remove_callback(scalora.ScaLoRACallback)
    plain.train()
    callback = scalora.ScaLoRACallback(rule="exact")
    continued = make_trainer(tmp_path, callback=callback)
    continued.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert callback.optimizer is not None
    assert callback.optimizer.rebase_count == STEPS - 8


def test_trained_model_saves_merged_and_answers_the_same(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    model = trainer.model.eval()
    scalora.save_merged(model, tmp_path / "merged")
    reloaded = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = Examples().ids
    torch.testing.assert_close(reloaded(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    twin = copy.deepcopy(model)
    assert twin.save_pretrained.model is twin


@pytest.mark.parametrize("options", [{"rule": "exact", "interval": 6}, {"interval": 6}])
def test_best_model_from_before_the_first_rebasing_has_its_base_again(tmp_path, options):
    callback = scalora.ScaLoRACallback(**options)
    trainer = make_trainer(
        tmp_path,
        callback=callback,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        learning_rate=3e-2,
    )
    start = base_weights(trainer.model)
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = max(evaluated, key=evaluated.get)
    assert best == 4, "the test needs a best model from before step 6"
    assert any(pair.was_rebased for pair in callback.optimizer.rebased_pairs)
    for name, weight in base_weights(trainer.model).items():
        assert torch.equal(weight, start[name])


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit", "ademamix_8bit"])
def test_trainers_own_8_bit_optimizers_are_rebased_and_resumed(tmp_path, optim):
    pytest.importorskip("bitsandbytes")

    def trainer():
        # Wide enough for states of 8 bits beside those of 32: 4096 elements.
        return make_trainer(tmp_path, model=make_model(intermediate_size=1024), optim=optim)

    whole = trainer()
    whole.train()
    inner = whole.optimizer.optimizer.inner
    assert type(inner).__module__.startswith("bitsandbytes.")
    kinds = {state["state1"].dtype for state in inner.state.values()}
    assert kinds == {torch.float32, torch.uint8}
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.optimizer.optimizer.rebase_count == STEPS
    assert losses(resumed)[4:] == losses(whole)[4:]
    for name, weight in base_weights(whole.model).items():
        assert torch.equal(weight, base_weights(resumed.model)[name])
