"""A model with an encoder and a decoder: each layer is read with the mask of what it reads."""

from __future__ import annotations

import pytest
import torch
from measuring import collector
from models import VOCABULARY, bert_config, token_ids, trainable, with_lora
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from miub import MIUBMonitor

PADDING, END = 0, 2
BATCH, LENGTH = 8, 12
# Tokens that are left of each text: sources and targets have other numbers of them.
SOURCES = torch.arange(BATCH) % 5 + 5
TARGETS = torch.arange(BATCH) % 7 + 3
_FAIRSEQ = dict(
    vocab_size=VOCABULARY,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    pad_token_id=PADDING,
    eos_token_id=END,
    bos_token_id=1,
    decoder_start_token_id=END,
    forced_eos_token_id=None,
)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=PADDING,
        eos_token_id=END,
        decoder_start_token_id=PADDING,
    )
    return T5ForConditionalGeneration(config)


def two_berts() -> nn.Module:
    decoder = bert_config(is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(encoder=BertModel(bert_config()), decoder=BertLMHeadModel(decoder))
    model.config.pad_token_id, model.config.decoder_start_token_id = PADDING, 1
    return model


KINDS = {
    "T5": (t5, ["q", "k", "v", "o", "wi", "wo"]),
    "BART": (
        lambda: BartForConditionalGeneration(BartConfig(**_FAIRSEQ)),
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    "Marian": (
        lambda: MarianMTModel(MarianConfig(decoder_vocab_size=VOCABULARY, **_FAIRSEQ)),
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    "M2M100": (
        lambda: M2M100ForConditionalGeneration(M2M100Config(**_FAIRSEQ)),
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    "two BERTs": (two_berts, ["query", "key", "value", "dense"]),
}
_CROSS = ("EncDecAttention", "encoder_attn", "crossattention")
_OF_STATES = ("k", "v", "k_proj", "v_proj", "key", "value")


def made(kind: str, **lora) -> nn.Module:
    torch.manual_seed(0)
    make, targets = KINDS[kind]
    model = with_lora(make(), **{"target_modules": targets, **lora})
    for parameter in trainable(model):
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def mask(lengths: torch.Tensor, length: int = LENGTH) -> torch.Tensor:
    return (torch.arange(length) < lengths[:, None]).long()


def sources() -> dict[str, torch.Tensor]:
    kept = mask(SOURCES)
    ids = token_ids(BATCH, LENGTH).clamp_min(END + 1)
    return {"input_ids": ids * kept, "attention_mask": kept}


def labels(ignored: int, length: int = LENGTH) -> torch.Tensor:
    ids = token_ids(BATCH, length).clamp_min(END + 1)
    return torch.where(mask(TARGETS, length) > 0, ids, ignored)


def tokens_by_layer(model: nn.Module, **batch) -> dict[str, int]:
    monitor = MIUBMonitor(model, every=1, tokens=1000)
    with monitor, torch.no_grad():
        model(**batch)
    return {row.layer: row.tokens for row in monitor.report()}


def expected(layer: str, of_targets: int) -> int:
    parts = layer.split(".")
    reads_encoder = _side(parts) == "encoder" or (
        any(part in _CROSS for part in parts) and parts[-1] in _OF_STATES
    )
    return int(SOURCES.sum()) if reads_encoder else of_targets


def _side(parts: list[str]) -> str:
    """The outer one: a decoder that is a BERT has a part that is called an encoder."""
    return next(part for part in parts if part in ("encoder", "decoder"))


def assert_each_has_its_own_mask(found: dict[str, int], of_targets: int) -> None:
    assert {_side(layer.split(".")) for layer in found} == {"encoder", "decoder"}
    cross = [layer for layer in found if any(name in layer for name in _CROSS)]
    assert len({found[layer] for layer in cross}) == 2
    assert found == {layer: expected(layer, of_targets) for layer in found}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["labels", "labels of padding", "mask"])
def test_every_layer_is_read_with_the_mask_of_what_it_reads(kind, way):
    """Source and target have one length, so shapes alone could not tell."""
    given = {"labels": labels(PADDING if way == "labels of padding" else -100)}
    if way == "mask":
        given["decoder_attention_mask"] = mask(TARGETS - 1)
    found = tokens_by_layer(made(kind), **sources(), **given)
    counted = TARGETS - 1 if way == "mask" else TARGETS
    assert_each_has_its_own_mask(found, int(counted.sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_targets_of_another_length_than_the_sources_are_read_with_their_own_mask(kind):
    found = tokens_by_layer(made(kind), **sources(), labels=labels(-100, 10))
    assert_each_has_its_own_mask(found, int(TARGETS.sum()))


@pytest.mark.parametrize("kind", ["T5", "BART"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_mask(kind, reentrant):
    model = made(kind)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    monitor = MIUBMonitor(model, every=1, tokens=1000)
    with monitor:
        model(**sources(), labels=labels(-100)).loss.backward()
    found = {row.layer: row.tokens for row in monitor.report()}
    assert_each_has_its_own_mask(found, int(TARGETS.sum()))


def test_with_neither_mask_nor_labels_the_padding_of_the_decoders_inputs_is_left_out():
    """As a Trainer with label smoothing calls it, which keeps the labels for itself."""
    model = made("BART")
    rows = [{"input_ids": ids[:n].tolist()} for ids, n in zip(*_ragged(), strict=True)]
    for row, ids in zip(rows, labels(-100), strict=True):
        row["labels"] = ids[ids != -100].tolist()
    batch = DataCollatorForSeq2Seq(_Padder(), model=model.get_base_model())(rows)
    batch.pop("labels")
    found = tokens_by_layer(model, **batch)
    # The end of each text is read as well, where that leaves it within the longest.
    longest = int(TARGETS.max())
    assert_each_has_its_own_mask(found, int((TARGETS + 1).clamp_max(longest).sum()))


def _ragged() -> tuple[torch.Tensor, torch.Tensor]:
    return sources()["input_ids"], SOURCES


class _Padder:
    """As much of a tokenizer as the collator asks for."""

    padding_side = "right"

    def pad(self, features, **_):
        ids = [torch.tensor(row["input_ids"]) for row in features]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PADDING)
        others = {k: [row[k] for row in features] for k in features[0] if k != "input_ids"}
        return {
            "input_ids": padded,
            "attention_mask": (padded != PADDING).long(),
            **{k: torch.tensor(v) for k, v in others.items()},
        }


def test_the_rows_that_are_sampled_are_those_of_the_layers_own_tokens():
    model, (kept, keep) = made("T5"), collector()
    seen = []
    attention = model.get_base_model().decoder.block[0].layer[1].EncDecAttention
    hooks = [
        projection.get_base_layer().register_forward_hook(lambda _, args, out: seen.append(out))
        for projection in (attention.q, attention.k)
    ]
    monitor = MIUBMonitor(model, every=1, tokens=1000, estimator=keep)
    with monitor, torch.no_grad():
        model(**sources(), labels=labels(-100))
    for hook in hooks:
        hook.remove()
    for output, lengths in zip(seen, (TARGETS, SOURCES), strict=True):
        own = output[mask(lengths) > 0].double()
        matches = [u for u, _ in kept if u.shape == own.shape and _same_rows(u.double(), own)]
        assert len(matches) == 1


def _same_rows(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(torch.cdist(one, other).min(1).values.max() < 1e-5)


def test_a_head_after_the_decoder_is_read_with_the_decoders_mask():
    found = tokens_by_layer(
        made("BART", target_modules=["q_proj", "lm_head"]), **sources(), labels=labels(-100)
    )
    assert found["lm_head"] == int(TARGETS.sum())


def test_without_labels_for_tokens_the_decoder_reads_the_sources_shifted():
    torch.manual_seed(0)
    config = BartConfig(**_FAIRSEQ, num_labels=2)
    model = with_lora(BartForSequenceClassification(config), target_modules=["q_proj"]).eval()
    batch = sources()
    ends = (torch.arange(LENGTH) == SOURCES[:, None] - 1).long()
    batch["input_ids"] = torch.where(ends > 0, END, batch["input_ids"])
    found = tokens_by_layer(model, **batch, labels=torch.zeros(BATCH, dtype=torch.long))
    longest = (SOURCES + 1).clamp_max(LENGTH)
    for layer, tokens in found.items():
        decoder = "decoder" in layer
        assert tokens == int(longest.sum() if decoder else SOURCES.sum())


def test_layers_are_found_by_the_names_that_the_model_gives_them():
    model = made("BART")
    monitor = MIUBMonitor(model, every=1)
    with monitor, torch.no_grad():
        model(**sources(), labels=labels(-100))
    report = monitor.report()
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert names
    for name in names:
        assert name.startswith("base_model.model.")
        assert report[name] is report[name.removeprefix("base_model.model.")]
        assert report[f"module.{name}", "default"] is report[name]
        assert name in report and (name, "default") in report
    assert "base_model.model.nothing" not in report
    with pytest.raises(KeyError, match="was not measured"):
        report["other." + names[0]]
