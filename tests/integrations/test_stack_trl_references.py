"""TRL's trainers whose reference is the model before training: trained, it stays what it was."""

from __future__ import annotations

import pytest
import torch

import scalora
from scalora.integrations.reference_model import refers_to_base

pytest.importorskip("trl", reason="TRL is not installed")

import trl
from datasets import Dataset
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig
from trl.trainer.utils import use_adapter

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone")


def prompts(tiny):
    return Dataset.from_list(
        [{"prompt": line[:10], "privileged_context": line[10:]} for line in tiny.TEXT]
    )


def judged(tiny):
    """The text forwards is desirable, the text backwards is not."""
    halves = [(line[:20], line[20:]) for line in tiny.TEXT]
    return Dataset.from_list(
        [
            {"prompt": a, "completion": b if good else b[::-1], "label": good}
            for a, b in halves
            for good in (True, False)
        ]
    )


def variety(completions, **_):
    return [float(len(set(str(completion)))) for completion in completions]


GENERATED = {"num_generations": 4, "max_completion_length": 8}
TRAINERS = {
    "KTO": (trl.KTOTrainer, trl.KTOConfig, {}),
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, {"beta": 0.1, **GENERATED}),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, {"beta": 0.1, **GENERATED}),
    "online DPO": (OnlineDPOTrainer, OnlineDPOConfig, {"max_new_tokens": 8}),
    "SDFT": (SDFTTrainer, SDFTConfig, {"teacher_model_kind": "base", **GENERATED}),
}
ARGUMENTS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def make_trainer(kind, model, output, tiny, callback, steps):
    """A trainer that puts an adapter on the model, if there is none."""
    trainer, config, options = TRAINERS[kind]
    rewarded = {"reward_funcs": variety} if kind in ("GRPO", "RLOO", "online DPO") else {}
    return trainer(
        model,
        args=config(output_dir=str(output), max_steps=steps, **ARGUMENTS, **options),
        train_dataset=judged(tiny) if kind == "KTO" else prompts(tiny),
        processing_class=tiny.tokenizer(),
        peft_config=None if hasattr(model, "peft_config") else tiny.LORA,
        callbacks=[callback],
        **rewarded,
    )


@torch.no_grad()
def reference_logits(model, tiny):
    """As TRL computes them: the adapter switched off, or a copy of it from before training."""
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        return model.eval()(input_ids=tiny.examples()[:4]).logits


@pytest.mark.parametrize("kind", TRAINERS)
def test_reference_stays_the_model_before_training(kind, tiny, tmp_path):
    callback = scalora.ScaLoRACallback(interval=4)
    trainer = make_trainer(kind, tiny.base_model(), tmp_path, tiny, callback, steps=8)
    before = reference_logits(trainer.model, tiny)
    trainer.train()
    rows = list(callback.optimizer.report())
    assert {row.accumulator for row in rows} == {"carry"}
    assert all(row.columns == 8 for row in rows)  # two increments of rank 4
    assert torch.equal(reference_logits(trainer.model, tiny), before)
    with torch.no_grad():
        after = trainer.model.eval()(input_ids=tiny.examples()[:4]).logits
    assert not torch.equal(after, before)


@pytest.mark.parametrize("kind", ["KTO", "GRPO"])
def test_reference_is_an_adapter_that_was_there_before(kind, tiny, tmp_path):
    callback = scalora.ScaLoRACallback(interval=4)
    trainer = make_trainer(kind, tiny.lora_model(), tmp_path, tiny, callback, steps=8)
    assert set(trainer.model.peft_config) == {"default", "ref"}
    before = reference_logits(trainer.model, tiny)
    trainer.train()
    assert {row.columns for row in callback.optimizer.report()} == {8}
    assert torch.equal(reference_logits(trainer.model, tiny), before)


@pytest.mark.parametrize("kind", TRAINERS)
def test_increments_into_the_reference_are_refused(kind, tiny, tmp_path):
    callback = scalora.ScaLoRACallback(accumulator="dense")
    trainer = make_trainer(kind, tiny.base_model(), tmp_path, tiny, callback, steps=1)
    with pytest.raises(ValueError, match=r"reference model.*accumulator='carry'"):
        trainer.train()


@pytest.mark.parametrize("existing", [False, True], ids=["switched off", "a copy of the adapter"])
def test_without_the_callback_a_reference_that_would_change_is_refused(
    existing, stack, tiny, tmp_path
):
    dpo = stack("trl_dpo")
    model = tiny.lora_model() if existing else tiny.base_model()
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=str(tmp_path), max_steps=4, **ARGUMENTS),
        train_dataset=dpo.preferences(),
        processing_class=tiny.tokenizer(),
        peft_config=None if existing else tiny.LORA,
    )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(trained, lr=1e-3)
    trainer.optimizer = scalora.ScaLoRA(inner, trainer.model, interval=2)
    before = reference_logits(trainer.model, tiny)
    with pytest.raises(ValueError, match=r"(?s)reference model of DPO.*accumulator='carry'"):
        trainer.train()
    assert torch.equal(reference_logits(trainer.model.eval(), tiny), before)


def test_teacher_that_averages_parameters_is_refused(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert refers_to_base(SDPOConfig(teacher_model_kind="base", **options))
    assert not refers_to_base(SDPOConfig(teacher_model_kind="live", **options))
    for config in (SDPOConfig(**options), SDFTConfig(teacher_model_kind="ema", **options)):
        with pytest.raises(ValueError, match="use teacher_model_kind='base' or 'live'"):
            refers_to_base(config)
