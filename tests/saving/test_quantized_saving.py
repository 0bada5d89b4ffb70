"""What is saved of a model on a quantized base answers as the model in memory did."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import scalora
from scalora.peft_layers import dequantized

bitsandbytes = pytest.importorskip("bitsandbytes")

FORMATS: dict[str, dict[str, Any]] = {
    "NF4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "FP4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}
DORA = "NF4, DoRA"
CASES = [*FORMATS, DORA]
TARGETS = ["q_proj", "o_proj", "gate_proj", "down_proj"]
R, STEPS = 3, 9

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone")


def pretrained(folder: Path, case: str | None) -> Any:
    """The base as a user loads it; None for full precision."""
    quantization = None if case is None else BitsAndBytesConfig(**FORMATS[case.partition(",")[0]])
    base = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32
    )
    if case is None:
        return base
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def logits(model: Any) -> Tensor:
    """With gradients: bitsandbytes rounds the scales of 4 bits to evaluate on a CPU."""
    model.train()
    return model(models.token_ids(6, 9)).logits.detach()


@dataclass(frozen=True)
class Tuned:
    model: Any
    optimizer: scalora.ScaLoRA
    base: Path
    stored: dict[str, Tensor]

    def reloaded(self, folder: Path, case: str | None) -> Any:
        return PeftModel.from_pretrained(pretrained(self.base, case), folder)

    def products(self) -> dict[str, Tensor]:
        """Layer -> what adapter and carry add under the magnitude, (m, n), in float64."""
        return {
            pair.name: pair.scaling * (pair.learned_P.double() @ pair.learned_Q.double())
            for pair in self.optimizer.rebased_pairs
        }


def stored(model: Any) -> dict[str, Tensor]:
    """Codes and scales of every quantized weight, and all else of the base; copies."""
    found = {}
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            found[name.replace("base_model.model.", "").replace(".base_layer", "")] = tensor
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    models.llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path) -> dict[str, Tuned]:
    torch.manual_seed(1)
    return {case: fine_tuned(base, case) for case in CASES}


def fine_tuned(base: Path, case: str) -> Tuned:
    start = pretrained(base, case)
    before = stored(start)
    model = get_peft_model(
        start,
        LoraConfig(
            r=R,
            lora_alpha=6,
            target_modules=TARGETS,
            use_dora=case == DORA,
            task_type="CAUSAL_LM",
        ),
    )
    optimizer = scalora.create_scalora_optimizer(model, torch.optim.AdamW, lr=1e-2, rule="exact")
    model.train()
    models.train(model, optimizer, models.token_ids(6, 9), steps=STEPS)
    return Tuned(model, optimizer, base, before)


@pytest.fixture
def tuned(request: pytest.FixtureRequest, trained: dict[str, Tuned]) -> Iterator[Tuned]:
    """One of the trained models, which the test must leave as it is."""
    found = trained[request.param]
    before = logits(found.model)
    yield found
    assert torch.equal(logits(found.model), before)
    _assert_same_storage(stored(found.model), found.stored)


def _assert_same_storage(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_those_from_before_training(
    case: str, trained: dict[str, Tuned]
) -> None:
    found = trained[case]
    codes = [
        name for name, tensor in found.stored.items() if tensor.dtype in (torch.uint8, torch.int8)
    ]
    scales = [name for name in found.stored if name.endswith((".absmax", ".SCB"))]
    assert sum(name.endswith("proj.weight") for name in codes) == 7
    assert len(scales) == 7
    assert found.optimizer.rebase_count == STEPS
    assert all(row.accumulator == "carry" for row in found.optimizer.report())
    _assert_same_storage(stored(found.model), found.stored)


@pytest.mark.parametrize("tuned, case", [(c, c) for c in CASES], indirect=["tuned"])
def test_saved_adapter_has_all_columns_and_answers_the_same(
    tuned: Tuned, case: str, tmp_path: Path
) -> None:
    before = logits(tuned.model)
    errors = scalora.save_adapter(tuned.model, tmp_path)
    assert errors == {pair.name: 0.0 for pair in tuned.optimizer.rebased_pairs}
    reloaded = tuned.reloaded(tmp_path, case)
    torch.testing.assert_close(logits(reloaded), before, rtol=0, atol=1e-6)
    assert (logits(pretrained(tuned.base, case)) - before).abs().max() > 0.1
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"] == (case == DORA)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for row in tuned.optimizer.report():
        up = tensors[f"base_model.model.{row.layer}.lora_B.weight"]
        assert up.shape[1] == row.rank + row.columns > R
        magnitude = f"base_model.model.{row.layer}.lora_magnitude_vector"
        assert any(name.startswith(magnitude) for name in tensors) == (case == DORA)
    kept = models.layer(reloaded, "model.layers.0.self_attn.q_proj")
    assert bool(kept.use_dora["default"]) == (case == DORA)


@pytest.fixture(scope="module")
def found_elsewhere(
    trained: dict[str, Tuned], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """Case -> the logits in a process that cannot import scalora."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for number, case in enumerate(CASES):
        scalora.save_adapter(trained[case].model, folder / str(number))
    formats = [FORMATS[case.partition(",")[0]] for case in CASES]
    script = f"""{models.WITHOUT_SCALORA}
import torch, models
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaForCausalLM
found = []
for number, quantization in enumerate({formats!r}):
    base = LlamaForCausalLM.from_pretrained(
        {str(base)!r}, quantization_config=BitsAndBytesConfig(**quantization), dtype=torch.float32
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = PeftModel.from_pretrained(base, {str(folder)!r} + "/" + str(number)).train()
    found.append(model(models.token_ids(6, 9)).logits.detach())
torch.save(found, {str(folder / "found.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder, timeout=300)
    return dict(zip(CASES, torch.load(folder / "found.pt"), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_adapter_loads_where_scalora_cannot_be_imported(
    case: str, trained: dict[str, Tuned], found_elsewhere: dict[str, Tensor]
) -> None:
    torch.testing.assert_close(
        found_elsewhere[case], logits(trained[case].model), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("tuned", CASES, indirect=True)
def test_cut_rank_is_the_best_there_is_and_its_error_the_true_one(
    tuned: Tuned, rank: int, tmp_path: Path
) -> None:
    errors = scalora.save_adapter(tuned.model, tmp_path, rank=rank)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    products = tuned.products()
    assert errors.keys() == products.keys()
    for layer, product in products.items():
        B = tensors[f"base_model.model.{layer}.lora_B.weight"].double()
        A = tensors[f"base_model.model.{layer}.lora_A.weight"].double()
        assert B.shape[1] == A.shape[0] == rank
        error = float((product - B @ A).norm() / product.norm())
        assert errors[layer] == pytest.approx(error, rel=1e-4, abs=1e-6)
        # Eckart and Young 1936: no matrix of that rank comes closer than what is cut here.
        sigma = torch.linalg.svdvals(product)
        least = float(sigma[rank:].norm() / sigma.norm())
        assert error == pytest.approx(least, rel=1e-4, abs=1e-6)
        assert least > 1e-4, "the test needs something to cut"
        random = torch.randn(B.shape[0], rank, dtype=torch.float64)
        basis = torch.linalg.qr(B + 1e-2 * B.norm() * random).Q
        other = float((product - basis @ (basis.T @ product)).norm() / product.norm())
        assert other > error


@pytest.mark.parametrize("tuned", CASES, indirect=True)
def test_rank_beyond_all_columns_cuts_nothing(tuned: Tuned, tmp_path: Path) -> None:
    errors = scalora.save_adapter(tuned.model, tmp_path, rank=10**6)
    assert set(errors.values()) == {0.0}


@pytest.mark.parametrize("tuned", CASES, indirect=True)
def test_merged_weights_are_plain_and_answer_the_same(tuned: Tuned, tmp_path: Path) -> None:
    before = logits(tuned.model)
    scalora.save_merged(tuned.model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    merged = LlamaForCausalLM.from_pretrained(tmp_path)
    assert {weight.dtype for weight in merged.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tuned", CASES, indirect=True)
def test_merged_onto_full_precision_answers_as_the_adapter_on_that_base(
    tuned: Tuned, tmp_path: Path
) -> None:
    scalora.save_adapter(tuned.model, tmp_path / "adapter")
    expected = logits(tuned.reloaded(tmp_path / "adapter", None))
    wide = pretrained(tuned.base, None)
    for number, base in enumerate((tuned.base, str(tuned.base), wide, wide.state_dict())):
        weights = copy.deepcopy(wide.state_dict())
        scalora.save_merged(tuned.model, tmp_path / str(number), base=base)
        found = logits(LlamaForCausalLM.from_pretrained(tmp_path / str(number)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        for name, weight in wide.state_dict().items():
            assert torch.equal(weight, weights[name]), "the base itself was merged into"
    assert (expected - logits(tuned.model)).abs().max() > 1e-4, "not the quantized base"


@pytest.mark.parametrize("tuned", ["NF4"], indirect=True)
def test_base_that_does_not_fit_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    wide = pretrained(tuned.base, None)
    lacking = {k: v for k, v in wide.state_dict().items() if "q_proj" not in k}
    narrow = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=models.VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    narrow.save_pretrained(tmp_path / "narrow")
    models.bert().save_pretrained(tmp_path / "bert")
    pretrained(tuned.base, "NF4").save_pretrained(tmp_path / "quantized")
    folders = [tmp_path / name for name in ("narrow", "bert", "quantized", "nothing")]
    for base in (lacking, narrow, *folders, "no/such-model"):
        with pytest.raises(ValueError, match="base"):
            scalora.save_merged(tuned.model, tmp_path / "merged", base=base)
        assert not (tmp_path / "merged").exists()


def test_base_is_refused_for_a_model_that_is_not_quantized(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(target_modules=TARGETS)
    )
    with pytest.raises(ValueError, match=r"not quantized.*leave base out"):
        scalora.save_merged(model, tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("tuned", ["NF4"], indirect=True)
def test_rank_below_one_is_refused(tuned: Tuned, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank=0"):
        scalora.save_adapter(tuned.model, tmp_path, rank=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_after_saving(case: str, base: Path, tmp_path: Path) -> None:
    def losses(save: bool) -> list[float]:
        torch.manual_seed(2)
        tuned = fine_tuned(base, case)
        if save:
            scalora.save_adapter(tuned.model, tmp_path / "adapter", rank=2)
            scalora.save_merged(tuned.model, tmp_path / "merged")
        return models.train(tuned.model, tuned.optimizer, models.token_ids(6, 9), steps=3)

    assert losses(save=True) == losses(save=False)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_dense_layer_beside_quantized_ones_is_saved_once(
    config: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    lora = LoraConfig(r=R, target_modules=["q_proj", "lm_head"], **config)
    model = get_peft_model(pretrained(base, "NF4"), lora)
    optimizer = scalora.create_scalora_optimizer(model, torch.optim.AdamW, lr=3e-3, rule="exact")
    places = {row.layer: row.accumulator for row in optimizer.report()}
    assert places["lm_head"] == "dense" and set(places.values()) == {"dense", "carry"}
    model.train()
    for seed in range(8):
        ids = torch.randint(1, models.VOCABULARY, (4, 9), generator=_generator(seed))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    before = logits(model)
    scalora.save_merged(model, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-4)
    if not config:
        scalora.save_adapter(model, tmp_path / "adapter", base=base)
        again = PeftModel.from_pretrained(pretrained(base, "NF4"), tmp_path / "adapter")
        torch.testing.assert_close(logits(again), before, rtol=0, atol=2e-3)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_initialisation_that_changed_a_quantized_base_is_not_saved_as_an_adapter(
    base: Path, tmp_path: Path
) -> None:
    lora = LoraConfig(r=R, target_modules=["q_proj"], init_lora_weights="olora")
    model = get_peft_model(pretrained(base, "NF4"), lora)
    with pytest.raises(ValueError, match=r"init_lora_weights.*save_merged"):
        scalora.save_adapter(model, tmp_path)
    scalora.save_merged(model, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-4)


def four_bits(folder: Path, *, double: bool) -> Any:
    """With several scales in a row of the layer that is not adapted."""
    models.llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    base = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=R, target_modules=["q_proj"]))


def is_four_bits(module: nn.Module) -> bool:
    return isinstance(module, bitsandbytes.nn.Linear4bit)


@torch.no_grad()
def lay_out_for_evaluation(model: nn.Module) -> None:
    """What bitsandbytes does before it evaluates on a CPU that computes in bfloat16."""
    for module in model.modules():
        if is_four_bits(module):
            weight: Any = module.weight
            weight.data, weight.quant_state = (
                bitsandbytes.functional._convert_weight_packed_for_cpu(
                    weight.data, weight.quant_state
                )
            )


@pytest.mark.parametrize("double", [False, True])
def test_model_is_merged_as_it_is_after_an_evaluation_on_a_cpu(
    double: bool, tmp_path: Path
) -> None:
    model = four_bits(tmp_path / "base", double=double)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    before = dequantized(layer).clone()
    lay_out_for_evaluation(model)

    scalora.save_merged(model, tmp_path / "merged")

    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    rounding = float(before.abs().max()) / 50  # of the scales, by bitsandbytes
    for found in (merged.model.layers[0].mlp.down_proj.weight, dequantized(layer)):
        torch.testing.assert_close(found.detach(), before, rtol=0, atol=rounding)


@pytest.mark.parametrize("save", ["save_adapter", "save_pretrained"])
def test_saving_an_adapter_after_an_evaluation_on_a_cpu_leaves_the_base_as_it_was(
    save: str, tmp_path: Path
) -> None:
    model = four_bits(tmp_path / "base", double=False)
    optimizer = scalora.create_scalora_optimizer(model, torch.optim.AdamW, lr=1e-2, interval=1)
    for _ in range(2):
        model(models.token_ids(6, 9)).logits.square().mean().backward()
        optimizer.step()
    weights = {name: module for name, module in model.named_modules() if is_four_bits(module)}
    before = {name: dequantized(module).clone() for name, module in weights.items()}
    lay_out_for_evaluation(model)

    if save == "save_adapter":
        scalora.save_adapter(model, tmp_path / "adapter")
    else:
        model.save_pretrained(tmp_path / "adapter")

    for name, module in weights.items():
        found, rounding = dequantize_module_weight(module), float(before[name].abs().max()) / 50
        torch.testing.assert_close(found, before[name], rtol=0, atol=rounding, msg=name)
