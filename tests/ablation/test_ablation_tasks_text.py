import gzip
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scalora.ablation.tasks import task_of
from scalora.ablation.tasks.documents import packed, read_documents, split_documents

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
END = "</s>"


def tokenizer():
    vocabulary = {word: i for i, word in enumerate([END, "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, unk_token="[UNK]")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,  # so that a head that is not trained tells words apart
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """Documents that count on from where they start."""
    path = tmp_path / "count.jsonl"
    documents = [
        " ".join(WORDS[(start + i) % 8] for i in range(20 + extra))
        for start in range(8)
        for extra in range(6)
    ]
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents), "utf-8")
    return str(path)


def test_a_user_s_model_learns_a_user_s_text(model, data, tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("eight seven six\n\nfive four three two one", encoding="utf-8")
    task = task_of("text", model=model, data=data, source=str(source))
    base = task.model(seed=0)
    before, source_before = task.score(base, "test"), task.source_loss(base)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=task.targets, task_type=task.task_type)
    adapted = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=3e-2)
    for batch in task.batches(seed=0, steps=100):
        optimizer.zero_grad()
        task.loss(adapted, batch).backward()
        optimizer.step()
    assert task.score(adapted, "test")["loss"] < 0.9 * before["loss"]
    assert task.score(adapted, "validation", quick=True)["loss"] < 0.9 * before["loss"]
    assert task.source_loss(adapted) > source_before
    assert len(task.probes()) >= 1


def test_batches_are_epochs_that_the_seed_shuffles(model, data):
    task = task_of("text", model=model, data=data)
    assert task.source_loss(task.model(seed=0)) is None
    first, again, other = (torch.stack(list(task.batches(seed, 4))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    blocks = task._blocks["train"]
    # In the first epoch, none comes twice.
    epoch = torch.cat(list(task.batches(1, -(-len(blocks) // task.batch_size))))[: len(blocks)]
    assert sorted(epoch.tolist()) == sorted(blocks.tolist())


def test_no_document_is_on_two_sides():
    parts = split_documents([str(i) for i in range(25)])
    assert {name: len(part) for name, part in parts.items()} == {
        "test": 2,
        "validation": 2,
        "train": 21,
    }
    assert len(set().union(*parts.values())) == 25
    assert split_documents([str(i) for i in range(25)]) == parts
    with pytest.raises(ValueError, match="2 documents"):
        split_documents(["a", "b"])


def test_documents_of_every_kind_of_source(tmp_path):
    (tmp_path / "one.txt").write_text("a b\nc\n\nd\n \n\nd\n", encoding="utf-8")
    assert read_documents(tmp_path / "one.txt") == ["a b\nc", "d"]
    (tmp_path / "two.csv").write_text("text,more\ne,1\n,2\nf,3\n", encoding="utf-8")
    assert read_documents(tmp_path / "two.csv") == ["e", "f"]
    with gzip.open(tmp_path / "three.jsonl.gz", "wt", encoding="utf-8") as lines:
        lines.write('{"text": "g"}\n')
    assert read_documents(tmp_path / "three.jsonl.gz") == ["g"]
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    assert read_documents(tmp_path) == ["a b\nc\n\nd\n \n\nd", "g", "e", "f"]


def test_what_cannot_be_read_is_told(tmp_path):
    (tmp_path / "wrong.csv").write_text("body\na\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no column `text` among"):
        read_documents(tmp_path / "wrong.csv")
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty.txt: no text in it"):
        read_documents(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"no/such/data: no such file"):
        read_documents("no/such/data")


def test_blocks_are_full_and_documents_end(tmp_path):
    blocks = packed(["one two", "three", "four five"], tokenizer(), 3)
    assert blocks.tolist() == [[2, 3, 0], [4, 0, 5]]
    assert packed(["one two"], tokenizer(), 128).tolist() == [[2, 3, 0]]
    with pytest.raises(ValueError, match="too few"):
        packed([""], tokenizer(), 3)


def test_a_model_without_a_language_head_is_refused(model, data):
    task = task_of("text", model=model, data=data)
    LlamaForCausalLM.from_pretrained(model).model.save_pretrained(model)
    with pytest.raises(ValueError, match="no whole language model"):
        task.model(seed=0)
    with pytest.raises(ValueError, match=r"text: .*'data'; the options that it takes: model, data"):
        task_of("text", model=model)
