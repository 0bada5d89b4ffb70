"""Quantized bases of other libraries than bitsandbytes: the carry does not touch them either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import internals
import models
import pytest
import torch
import training
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TorchAoConfig

import scalora
from scalora.cli import main
from scalora.peft_layers import dequantized

TARGETS = ["q_proj", "o_proj", "gate_proj", "down_proj"]
R, STEPS = 3, 9

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone")


def torchao_base(folder: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return LlamaForCausalLM.from_pretrained(
        folder,
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
        dtype=torch.float32,
    )


def hqq_base(folder: Path) -> Any:
    """With hqq's own layers: transformers 5 cannot quantize with it."""
    hqq = pytest.importorskip("hqq.core.quantize")
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            config = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
            quantized = hqq.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            base.set_submodule(name, quantized)
    return base


def torchao_storage(layer: Any) -> dict[str, Tensor]:
    weight = layer.weight
    return {name: getattr(weight, name).clone() for name in weight.__tensor_flatten__()[0]}


def hqq_storage(layer: Any) -> dict[str, Tensor]:
    tensors = {"W_q": layer.W_q, **layer.meta}
    return {name: value.clone() for name, value in tensors.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Backend:
    quantized: Callable[[Path], Any]
    storage: Callable[[Any], dict[str, Tensor]]
    layer: str

    def base(self, folder: Path) -> Any:
        base = self.quantized(folder)
        return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)

    def stored(self, model: Any) -> dict[str, Tensor]:
        """Codes and scales of every layer with an adapter; copies."""
        return {
            f"{name}.{key}": tensor
            for name, module in model.named_modules()
            if name.endswith(tuple(f"{target}.base_layer" for target in TARGETS))
            for key, tensor in self.storage(module).items()
        }


