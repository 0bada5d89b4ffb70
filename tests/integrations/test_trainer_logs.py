"""What a run with `ScaLoRACallback` says: lines, and numbers in the Trainer's logs."""

from __future__ import annotations

import json
import warnings
from typing import Any

import models
import pytest
import torch
from test_trainer import make_trainer
from transformers import TrainerCallback

import scalora
from scalora.integrations.trainer_logs import opening

NUMBERS = {"scalora/rank", "scalora/rebased", "scalora/step_factor", "scalora/frozen_norm"}


class Logger(TrainerCallback):
    """Notes what a logger of the Trainer's own would be given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_numbers_reach_the_loggers_that_come_before_the_callback(tmp_path):
    callback = scalora.ScaLoRACallback(interval=3)
    trainer = make_trainer(tmp_path, callback=callback, logging_steps=4)
    logger = Logger()
    trainer.callback_handler.callbacks.insert(0, logger)
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    training = [logs for logs in logger.logs if "loss" in logs]
    assert len(training) == 3 and all(logs.keys() >= NUMBERS for logs in training)
    assert [logs["scalora/rebased"] for logs in training] == [1, 2, 4]
    assert training[-1]["scalora/frozen_norm"] > training[0]["scalora/frozen_norm"] > 0
    assert all(0 < logs["scalora/rank"] < 32 for logs in training)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["scalora/rank"] for entry in history] == [
        logs["scalora/rank"] for logs in training
    ]
    assert json.loads(json.dumps(history, allow_nan=False)) == history
    assert trainer.callback_handler.callbacks == before


@pytest.mark.parametrize("arguments", [{"logging_strategy": "no"}, {"logging_steps": 100}])
def test_nothing_is_computed_where_the_trainer_does_not_log(tmp_path, monkeypatch, arguments):
    def fail(optimizer: scalora.ScaLoRA) -> dict[str, float]:
        raise AssertionError("a step that is not logged waits for the device")

    monkeypatch.setattr(scalora.ScaLoRA, "progress", fail)
    trainer = make_trainer(tmp_path, max_steps=4, **arguments)
    trainer.train()
    assert trainer.state.global_step == 4


def test_evaluation_is_logged_without_them(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations and not any(NUMBERS & entry.keys() for entry in evaluations)


def test_run_says_what_it_will_do_and_how_to_save(tmp_path, capsys):
    callback = scalora.ScaLoRACallback(interval=5)
    make_trainer(tmp_path, callback=callback).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ScaLoRA: ")]
    assert len(said) == 2
    assert said[0] == (
        "ScaLoRA: 13 LoRA layers are re-based (13 dense), rule 'leak' ('auto'), memory 100 steps, "
        "once in 5 steps: next in step 5, 2 in all until step 12."
    )
    assert callback.optimizer.rebase_count == 2
    assert "re-based 2 times" in said[1] and "trainer.save_model(folder) writes all" in said[1]
    assert "scalora.save_merged" in said[1] and "scalora.save_adapter" in said[1]


def test_run_of_60_steps_re_bases_by_default_and_says_so(tmp_path, capsys):
    callback = scalora.ScaLoRACallback()
    make_trainer(tmp_path, callback=callback, max_steps=60).train()
    assert "once in 10 steps: next in step 10, 6 in all until step 60." in capsys.readouterr().out
    assert callback.optimizer.rebase_count == 6


@pytest.mark.parametrize(
    ("dtype", "options", "drifts"),
    [
        (torch.bfloat16, {}, True),
        (torch.float16, {"interval": 100}, True),
        (torch.bfloat16, {"rounding": "compensated"}, False),
        (torch.bfloat16, {"rounding": "nearest"}, False),
        (torch.bfloat16, {"accumulator": "carry"}, False),
        (torch.float32, {}, False),
    ],
)
def test_long_run_that_may_choose_its_rounding_says_that_it_drifts(dtype, options, drifts):
    model = models.with_lora(models.Perceptron().to(dtype), target_modules=["first"])
    inner = torch.optim.AdamW(models.trainable(model))
    optimizer = scalora.ScaLoRA(inner, model, **options)

    def says(last, *, is_sharded=False):
        return "rounding='compensated'" in opening(optimizer, 0, last, is_sharded)

    assert says(1000) is drifts
    assert not says(999) and not says(1000, is_sharded=True)
    models.train(model, optimizer, models.vectors(4, 12).to(dtype), optimizer.next_rebasing)
    assert optimizer.rebase_count == 1 and not says(2000)


def test_resumed_run_says_when_the_next_re_basing_is_due(tmp_path, capsys):
    def trainer():
        return make_trainer(tmp_path, callback=scalora.ScaLoRACallback(interval=5))

    trainer().train()
    capsys.readouterr()
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "next in step 10, 1 in all until step 12." in capsys.readouterr().out


def test_run_that_is_too_short_to_re_base_is_warned_of(tmp_path, capsys):
    callback = scalora.ScaLoRACallback()
    with pytest.warns(UserWarning, match=r"4 steps ends before.*due in step 10.*plain LoRA"):
        make_trainer(tmp_path, callback=callback, max_steps=4).train()
    assert "nothing was re-based" in capsys.readouterr().out


def test_run_without_a_rule_is_plain_lora_and_says_so(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ends before the first re-basing")
        make_trainer(tmp_path, callback=scalora.ScaLoRACallback(rule="none"), max_steps=2).train()
    assert "this is plain LoRA" in capsys.readouterr().out


def test_log_level_silences_the_lines(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=2, log_level="error").train()
    assert "ScaLoRA: " not in capsys.readouterr().out


class Interrupts(TrainerCallback):
    """Interrupts the first run, as a user of a notebook does."""

    def __init__(self) -> None:
        self.done = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.done:
            self.done = True
            raise KeyboardInterrupt


def test_run_after_an_interrupted_one_logs_once_and_leaves_nothing_behind(tmp_path):
    trainer = make_trainer(tmp_path, callback=scalora.ScaLoRACallback(interval=1), max_steps=3)
    before = [*trainer.callback_handler.callbacks, interrupts := Interrupts()]
    trainer.add_callback(interrupts)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert trainer.state.log_history[0].keys() >= NUMBERS
    assert trainer.callback_handler.callbacks == before
