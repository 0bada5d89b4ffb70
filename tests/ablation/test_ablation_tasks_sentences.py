import csv
import sys

import pytest

from scalora.ablation.tasks.rows import read_rows
from scalora.ablation.tasks.sentences import SHIPPED, Sentences, load_sentences, split


def write_csv(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([header, *rows])


def test_the_shipped_sentences_are_balanced_and_distinct():
    rows = read_rows(SHIPPED)
    assert len(rows) == 10_605
    assert rows[0].keys() == {"text", "rating"}
    assert all(-4 <= float(row["rating"]) <= 4 for row in rows)

    sentences = load_sentences(str(SHIPPED))
    assert sentences.classes == ["negative", "positive"]
    assert len(set(sentences.texts)) == len(sentences)
    assert 0.45 < sum(sentences.labels) / len(sentences) < 0.55


def test_neutral_ratings_and_repetitions_are_left_out(tmp_path):
    path = tmp_path / "few.csv"
    rows = [("a", "1.0"), ("b", "-3"), ("c", "0.1"), ("a", "2.0"), ("d", "-0.2")]
    write_csv(path, ("text", "rating"), rows)
    sentences = load_sentences(str(path))

    assert sentences.texts == ["a", "b"]
    assert [sentences.classes[label] for label in sentences.labels] == ["positive", "negative"]


def test_labels_may_be_any_classes(tmp_path):
    path = tmp_path / "few.csv"
    write_csv(path, ("sentence", "label"), [("a", "news"), ("b", "sport"), ("c", "art")])
    sentences = load_sentences(str(path))

    assert sentences.classes == ["art", "news", "sport"]
    assert sentences.labels == [1, 2, 0]


@pytest.mark.parametrize(
    ("header", "message"),
    [(("text", "score"), "`label` or `rating`"), (("body", "label"), "`text`")],
)
def test_missing_columns_are_named(tmp_path, header, message):
    path = tmp_path / "few.csv"
    write_csv(path, header, [("a", "1"), ("b", "2")])
    with pytest.raises(ValueError, match=message):
        load_sentences(str(path))


def test_the_split_is_disjoint_and_drawn_by_the_seed():
    texts = [str(i) for i in range(50)]
    sentences = Sentences(texts, [0, 1] * 25, ["negative", "positive"])
    training, held_out = split(sentences, 20, seed=3)

    assert sorted(training.texts + held_out.texts) == sorted(texts)
    assert split(sentences, 20, seed=3)[1].texts == held_out.texts
    assert split(sentences, 20, seed=4)[1].texts != held_out.texts
    with pytest.raises(ValueError, match="50 sentences to hold out of 50"):
        split(sentences, 50, seed=3)


def test_a_source_that_is_no_file_needs_the_hub_s_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"no/such: no such file; .* pip install datasets"):
        read_rows("no/such")


def test_a_source_that_is_neither_a_file_nor_on_the_hub_is_told():
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"no/such: no such file, and no data set of the hub"):
        read_rows("no/such")


def test_json_lines_are_read_and_a_wrong_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 1}\n\n{"text": "b", "label": 0}\n', encoding="utf-8")
    assert read_rows(path) == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    path.write_text('{"text": "a"}\n{"text"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_rows(path)