BACKENDS = {
    "torchao": Backend(torchao_base, torchao_storage, "TorchaoLoraLinear"),
    "HQQ": Backend(hqq_base, hqq_storage, "HqqLoraLinear"),
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    models.llama().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Tuned:
    model: Any
    optimizer: scalora.ScaLoRA
    before: dict[str, Tensor]


def fine_tuned(
    backend: Backend, pretrained: Path, carry_rank: int | str = "auto", **config: Any
) -> Tuned:
    options = dict(r=R, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(backend.base(pretrained), LoraConfig(**{**options, **config}))
    model.train()
    before = backend.stored(model)
    optimizer = scalora.create_scalora_optimizer(
        model, torch.optim.AdamW, lr=1e-2, rule="exact", carry_rank=carry_rank
    )
    models.train(model, optimizer, models.token_ids(6, 9), steps=STEPS)
    return Tuned(model, optimizer, before)


def logits(model: Any) -> Tensor:
    model.train()
    return model(models.token_ids(6, 9)).logits.detach()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_trains_with_a_carry_and_the_base_stays_what_it_was(
    backend: Backend, dora: bool, pretrained: Path
) -> None:
    tuned = fine_tuned(backend, pretrained, use_dora=dora)
    layers = [pair.module for pair in tuned.optimizer.rebased_pairs]
    assert [type(layer).__name__ for layer in layers] == [backend.layer] * len(TARGETS)
    assert tuned.optimizer.rebase_count == STEPS
    for row in tuned.optimizer.report():
        assert row.accumulator == "carry" and row.columns > 0
    after = backend.stored(tuned.model)
    assert len(after) >= 2 * len(TARGETS)
    assert after.keys() == tuned.before.keys()
    for name, tensor in tuned.before.items():
        assert torch.equal(after[name], tensor), name
    losses = models.train(tuned.model, tuned.optimizer, models.token_ids(6, 9), steps=6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_rebasing_keeps_the_function(backend: Backend, dora: bool, pretrained: Path) -> None:
    # With room for all, so that no compression comes in between.
    tuned = fine_tuned(backend, pretrained, carry_rank=R * (STEPS + 1), use_dora=dora)
    tuned.optimizer.zero_grad()
    models.loss(tuned.model, models.token_ids(6, 9)).backward()
    before = logits(tuned.model)
    factors = [pair.P_parameter.detach().clone() for pair in tuned.optimizer.rebased_pairs]
    internals.rebase(tuned.optimizer, STEPS + 1)
    torch.testing.assert_close(logits(tuned.model), before, rtol=0, atol=1e-5)
    for pair, old in zip(tuned.optimizer.rebased_pairs, factors, strict=True):
        assert (pair.P_parameter - old).abs().max() > 1e-3 * old.abs().max(), pair.name


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_saved_adapter_answers_the_same(
    backend: Backend, dora: bool, pretrained: Path, tmp_path: Path
) -> None:
    tuned = fine_tuned(backend, pretrained, use_dora=dora)
    before = logits(tuned.model)
    errors = scalora.save_adapter(tuned.model, tmp_path)
    assert set(errors.values()) == {0.0} and len(errors) == len(TARGETS)
    reloaded = PeftModel.from_pretrained(backend.base(pretrained), tmp_path)
    torch.testing.assert_close(logits(reloaded), before, rtol=0, atol=1e-6)
    assert (logits(backend.base(pretrained)) - before).abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_merged_weights_are_plain_and_answer_the_same(
    backend: Backend, pretrained: Path, tmp_path: Path
) -> None:
    tuned = fine_tuned(backend, pretrained)
    scalora.save_merged(tuned.model, tmp_path)
    merged = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged), logits(tuned.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_checkpoint_is_exported(
    backend: Backend, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = fine_tuned(backend, pretrained)
    checkpoint = str(tmp_path / "checkpoint")
    tuned.model.save_pretrained(checkpoint)
    scalora.save_training_state(tuned.optimizer, checkpoint)
    assert main(["export", checkpoint, str(tmp_path / "adapter")]) == 0
    reloaded = PeftModel.from_pretrained(backend.base(pretrained), tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded), logits(tuned.model), rtol=0, atol=1e-6)
    merged = ["export", checkpoint, str(tmp_path / "merged"), "--merged"]
    if hasattr(tuned.model.config, "quantization_config"):
        assert main(merged) == 0
        found = logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged"))
        torch.testing.assert_close(found, logits(tuned.model), rtol=0, atol=1e-5)
    else:
        capsys.readouterr()
        assert main(merged) == 2
        assert "pass --full-precision-base" in capsys.readouterr().err
        assert main([*merged, "--full-precision-base", str(pretrained)]) == 0


class Codes(nn.Module):
    """A layer of codes with one scale a row, as gptqmodel's and aqlm's look from outside."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.in_features, self.out_features = n, m
        self.register_buffer("qweight", torch.randint(-8, 8, (m, n), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(m, 1) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.scale * self.qweight).T


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.filterwarnings("ignore:.*is not a PeftModel")
@pytest.mark.parametrize("kind", [GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear])
def test_peft_layers_whose_library_is_not_here_are_rebased(kind: Any, tmp_path: Path) -> None:
    """PEFT's own layers around a stand-in: they have no weight and cannot be merged."""

    def model() -> nn.Module:
        torch.manual_seed(3)
        made = [
            kind(Codes(n, m), "default", config=LoraConfig(r=R), r=R, lora_alpha=6)
            for n, m in ((12, 20), (20, 8))
        ]
        perceptron = models.Perceptron()
        perceptron.first, perceptron.second = made
        return perceptron

    rebased, inputs = model(), models.vectors(16, 12)
    codes = {name: tensor.clone() for name, tensor in rebased.named_buffers()}
    optimizer = training.optimizer_of(rebased)
    models.train(rebased, optimizer, inputs, steps=STEPS)
    assert [row.accumulator for row in optimizer.report()] == ["carry", "carry"]
    assert all(row.columns > 0 for row in optimizer.report())
    before = models.outputs(rebased, inputs).detach()
    optimizer.zero_grad()
    models.loss(rebased, inputs).backward()
    internals.rebase(optimizer, STEPS + 1)
    torch.testing.assert_close(models.outputs(rebased, inputs), before, rtol=0, atol=1e-5)
    for name, tensor in rebased.named_buffers():
        assert torch.equal(tensor, codes[name]), name
    for pair in optimizer.rebased_pairs:
        with pytest.raises(ValueError, match=r"Codes.*dequantized"):
            pair.effective_weight()
    scalora.save_training_state(optimizer, tmp_path)
    twin = model()
    again = training.optimizer_of(twin)
    twin.load_state_dict(rebased.state_dict())
    scalora.load_training_state(again, tmp_path)
    torch.testing.assert_close(
        models.outputs(twin, inputs), models.outputs(rebased, inputs), rtol=0, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_codes_in_the_place_of_a_weight_are_not_taken_for_one() -> None:
    layer = Codes(12, 20)
    layer.register_buffer("weight", layer.qweight)  # as eetq's
    with pytest.raises(ValueError, match=r"Codes.*dequantized"):
        dequantized(layer)


@pytest.mark.parametrize("plain", ["q_proj", "o_proj"])
def test_rebasing_keeps_the_function_where_only_some_layers_of_a_shape_are_quantized(
    plain: str,
) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    base = models.llama()
    quantization.quantize_(
        base,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: (
            isinstance(module, nn.Linear) and name.endswith("_proj") and not name.endswith(plain)
        ),
    )
    base.hf_quantizer = SimpleNamespace(  # as a model that transformers quantized has one
        quantization_config=SimpleNamespace(get_apply_tensor_subclass=lambda: None)
    )
    model = models.with_lora(base, target_modules=["q_proj", "o_proj"])
    optimizer = training.optimizer_of(model, rule="auto", interval=5, accumulator="carry")
    models.train(model, optimizer, models.token_ids(4, 9), 4)
    before = {pair.name: pair.learned_P @ pair.learned_Q for pair in optimizer.rebased_pairs}
    optimizer._rebase()
    assert {pair.carry.dtype for pair in optimizer.rebased_pairs} == {torch.float16, torch.float32}
    for pair in optimizer.rebased_pairs:
        assert pair.carry.columns > 0
        change = pair.learned_P @ pair.learned_Q - before[pair.name]
        assert change.norm() < 1e-6 * before[pair.name].norm(), pair.name
