"""Training on bitsandbytes' 4- and 8-bit bases: nothing is lost, and the base is not touched."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import internals
import models
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import scalora
from miub import MIUBMonitor
from scalora.peft_layers import LoRAPair, lora_pairs

pytest.importorskip("bitsandbytes")

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4, double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    base = models.llama(vocab_size=64, num_hidden_layers=2, num_attention_heads=4)
    base.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MatMul8bitLt|.*use_reentrant")
        yield


def quantized(folder: Path, name: str, *, dtype: Any = torch.float32, **config: Any) -> Any:
    base = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**FORMATS[name]), dtype=dtype
    )
    base = prepare_model_for_kbit_training(base)
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))


def text(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 64, (count, 4, 16), generator=generator))


loss = models.language_loss
train = functools.partial(models.train_on, loss=loss)


def scalora_of(model: Any, cls: Any = torch.optim.AdamW, **options: Any) -> scalora.ScaLoRA:
    return scalora.create_scalora_optimizer(model, cls, **{"lr": 3e-3, "rule": "exact", **options})


def pairs(model: Any) -> list[LoRAPair]:
    return lora_pairs(model, "default")


def base_bytes(model: Any) -> dict[str, bytes]:
    """Of every tensor of the base, codes, scales and scales of scales."""
    state = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
    found = {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in state.items()}
    for name, module in model.named_modules():
        if hasattr(module, "state") and getattr(module.state, "SCB", None) is not None:
            found[f"{name}.scales"] = module.state.SCB.numpy().tobytes()
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_base_is_the_same_to_the_byte_and_the_change_is_beside_it(folder: Path, name: str) -> None:
    model = quantized(folder, name)
    loss(model, text(1)[0])  # the first pass of an 8-bit layer moves its scales
    before = base_bytes(model)
    assert len(before) > 14
    optimizer = scalora_of(model, carry_rank=16)
    losses = train(model, optimizer, text(1) * 20)
    assert losses[-1] < losses[0] - 0.1
    assert base_bytes(model) == before
    assert {row.accumulator for row in optimizer.report()} == {"carry"}
    assert len(optimizer.report()) == 14
    assert optimizer.rebase_count == 20
    for sigma in scalora.delta_spectrum(model).values():
        assert (sigma > 1e-4 * sigma[0]).sum() > 4


@pytest.mark.parametrize("name", FORMATS)
def test_effective_weight_is_the_same_before_and_after_a_re_basing(folder: Path, name: str) -> None:
    model = quantized(folder, name)
    optimizer = scalora_of(model, carry_rank=10_000)
    for ids in text(14):
        optimizer.zero_grad()
        loss(model, ids).backward()
        weights = {pair.name: pair.effective_weight() for pair in pairs(model)}
        codes = base_bytes(model)
        columns = [0 if pair.carry is None else pair.carry.columns for pair in pairs(model)]
        internals.rebase(optimizer)
        for pair in pairs(model):
            after = pair.effective_weight()
            assert after.dtype == torch.float32
            error = (after - weights[pair.name]).norm() / after.norm()
            assert error < 1e-6
        assert base_bytes(model) == codes
        optimizer.inner.step()
    assert [pair.carry.columns for pair in pairs(model)] != columns


@pytest.mark.parametrize("name", ["nf4, double", "int8"])
def test_resumed_run_continues_to_the_same_losses(folder: Path, name: str, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    batches = text(10)
    # Large enough that the factors' states are 8 bit.
    config = {"r": 64, "target_modules": ["q_proj", "down_proj"]}
    model = quantized(folder, name, **config)
    optimizer = scalora_of(model, bnb.optim.AdamW8bit, carry_rank=128)
    train(model, optimizer, batches[:5])
    states = [optimizer.state[p] for p in models.trainable(model)]
    assert all(state["state1"].dtype == torch.uint8 for state in states)
    adapter = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    torch.save({"optimizer": optimizer.state_dict(), "adapter": adapter}, tmp_path / "state.pt")
    expected = train(model, optimizer, batches[5:])

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = quantized(folder, name, **config)
    resumed.load_state_dict(saved["adapter"], strict=False)
    other = scalora_of(resumed, bnb.optim.AdamW8bit, carry_rank=128)
    other.load_state_dict(saved["optimizer"])
    assert train(resumed, other, batches[5:]) == expected


def test_trainer_resumes_on_a_quantized_base_to_the_same_weights(
    folder: Path, tmp_path: Path
) -> None:
    data = [{"input_ids": ids[0], "labels": ids[0]} for ids in text(32)]

    def trained(output: Path, steps: int, resume: str | None = None) -> Any:
        model = quantized(folder, "nf4")
        arguments = TrainingArguments(
            str(output),
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=4,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            optim="adamw_8bit",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callback = scalora.ScaLoRACallback(rule="exact", carry_rank=16)
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train(
            resume_from_checkpoint=resume
        )
        return model

    whole = trained(tmp_path / "whole", 8)
    trained(tmp_path / "halves", 4)
    resumed = trained(tmp_path / "halves", 8, str(tmp_path / "halves" / "checkpoint-4"))
    for one, other in zip(pairs(whole), pairs(resumed), strict=True):
        assert one.carry is not None and other.carry is not None
        assert torch.equal(one.carry.up, other.carry.up)
        assert torch.equal(one.carry.down, other.carry.down)
        assert torch.equal(one.P_parameter, other.P_parameter)


def test_trainer_that_resumes_without_the_carrys_file_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    data = [{"input_ids": ids[0], "labels": ids[0]} for ids in text(32)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def trainer() -> Trainer:
        callbacks = [scalora.ScaLoRACallback(rule="exact")]
        return Trainer(quantized(folder, "nf4"), arguments, train_dataset=data, callbacks=callbacks)

    trainer().train()
    (tmp_path / "checkpoint-4" / "scalora.safetensors").unlink()
    with pytest.raises(ValueError, match="incomplete"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_dora_on_a_quantized_base_keeps_its_function(folder: Path) -> None:
    model = quantized(folder, "nf4", use_dora=True)
    optimizer = scalora_of(model, carry_rank=10_000)
    train(model, optimizer, text(4))
    ids = text(1, seed=3)[0]
    optimizer.zero_grad()
    loss(model, ids).backward()
    before = model(input_ids=ids).logits
    internals.rebase(optimizer)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=2e-5)
    assert all(pair.carry.columns > 4 for pair in pairs(model))


def test_bfloat16_autocast_trains_with_the_carry(folder: Path) -> None:
    model = quantized(folder, "nf4", dtype=torch.bfloat16)
    optimizer = scalora_of(model, carry_rank=16)
    ids = text(1)[0]
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model, ids)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(pair.carry.up.dtype == torch.float32 for pair in pairs(model))


def test_dense_accumulator_on_a_quantized_base_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA layer can be re-based"):
        scalora_of(quantized(folder, "nf4"), accumulator="dense")


def test_disabled_adapter_is_the_pretrained_model(folder: Path) -> None:
    model = quantized(folder, "nf4")
    ids = text(1)[0]
    with model.disable_adapter():
        pretrained = model(input_ids=ids).logits.clone()
    train(model, scalora_of(model), text(6))
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, pretrained)


def test_deep_copy_of_a_quantized_model_trains_on_alone(folder: Path) -> None:
    model = quantized(folder, "nf4")
    optimizer = scalora_of(model, carry_rank=16)
    train(model, optimizer, text(4))
    other, other_optimizer = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, text(8)[4:]) == train(other, other_optimizer, text(8)[4:])


def test_monitor_takes_the_carry_for_a_part_of_what_was_learned(folder: Path) -> None:
    model = quantized(folder, "nf4")
    train(model, scalora_of(model, carry_rank=16), text(1) * 20)
    twin = copy.deepcopy(model)
    ids = torch.cat(text(8, seed=4))

    def measured(model: Any) -> Any:
        monitor = MIUBMonitor(model, every=1, tokens=256)
        with monitor, torch.no_grad():
            model(input_ids=ids)
        return monitor.report()

    whole = measured(model)
    for pair in pairs(twin):
        pair.carry.clear()
    alone = measured(twin)
    for pair in pairs(model):
        row = whole[pair.name]
        assert row.coordinates == 4 + pair.carry.columns > 4
        assert not row.rebased
        assert row.value > alone[pair.name].value


@pytest.mark.parametrize("name", ["nf4, double", "int8"])
def test_the_default_keeps_the_function_of_a_quantized_base(folder: Path, name: str) -> None:
    model = quantized(folder, name)
    optimizer = scalora_of(model, rule="leak", interval=4, memory=10)
    train(model, optimizer, text(3))
    P = {pair.name: pair.P_parameter.detach().clone() for pair in pairs(model)}
    codes = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    ids = text(1, seed=3)[0]
    before = model(input_ids=ids).logits
    internals.rebase(optimizer, 1)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=2e-5)
    for pair in pairs(model):
        assert pair.carry.columns == pair.rank
        torch.testing.assert_close(pair.P_parameter.detach(), 0.9**3 * P[pair.name])
    for n, p in model.named_parameters():
        if n in codes:
            assert torch.equal(p, codes[n]), n
