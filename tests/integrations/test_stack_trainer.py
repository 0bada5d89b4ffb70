"""The Trainer's script: by callback or optimizers=, early stopping, the best model at the end."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import scalora

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone")


@pytest.fixture
def script(stack):
    return stack("trainer")


def test_script_trains_rebases_and_merges_to_the_same_model(script, logits, tmp_path):
    run = script.main(40, str(tmp_path / "run"))
    assert run.losses[-1] < 0.8 * run.losses[0]
    assert run.optimizer.rebase_count == 4
    scalora.save_merged(run.model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(run.model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
def test_early_stopping_brings_the_best_base_back(script, tmp_path, accumulator):
    # "Best" is the highest loss: the first evaluation, three columns before the run stops.
    trainer = script.make_trainer(
        str(tmp_path),
        scalora.ScaLoRACallback(interval=4, accumulator=accumulator),
        max_steps=40,
        eval_steps=5,
        save_steps=5,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert max(evaluated) == 20, "stopped after three evaluations that were no better"
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[5], abs=1e-6)
    assert evaluated[20] < evaluated[5] - 0.1


def test_optimizer_passed_in_trains_to_the_same_losses(script, tiny, tmp_path):
    def losses(folder, **options):
        trainer = script.make_trainer(str(tmp_path / folder), max_steps=10, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        # The best adapter brings its base along, with the callback or without.
        assert not [w for w in caught if "load_adapter replaces" in str(w.message)]
        assert trainer.optimizer.optimizer.rebase_count > 0
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    by_callback = losses("callback", callback=scalora.ScaLoRACallback(interval=4))
    model = tiny.lora_model()
    optimizer = scalora.create_scalora_optimizer(
        model, torch.optim.AdamW, lr=1e-2, weight_decay=0.0, fused=True, interval=4
    )
    passed = losses("passed", callback=None, model=model, optimizers=(optimizer, None))
    assert passed == by_callback
