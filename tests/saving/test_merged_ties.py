"""A merged model whose modules share weights answers the same when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from training import rebase
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import scalora
from scalora.cli import main
from scalora.transformers_models import differing_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*stay plain LoRA"),
    pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

SEQ2SEQ: dict[str, Any] = dict(
    vocab_size=models.VOCABULARY,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
    dropout=0.0,
    init_std=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
)
T5: dict[str, Any] = dict(
    vocab_size=models.VOCABULARY,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=1,
    num_heads=2,
    dropout_rate=0.0,
    pad_token_id=0,
    decoder_start_token_id=0,
)


def marian(**changes: Any) -> MarianMTModel:
    return MarianMTModel(MarianConfig(**{**SEQ2SEQ, **changes}))


def switch() -> SwitchTransformersForConditionalGeneration:
    sparse = dict(num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, num_decoder_layers=1)
    return SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**T5, **sparse))


def masked_language_model() -> BertForMaskedLM:
    model = BertForMaskedLM(models.bert_config())
    nn.init.normal_(model.cls.predictions.bias)  # tied to the head's
    return model


def two_berts() -> EncoderDecoderModel:
    decoder = models.bert_config(is_decoder=True, add_cross_attention=True).to_dict()
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        models.bert_config(), BertConfig(**decoder)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return EncoderDecoderModel(config)


@dataclass(frozen=True)
class Shared:
    """A model, its layers that share one matrix, and others to adapt besides."""

    model: Callable[[], Any]
    users: tuple[str, ...]
    others: tuple[str, ...] = ("q_proj",)
    ties_stay: bool = False  # in the config, which cannot say otherwise


EMBEDDINGS = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens")
T5_USERS = ("lm_head", "shared", "encoder.embed_tokens", "decoder.embed_tokens")
SHARED = {
    "BART": Shared(lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ)), ("lm_head",)),
    "mBART": Shared(lambda: MBartForConditionalGeneration(MBartConfig(**SEQ2SEQ)), ("lm_head",)),
    "M2M100": Shared(lambda: M2M100ForConditionalGeneration(M2M100Config(**SEQ2SEQ)), ("lm_head",)),
    "Marian": Shared(marian, ("lm_head", *EMBEDDINGS)),
    "Marian, apart": Shared(
        lambda: marian(share_encoder_decoder_embeddings=False, decoder_vocab_size=23),
        ("lm_head", "model.decoder.embed_tokens"),
    ),
    "T5": Shared(
        lambda: T5ForConditionalGeneration(T5Config(**T5)), T5_USERS, ("q",), ties_stay=True
    ),
    # Its decoder's output is not scaled, which its config once told by its ties.
    "T5 1.1": Shared(
        lambda: T5ForConditionalGeneration(T5Config(**T5, tie_word_embeddings=False)),
        ("lm_head",),
        ("q",),
        ties_stay=True,
    ),
    # Its forward pass reads the config's ties.
    "Switch": Shared(switch, ("lm_head", "shared"), ("q",), ties_stay=True),
    "BERT": Shared(
        masked_language_model, ("word_embeddings", "cls.predictions.decoder"), ("query",)
    ),
    "two BERTs": Shared(
        two_berts,
        ("decoder.bert.embeddings.word_embeddings", "decoder.cls.predictions.decoder"),
        ("query",),
    ),
}
CASES = [
    pytest.param(shared, targets, id=f"{name}, {'all' if len(targets) > 1 else targets[0]}")
    for name, shared in SHARED.items()
    for targets in dict.fromkeys([*((user,) for user in shared.users), shared.users])
]
IDS = models.token_ids(4, 9)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, labels=IDS).logits


def fine_tuned(base: nn.Module, **lora: Any) -> Any:
    model = models.with_lora(base, **lora)
    rebase(model, IDS, 4, lr=2e-2, loss=models.language_loss)
    return model


def assert_saved_whole(model: Any, folder: Path) -> Any:
    """The reloaded model, which answers the same and lacks nothing."""
    want = logits(model)
    scalora.save_merged(model, folder)
    kind: Any = type(model.get_base_model())
    again, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(logits(again), want, rtol=0, atol=1e-4)
    return again


@pytest.mark.parametrize("shared, targets", CASES)
def test_merged_model_answers_the_same_whichever_users_of_a_matrix_were_adapted(
    shared: Shared, targets: tuple[str, ...], tmp_path: Path
) -> None:
    base = shared.model()
    start = logits(base)
    lora = dict(target_modules=[*shared.others, *targets], init_lora_weights=False)
    model = fine_tuned(base, **lora)
    assert (logits(model) - start).abs().max() > 1e-2
    again = assert_saved_whole(model, tmp_path)
    if shared.ties_stay:
        assert again.config.tie_word_embeddings
    else:
        written = json.loads((tmp_path / "config.json").read_text())
        assert not again.get_expanded_tied_weights_keys(all_submodels=True)
        assert "true" not in {str(written.get("tie_word_embeddings")).lower()}


@pytest.mark.parametrize("name", ["BART", "Marian", "T5", "Switch", "BERT", "two BERTs"])
def test_merged_model_keeps_a_user_that_was_trained_in_full(name: str, tmp_path: Path) -> None:
    shared = SHARED[name]
    model = fine_tuned(
        shared.model(), target_modules=list(shared.others), modules_to_save=[shared.users[-1]]
    )
    assert_saved_whole(model, tmp_path)


@pytest.mark.parametrize("name", ["Marian", "T5", "BERT", "two BERTs"])
def test_merged_model_stays_tied_where_no_user_was_adapted(name: str, tmp_path: Path) -> None:
    shared = SHARED[name]
    base = shared.model()
    ties = base.get_expanded_tied_weights_keys(all_submodels=True)
    again = assert_saved_whole(fine_tuned(base, target_modules=list(shared.others)), tmp_path)
    assert again.get_expanded_tied_weights_keys(all_submodels=True) == ties
    for target, source in ties.items():
        assert again.get_parameter(target) is again.get_parameter(source)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["Marian", "T5"])
def test_exported_merged_model_answers_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    shared = SHARED[name]
    torch.manual_seed(5)
    shared.model().save_pretrained(tmp_path / "base")
    kind = type(shared.model())
    base = kind.from_pretrained(tmp_path / "base")
    model = models.with_lora(
        base, target_modules=[*shared.others, "lm_head"], task_type="SEQ_2_SEQ_LM"
    )
    optimizer = rebase(model, IDS, 4, lr=2e-2, loss=models.language_loss)
    model.save_pretrained(tmp_path / "checkpoint")
    scalora.save_training_state(optimizer, tmp_path / "checkpoint")
    command = ["export", tmp_path / "checkpoint", tmp_path / "merged", "--merged", "--dtype", dtype]
    assert main(list(map(str, command))) == 0
    again = kind.from_pretrained(tmp_path / "merged")
    tolerance = 1e-4 if dtype == "float32" else 0.02 * float(logits(model).abs().max())
    torch.testing.assert_close(logits(again).float(), logits(model), rtol=0, atol=tolerance)


def test_merged_model_of_replicated_layers_has_a_weight_for_each(tmp_path: Path) -> None:
    base = models.llama(num_hidden_layers=2, tie_word_embeddings=True)
    model = fine_tuned(base, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
    again = assert_saved_whole(model, tmp_path)
    assert again.config.num_hidden_layers == 4
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not torch.equal(*(again.model.layers[i].self_attn.q_proj.weight for i in (0, 2)))
    assert torch.equal(*(again.model.layers[i].self_attn.k_proj.weight for i in (0, 2)))


def test_merged_model_of_tied_factors_takes_each_change_in_once(tmp_path: Path) -> None:
    base = models.llama(tie_word_embeddings=True)
    model = fine_tuned(base, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    again = assert_saved_whole(model, tmp_path)
    assert torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merged_half_precision_model_is_found_to_be_what_was_written(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = models.llama(tie_word_embeddings=True).to(dtype)
    # In float32, and so wider than the checkpoint's dtype, in which all of it is loaded.
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    )
    model.get_submodule("base_model.model.model.norm").modules_to_save.float()
    scalora.save_merged(model, tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert differing_weights(model.merge_and_unload(), again) == []


class Forgetful(LlamaForCausalLM):
    """A class that leaves a weight out of its checkpoints."""

    _keys_to_ignore_on_save = ("model.layers.0.self_attn.q_proj.weight",)


class Demanding(LlamaForCausalLM):
    """A class that its own checkpoints cannot be loaded with."""

    def __init__(self, config: Any, size: int) -> None:
        super().__init__(config)


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        (Forgetful, (), "model.layers.0.self_attn.q_proj.weight"),
        (Demanding, (3,), "Demanding.from_pretrained cannot load it"),
    ],
)
def test_merged_model_that_would_load_as_another_is_not_written(
    kind: Any, arguments: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    config = models.llama().config
    model = models.with_lora(kind(config, *arguments), target_modules=["q_proj"])
    bits = models.bits(model)
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(ValueError, match=message):
        scalora.save_merged(model, tmp_path)
    models.assert_same_bits(model, bits)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_proof_of_a_merged_model_draws_no_random_number_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = models.with_lora(SHARED["T5"].model(), target_modules=["q", "lm_head"])
    before = torch.get_rng_state()
    capfd.readouterr()
    scalora.save_merged(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert "".join(capfd.readouterr()) == ""


def test_weights_that_differ_are_named() -> None:
    one = models.llama()
    other: PreTrainedModel = models.llama()
    other.load_state_dict(one.state_dict())
    assert differing_weights(one, other) == []
    with torch.no_grad():
        other.lm_head.weight[3, 5] += 1
        one.model.norm.weight[0] = other.model.norm.weight[0] = float("nan")
    assert differing_weights(one, other) == ["lm_head.weight"]
    with torch.no_grad():
        one.model.norm.weight[1] = float("nan")
    assert differing_weights(one, other) == ["model.norm.weight", "lm_head.weight"]


def test_adapter_of_a_tied_head_and_replicated_layers_loads_again(tmp_path: Path) -> None:
    def base() -> LlamaForCausalLM:
        torch.manual_seed(3)
        return models.llama(num_hidden_layers=2, tie_word_embeddings=True)

    for number, lora in enumerate(
        (
            {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]},
            {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
            {"target_modules": ["q_proj", "lm_head"]},
        )
    ):
        model = fine_tuned(base(), **lora)
        scalora.save_adapter(model, tmp_path / str(number), base=base())
        again = PeftModel.from_pretrained(base(), tmp_path / str(number))
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-4)
