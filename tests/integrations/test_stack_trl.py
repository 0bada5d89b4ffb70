"""TRL's trainers: SFTTrainer, and DPOTrainer with the switched-off adapter as its reference."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

import scalora
from scalora.integrations.reference_model import refers_to_base

trl = pytest.importorskip("trl", reason="TRL is not installed")

STEPS = 30  # re-based at steps 10, 20 and 30

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone")


@pytest.fixture
def dpo(stack):
    return stack("trl_dpo")


def test_sft_trains_rebases_and_merges_to_the_same_model(stack, logits, tmp_path):
    run = stack("trl_sft").main(STEPS, str(tmp_path / "run"))
    assert run.losses[-1] < 0.8 * run.losses[0]
    assert run.optimizer.rebase_count == 3
    scalora.save_merged(run.model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(run.model), atol=1e-4, rtol=0)


def reference_log_probabilities(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    return torch.stack(trainer.compute_ref_log_probs(trainer.model, batch))


@pytest.mark.parametrize("options", [{}, {"rule": "exact"}], ids=["auto", "exact"])
def test_reference_of_dpo_stays_the_model_before_training(tmp_path, dpo, tiny, options):
    callback = scalora.ScaLoRACallback(**{"interval": 5, **options})
    trainer = dpo.make_trainer(str(tmp_path), callback, max_steps=8)
    before = reference_log_probabilities(trainer)
    trainer.train()
    assert callback.optimizer.rebase_count > 0
    assert {row.accumulator for row in callback.optimizer.report()} == {"carry"}
    assert any(row.columns for row in callback.optimizer.report())
    assert torch.equal(reference_log_probabilities(trainer), before)


def test_dpo_script_learns_the_preference(tmp_path, dpo):
    run = dpo.main(STEPS, str(tmp_path))
    assert run.losses[-1] < 0.8 * run.losses[0]
    assert run.optimizer.rebase_count == 3


def test_dpo_with_increments_into_its_reference_is_refused(tmp_path, dpo):
    callback = scalora.ScaLoRACallback(accumulator="dense")
    trainer = dpo.make_trainer(str(tmp_path), callback, max_steps=1)
    with pytest.raises(ValueError, match=r"reference model.*accumulator='carry'"):
        trainer.train()


def test_optimizer_passed_to_dpo_is_refused_if_it_folds_into_the_base(tmp_path, dpo):
    trainer = dpo.make_trainer(str(tmp_path), scalora.ScaLoRACallback(), max_steps=1)
    trainer.optimizer = scalora.create_scalora_optimizer(trainer.model, torch.optim.AdamW, lr=1e-3)
    with pytest.raises(ValueError, match=r"reference model.*accumulator='carry'"):
        trainer.train()


def test_reference_computed_before_training_leaves_the_choice(tmp_path, dpo):
    callback = scalora.ScaLoRACallback(interval=2)
    trainer = dpo.make_trainer(str(tmp_path), callback, max_steps=3, precompute_ref_log_probs=True)
    trainer.train()
    assert {row.accumulator for row in callback.optimizer.report()} == {"dense"}


def test_trainers_with_a_reference_are_told_by_their_arguments(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert refers_to_base(trl.KTOConfig(**options))
    assert refers_to_base(trl.GRPOConfig(beta=0.1, **options))
    assert refers_to_base(trl.RLOOConfig(beta=0.1, **options))
    assert not refers_to_base(trl.GRPOConfig(beta=0.0, **options))
    assert not refers_to_base(trl.SFTConfig(**options))
    assert not refers_to_base(TrainingArguments(**options))
