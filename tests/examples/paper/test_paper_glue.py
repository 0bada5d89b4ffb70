"""GLUE: its files, its metrics, and the script from end to end."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from paper_inputs import row, save_tokenizer
from transformers import DebertaV2Config, DebertaV2Model

GLUE = {
    "CoLA": {
        "train": "gj04\t1\t\tOur friends won't buy \"this.\ngj04\t0\t*\tThey caused him angry.\n",
        "dev": "gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThe in fall.\n",
    },
    "SST-2": {
        "train": "sentence\tlabel\nhide new secretions \t0\ncontains no\x85 wit \t1\n",
        "dev": "sentence\tlabel\nit 's charming \t1\nunflinchingly bleak \t0\n",
    },
    "MRPC": {
        split: "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '1\t7\t8\tHe said " so .\tHe so said .\r\n0\t9\t10\tYucaipa owned .\tIt sold "it .\r\n'
        for split in ("train", "dev")
    },
    "STS-B": {
        split: "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\t"
        "score\n0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000\n"
        '1\tmain\tMSRvid\t2012\t4\tnone\tnone\tA "man.\tA woman.\t0.75\n'
        for split in ("train", "dev")
    },
    "QQP": {
        split: "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t3\t4\tHow?\tWhy?\t0\n"
        '2\t5\t6\tbroken off\n3\t7\t8\tIs "it?\tIs it?\t1\n'
        for split in ("train", "dev")
    },
    "MNLI": {
        split: "index\tpromptID\tpairID\tgenre\tsentence1_parse\tsentence1\tsentence2\tlabel1\t"
        f"gold_label\n0\t1\t1n\tfiction\t( a )\t{split} one\tb\tentailment\tneutral\n"
        "1\t2\t2e\tfiction\t( a )\tone\ttwo\tneutral\tentailment\n"
        for split in ("train", "dev_matched", "dev_mismatched")
    },
    "QNLI": {
        split: "index\tquestion\tsentence\tlabel\n0\tWhen?\tIn 1999.\tentailment\n"
        "1\tWho?\tIn 1999.\tnot_entailment\n"
        for split in ("train", "dev")
    },
    "RTE": {
        split: "index\tsentence1\tsentence2\tlabel\n0\tOil fell.\tOil rose.\tnot_entailment\n"
        "1\tOil rose.\tOil went up.\tentailment\n"
        for split in ("train", "dev")
    },
}


@pytest.fixture
def glue_folder(tmp_path):
    for folder, splits in GLUE.items():
        (tmp_path / "GLUE" / folder).mkdir(parents=True)
        for split, text in splits.items():
            path = tmp_path / "GLUE" / folder / f"{split}.tsv"
            path.write_bytes(text.encode("utf-8"))
    return tmp_path / "GLUE"


@pytest.fixture
def deberta(tmp_path):
    folder = tmp_path / "deberta"
    config = DebertaV2Config(
        vocab_size=save_tokenizer(folder, pairs=True),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
    )
    DebertaV2Model(config).save_pretrained(folder)
    return folder


def test_every_file_of_glue_is_read_with_its_quotes_and_labels(example, glue_folder):
    data = example("glue_data")
    found = {name: data.load(str(glue_folder), name) for name in data.TASKS}

    cola = found["cola"]["train"]
    assert cola.sentences == (["Our friends won't buy \"this.", "They caused him angry."],)
    assert cola.labels == [1, 0]
    assert found["sst2"]["train"].sentences == (["hide new secretions ", "contains no\x85 wit "],)
    mrpc = found["mrpc"]["dev"]
    assert mrpc.sentences[0] == ['He said " so .', "Yucaipa owned ."]
    assert mrpc.sentences[1] == ["He so said .", 'It sold "it .']
    assert mrpc.labels == [1, 0]
    assert found["stsb"]["train"].labels == [5.0, 0.75]
    assert found["qqp"]["train"].sentences == (["How?", 'Is "it?'], ["Why?", "Is it?"])
    assert found["qqp"]["train"].labels == [0, 1]
    assert set(found["mnli"]) == {"train", "dev_matched", "dev_mismatched"}
    assert found["mnli"]["dev_mismatched"].sentences[0] == ["dev_mismatched one", "one"]
    assert found["mnli"]["train"].labels == [1, 0]
    assert found["qnli"]["train"].labels == [0, 1]
    assert found["rte"]["dev"].labels == [1, 0]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("RTE/dev.tsv", None, "RTE/dev.tsv is not in --data"),
        ("RTE/dev.tsv", "index\tsentence1\tlabel\n", "no column 'sentence2' in"),
        ("RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n", "has no examples"),
        ("RTE/dev.tsv", "", "no column 'sentence1' or 'sentence2' or 'label'"),
        ("RTE/train.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", "line 2: 3 columns"),
        ("RTE/train.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t?\n", "the label '\\?'"),
        ("CoLA/train.tsv", "sentence\tlabel\nIt.\t1\n", "CoLA/train.tsv, line 1: 2 columns"),
        ("STS-B/dev.tsv", "sentence1\tsentence2\tscore\na\tb\thigh\n", "'high' is not a number"),
        ("STS-B/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t7\n", "7 is not between 0 and 5"),
    ],
)
def test_what_is_wrong_with_a_file_of_glue_is_said(example, glue_folder, file, text, message):
    (glue_folder / file).unlink()
    if text is not None:
        (glue_folder / file).write_text(text)
    data = example("glue_data")
    name = next(name for name, task in data.TASKS.items() if task.folder == file.split("/")[0])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load(str(glue_folder), name)


def test_the_hub_gives_the_same_examples(example, glue_folder, monkeypatch):
    data = example("glue_data")

    class Hub:
        @staticmethod
        def load_dataset(path, name):
            assert path == "nyu-mll/glue"
            task, found = data.TASKS[name], {}
            for split, examples in data.load(str(glue_folder), name).items():
                columns = dict(zip(task.hub or task.columns, examples.sentences, strict=True))
                found[split.replace("dev", "validation")] = {**columns, "label": examples.labels}
            return found

    expected = {name: data.load(str(glue_folder), name) for name in data.TASKS}
    monkeypatch.setattr(data.importlib, "import_module", lambda name: Hub)
    for name in data.TASKS:
        assert data.from_hub(name) == expected[name]


def test_without_the_package_of_the_hub_it_is_named(example, monkeypatch):
    data = example("glue_data")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(data.importlib, "import_module", missing)
    with pytest.raises(SystemExit, match="pip install datasets"):
        data.load("hub", "rte")


def test_metrics_are_those_of_the_libraries(example):
    metrics = example("glue_metrics")
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 60)
    predicted = np.where(generator.random(60) < 0.7, labels, 1 - labels)
    tp, fp = (predicted & labels).sum(), (predicted & (1 - labels)).sum()
    fn, tn = ((1 - predicted) & labels).sum(), ((1 - predicted) & (1 - labels)).sum()
    product = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    scores = generator.integers(0, 6, 60) / 2
    outputs = np.round(scores + generator.normal(size=60), 1)

    assert metrics.accuracy(predicted, labels) == pytest.approx(100 * (tp + tn) / 60)
    assert metrics.f1(predicted, labels) == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
    assert metrics.matthews(predicted, labels) == pytest.approx(100 * (tp * tn - fp * fn) / product)
    linear = scipy.stats.pearsonr(outputs, scores).statistic
    of_ranks = scipy.stats.spearmanr(outputs, scores).statistic
    assert metrics.pearson(outputs, scores) == pytest.approx(100 * linear)
    assert metrics.spearman(outputs, scores) == pytest.approx(100 * of_ranks)
    assert metrics.pearson_spearman(outputs, scores) == pytest.approx(50 * (linear + of_ranks))


def test_metrics_of_constant_answers_are_zero(example):
    metrics = example("glue_metrics")
    labels, constant = np.array([0, 1, 1]), np.zeros(3)
    for metric in (metrics.f1, metrics.matthews, metrics.pearson, metrics.spearman):
        assert metric(constant, labels) == 0.0


def test_glue_from_end_to_end_and_again(example, glue_folder, deberta, tmp_path, capsys):
    glue = example("glue")
    small = {"batch": 2, "learning_rates": [1e-2]}
    rows = [row(tmp_path / f"{name}.json", f"glue-{name}", **small) for name in ("lora", "scalora")]
    rows.append(row(tmp_path / "full.json", "glue-full", **small))
    output = tmp_path / "results" / "glue.json"
    command = [*rows, "--data", str(glue_folder), "--output", str(output), "--steps", "2"]
    command += ["--model", str(deberta), "--tasks", "stsb", "mnli", "--seeds", "0", "1"]

    assert glue.main(command) == 0
    printed = capsys.readouterr().out
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"]

    assert len(runs) == 3 * 2 * 2
    assert printed.count(": done") == len(runs)
    for run in runs:
        settings, details = run["settings"], run["details"]
        assert settings["model"] == "deberta"
        assert details["steps"] == 2
        assert list(run["scores"]) == [settings["task"]]
        assert details.get("rebasings") == (2 if settings["method"] == "scalora" else None)
    assert {"dev_matched", "dev_mismatched"} <= set(runs[-1]["details"])
    for expected in ("88.98", "88.13", "88.25", "STS-B (correlation)", "│     2 │"):
        assert expected in printed
    assert f"Not the rows' own settings: --seeds 0 1, --steps 2, --model {deberta.name}" in printed

    # One run was broken off.
    output.write_text(json.dumps({"runs": runs[:-1]}))
    assert glue.main(command) == 0
    again = capsys.readouterr().out
    assert again.count(": done") == 1
    assert again.count("already") == len(runs) - 1
    repeated = json.loads(output.read_text(encoding="utf-8"))["runs"]
    assert repeated[-1]["scores"] == runs[-1]["scores"]
    assert again.split("Scores")[1] == printed.split("Scores")[1]


def test_a_row_that_leaves_out_a_task_is_refused_before_any_run(example, glue_folder, tmp_path):
    path = row(tmp_path / "row.json", "glue-lora", epochs={"rte": 3})
    command = [path, "--data", str(glue_folder), "--output", str(tmp_path / "results.json")]
    with pytest.raises(SystemExit, match="LoRA: epochs says nothing of the task 'cola'"):
        example("glue").main(command)
