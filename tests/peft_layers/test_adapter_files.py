"""An adapter's files hold all that was learned, and load, whatever PEFT made of the model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from training import rebase
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import scalora
from scalora.cli import main
from scalora.files import read_tensors, write_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*stay plain LoRA"),
    pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    # PEFT looks for the names of parameters among those of modules.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]

NEW = models.VOCABULARY + 5
IDS = torch.randint(1, NEW, (4, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def fine_tuned(
    base: nn.Module, ids: Tensor, accumulator: str, steps: int = 6, **lora: Any
) -> tuple[Any, scalora.ScaLoRA]:
    model = get_peft_model(base, LoraConfig(**{"r": 3, **lora}))
    options: Any = {"lr": 2e-2, "accumulator": accumulator}
    return model, rebase(model, ids, steps, loss=models.language_loss, **options)


def mixture(**changes: Any) -> Qwen3MoeForCausalLM:
    torch.manual_seed(3)
    options = dict(
        vocab_size=models.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**options, **changes}))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MIXTURES: dict[str, dict[str, Any]] = {
    "parameters": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "one parameter": {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]},
    "all-linear": {"target_modules": "all-linear"},
    "rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "their own ranks": {
        "target_modules": ["q_proj"],
        "target_parameters": EXPERTS,
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"gate_up_proj": 5},
    },
}


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
@pytest.mark.parametrize("lora", MIXTURES.values(), ids=MIXTURES)
def test_adapter_of_experts_loads_again(
    lora: dict[str, Any], accumulator: str, tmp_path: Path
) -> None:
    ids = models.token_ids(4, 9)
    model, _ = fine_tuned(mixture(), ids, accumulator, **lora)
    want = logits(model, ids)
    errors = scalora.save_adapter(model, tmp_path / "adapter", base=mixture(), rank=10**6)
    assert max(errors.values()) < 1e-5 and not any("experts" in name for name in errors)
    again = PeftModel.from_pretrained(mixture(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, ids), want, rtol=0, atol=1e-5)
    scalora.save_merged(model, tmp_path / "merged")
    merged = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ids), want, rtol=0, atol=1e-5)


def test_quantized_mixture_is_merged_with_its_experts(tmp_path: Path) -> None:
    mixture(hidden_size=64, head_dim=32).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    ids = models.token_ids(4, 9)
    model, _ = fine_tuned(base, ids, "auto", **MIXTURES["parameters"])
    want = model.train()(input_ids=ids).logits.detach()  # evaluation on a CPU rounds the scales
    scalora.save_merged(model, tmp_path / "merged")
    merged = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "merged")
    # What bitsandbytes rounds on a CPU; plain PEFT's own files come back as far off.
    torch.testing.assert_close(logits(merged, ids), want, rtol=0, atol=0.02)
    start = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(start, ids) - want).abs().max() > 0.2


def pretrained(folder: Path, tied: bool) -> LlamaForCausalLM:
    """The stored model with rows for new tokens, which come out otherwise each time."""
    if not folder.exists():
        base = models.llama(tie_word_embeddings=tied, hidden_size=16, intermediate_size=24)
        base.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


def with_new_tokens(folder: Path, tied: bool) -> LlamaForCausalLM:
    """The same, and the new tokens begin as the words that describe them."""
    model = pretrained(folder, tied)
    with torch.no_grad():
        for layer in (model.model.embed_tokens, model.lm_head)[: 1 if tied else 2]:
            layer.weight[-5:] = layer.weight[3:8] + layer.weight[10:15]
    return model


VOCABULARIES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj"]},
    "attention, DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding, DoRA": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "some tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [NEW - 2, NEW - 1],
    },
    "embedding in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore:the vocabulary was changed")
@pytest.mark.parametrize("accumulator", ["auto", "carry"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("lora", VOCABULARIES.values(), ids=VOCABULARIES)
def test_adapter_takes_new_tokens_along(
    lora: dict[str, Any], tied: bool, accumulator: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    model, _ = fine_tuned(with_new_tokens(base, tied), IDS, accumulator, steps=4, **lora)
    want = logits(model, IDS)
    start = None if accumulator == "carry" and not lora.get("use_dora") else base
    errors = scalora.save_adapter(model, tmp_path / "adapter", rank=10**6, base=start)
    assert max(errors.values()) < 1e-5
    again = PeftModel.from_pretrained(pretrained(base, tied), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, IDS), want, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:the vocabulary was changed")
@pytest.mark.parametrize("accumulator", ["auto", "carry"])
@pytest.mark.parametrize("gone", [False, True], ids=["", "without the base"])
@pytest.mark.parametrize("lora", ["attention", "embedding", "head"])
def test_exported_checkpoint_takes_new_tokens_along(
    lora: str, gone: bool, accumulator: str, tmp_path: Path
) -> None:
    base, checkpoint = tmp_path / "base", tmp_path / "checkpoint"
    model, optimizer = fine_tuned(
        with_new_tokens(base, tied=True),
        IDS,
        accumulator,
        task_type="CAUSAL_LM",
        **VOCABULARIES[lora],
    )
    want = logits(model, IDS)
    model.save_pretrained(checkpoint)
    scalora.save_training_state(optimizer, checkpoint)
    if gone:
        base.rename(tmp_path / "elsewhere")
    if gone and accumulator == "auto":
        assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 2
        return
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    if gone:
        (tmp_path / "elsewhere").rename(base)
    again = PeftModel.from_pretrained(pretrained(base, tied=True), tmp_path / "out")
    torch.testing.assert_close(logits(again, IDS), want, rtol=0, atol=1e-3)
    assert main(["export", str(checkpoint), str(tmp_path / "merged"), "--merged"]) == 0
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, IDS), want, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:the vocabulary was changed")
def test_checkpoint_that_lacks_the_new_tokens_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # PEFT leaves the head out of what it writes, since the embedding is adapted.
    model, optimizer = fine_tuned(
        with_new_tokens(tmp_path / "base", tied=False),
        IDS,
        "carry",
        task_type="CAUSAL_LM",
        **VOCABULARIES["embedding"],
    )
    model.save_pretrained(tmp_path / "checkpoint")
    scalora.save_training_state(optimizer, tmp_path / "checkpoint")
    for options in ([], ["--merged"]):
        assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out"), *options]) == 2
        assert "'lm_head.weight'" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "lora, tied, lost",
    [("embedding", False, "lm_head.weight"), ("head", False, "model.embed_tokens.weight")]
    + [(lora, tied, "") for lora in ("attention", "both") for tied in (True, False)],
)
def test_new_tokens_that_a_checkpoint_would_lack_are_named_when_training_begins(
    lora: str, tied: bool, lost: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    fine_tuned(
        with_new_tokens(tmp_path / "base", tied), IDS, "carry", steps=0, **VOCABULARIES[lora]
    )
    found = [str(w.message) for w in recwarn if "vocabulary was changed" in str(w.message)]
    assert len(found) == (1 if lost else 0)
    assert all(lost in message and "modules_to_save" in message for message in found)


def test_adapter_for_the_pretrained_vocabulary_is_no_larger_than_it_was(tmp_path: Path) -> None:
    models.llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model, _ = fine_tuned(base, models.token_ids(4, 9), "carry", target_modules=["q_proj"])
    scalora.save_adapter(model, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert {name.rpartition(".lora_")[0] for name in names} == {
        "base_model.model.model.layers.0.self_attn.q_proj"
    }


def test_embedding_that_was_folded_into_is_written_as_its_change_alone(tmp_path: Path) -> None:
    base = models.llama()
    start = copy.deepcopy(base)
    ids = models.token_ids(4, 9)
    model, _ = fine_tuned(base, ids, "dense", target_modules=["embed_tokens"])
    scalora.save_adapter(model, tmp_path, base=start, rank=10**6)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert not any("base_layer" in name for name in names)
    again = PeftModel.from_pretrained(start, tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_adapted_embedding_that_was_changed_before_training_loads_as_it_was(
    tmp_path: Path,
) -> None:
    models.llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.model.embed_tokens.weight[5:9] = 1.0  # rows that the tokenizer had not used
    ids = models.token_ids(4, 9)
    model, _ = fine_tuned(base, ids, "carry", target_modules=["q_proj", "embed_tokens"])
    scalora.save_adapter(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
def test_adapter_of_every_bias_under_a_classifier_loads_again(
    accumulator: str, tmp_path: Path
) -> None:
    base = models.bert(num_labels=2)
    start = copy.deepcopy(base)
    lora = dict(target_modules=["query"], bias="all", task_type="SEQ_CLS")
    model = models.with_lora(base, **lora)
    ids = models.token_ids(4, 9)
    rebase(model, ids, 4, lr=2e-2, accumulator=accumulator)
    scalora.save_adapter(model, tmp_path, base=start, rank=10**6)
    again = PeftModel.from_pretrained(copy.deepcopy(start), tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5)
    assert (logits(again, ids) - logits(start, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_adapter_with_tied_modules_to_save_loads_again(tied: list[str], tmp_path: Path) -> None:
    base = models.llama(tie_word_embeddings=True)
    start = copy.deepcopy(base)
    ids = models.token_ids(4, 9)
    model, _ = fine_tuned(
        base,
        ids,
        "carry",
        target_modules=["q_proj"],
        modules_to_save=tied,
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    scalora.save_adapter(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(start, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5)
    scalora.save_merged(model, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    one = models.vectors(4, 3)
    written = {"one": one, "again": one, "turned": one.T, "part": one[1:], "empty": one[:0]}
    write_tensors(tmp_path / "file", written, {})
    found, _ = read_tensors(tmp_path / "file")
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())


def test_tied_layer_that_can_have_no_carry_stays_plain_lora(tmp_path: Path) -> None:
    base = models.llama(tie_word_embeddings=True)
    start, ids = copy.deepcopy(base), models.token_ids(4, 9)
    lora = dict(target_modules=["q_proj", "embed_tokens"], use_dora=True)
    with pytest.warns(UserWarning, match=r"embed_tokens \(DoraEmbeddingVariant is more"):
        model, optimizer = fine_tuned(base, ids, "auto", **lora)
    assert [pair.name for pair in optimizer.rebased_pairs] == ["model.layers.0.self_attn.q_proj"]
    scalora.save_adapter(model, tmp_path, base=start, rank=10**6)
    again = PeftModel.from_pretrained(start, tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_ranks_are_written_by_the_names_that_peft_looks_for(tmp_path: Path) -> None:
    model, _ = fine_tuned(mixture(), models.token_ids(4, 9), "carry", **MIXTURES["all-linear"])
    scalora.save_adapter(model, tmp_path)
    ranks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    experts = {name.rpartition(".")[2]: rank for name, rank in ranks.items() if "experts" in name}
    assert experts["gate_up_proj"] == 6 and experts["down_proj"] == 3
