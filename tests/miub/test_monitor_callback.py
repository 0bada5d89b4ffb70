"""MIUBCallback in a real Trainer."""

from __future__ import annotations

import pytest
import torch
from models import bert, with_lora
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import scalora
from miub import MIUBCallback


class Examples(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(1, 23, (64, 10), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = self.ids[i]
        return {"input_ids": ids, "attention_mask": ids > 3, "labels": ids.sum() % 3}


class Listener(TrainerCallback):
    """Stands where an integration such as TensorBoard's stands: before the user's callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def make_trainer(folder, callbacks, ranks=None, **arguments):
    torch.manual_seed(0)
    config = dict(target_modules=["query", "dense"], task_type="SEQ_CLS", rank_pattern=ranks or {})
    model = with_lora(bert(), **config)
    defaults = dict(
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    examples = Examples()
    return Trainer(model, args, train_dataset=examples, eval_dataset=examples, callbacks=callbacks)


@pytest.mark.filterwarnings("ignore:.*16 are needed")
def test_the_trainers_own_logs_carry_the_values_also_to_callbacks_that_come_first(tmp_path):
    callback, listener = MIUBCallback(every=4, tokens=32), Listener()
    trainer = make_trainer(tmp_path, [listener, callback])
    trainer.train()
    logged = [logs for logs in listener.logs if "miub/mean/3_coordinates" in logs]
    report = callback.report()
    assert [row.step for row in next(iter(report.history.values()))] == [4, 8]
    assert len(logged) == 2
    last = trainer.state.log_history[-2]  # the last one is of the whole run
    assert logged[-1]["miub/mean/3_coordinates"] == last["miub/mean"] == report.mean
    assert last["miub/mean_per_coordinate"] == report.mean_per_coordinate
    for entry in (logged[-1], last):
        assert entry["miub/coordinates"] == 3
        assert entry["miub/layers_with_folded_base"] == 0
    for row in report:
        assert last[f"miub/{row.layer}"] == row.value > 0
        assert logged[-1][f"miub/{row.layer}/3_coordinates"] == row.value
    history = [entry for entry in trainer.state.log_history if "miub/mean" in entry]
    assert [entry["step"] for entry in history] == [4, 8]
    assert "loss" in history[0]


@pytest.mark.filterwarnings("ignore:.*16 are needed")
def test_values_at_different_numbers_of_coordinates_are_never_one_curve(tmp_path):
    curves = []
    for ranks in ({}, {"query": 5}, {"query": 5, "dense": 7}):
        callback, listener = MIUBCallback(every=2, tokens=32), Listener()
        make_trainer(tmp_path, [listener, callback], ranks, max_steps=2).train()
        [logs] = [logs for logs in listener.logs if "miub/coordinates" in logs]
        names = {name for name in logs if name.startswith("miub/")}
        curves.append(names - {"miub/coordinates", "miub/layers_with_folded_base"})
        report = callback.report()
        for number, total in report.by_coordinates().items():
            alike = [row.value for row in report if row.coordinates == number]
            assert logs[f"miub/mean/{number}_coordinates"] == total.mean
            assert total.mean == pytest.approx(sum(alike) / len(alike))
    three, three_or_five, five_or_seven = curves
    assert not three & five_or_seven
    query = "miub/bert.encoder.layer.0.attention.self.query"
    assert f"{query}/3_coordinates" in three - three_or_five
    assert f"{query}/5_coordinates" in three_or_five & five_or_seven


@pytest.mark.filterwarnings("ignore:.*16 are needed")
def test_evaluation_is_not_measured_and_no_hook_stays(tmp_path):
    callback = MIUBCallback(every=3, tokens=32, per_layer=False)
    trainer = make_trainer(tmp_path, [callback], eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert [row.step for row in next(iter(callback.report().history.values()))] == [3, 6]
    logged = [set(logs) for logs in trainer.state.log_history if "miub/mean" in logs]
    whole = ("mean", "mean_per_coordinate", "coordinates", "layers_with_folded_base")
    assert logged
    assert all(
        {k for k in keys if "miub" in k} == {f"miub/{name}" for name in whole} for keys in logged
    )
    modules = trainer.model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@pytest.mark.filterwarnings("ignore:.*16 are needed")
def test_training_is_the_same_with_it(tmp_path):
    plain, watched = (
        make_trainer(tmp_path / name, callbacks)
        for name, callbacks in (("plain", []), ("watched", [MIUBCallback(every=2, tokens=32)]))
    )
    losses = []
    for trainer in (plain, watched):
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:.*16 are needed")
def test_it_works_beside_the_scalora_callback_and_says_where_the_base_was_folded(tmp_path):
    callback = MIUBCallback(every=4, tokens=32)
    trainer = make_trainer(tmp_path, [scalora.ScaLoRACallback(rule="exact"), callback])
    with pytest.warns(UserWarning, match="with a folded base: .*reference=") as caught:
        trainer.train()
    assert sum("folded base" in str(warning.message) for warning in caught) == 1
    report = callback.report()
    assert all(row.rebased for row in report)
    logged = [entry for entry in trainer.state.log_history if "miub/mean" in entry]
    assert {entry["miub/layers_with_folded_base"] for entry in logged} == {len(report)}


def test_gradient_accumulation_measures_one_pass_of_a_step(tmp_path):
    callback = MIUBCallback(every=2, tokens=32)
    with pytest.warns(UserWarning, match="16 are needed"):
        make_trainer(tmp_path, [callback], gradient_accumulation_steps=2, max_steps=4).train()
    report = callback.report()
    assert [(row.step, row.tokens) for row in next(iter(report.history.values()))] == [
        (2, 32),
        (4, 32),
    ]


def test_before_training_there_is_no_report():
    with pytest.raises(ValueError, match="training has not begun"):
        MIUBCallback().report()
    with pytest.raises(ValueError, match="every must be"):
        MIUBCallback(every=0)


def test_a_run_whose_passes_all_have_too_few_tokens_goes_on_without_values(tmp_path):
    callback, listener = MIUBCallback(every=1), Listener()
    trainer = make_trainer(tmp_path, [listener, callback], per_device_train_batch_size=1)
    with pytest.warns(UserWarning, match="16 are needed"):
        trainer.train()
    assert trainer.state.global_step == 8
    assert not [name for logs in listener.logs for name in logs if name.startswith("miub")]
