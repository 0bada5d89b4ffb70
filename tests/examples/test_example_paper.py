import importlib
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PAPER = Path(__file__).parents[2] / "examples" / "paper"
ROWS = PAPER / "configurations"

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

CHOICES = {
    "question": {
        "stem": "What is hot?",
        "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}],
    },
    "answerKey": "2",
}
PIQA = {"goal": "To cut", "sol1": "knife", "sol2": "spoon"}
SIQA = {"context": "Al fell.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c"}
HELLASWAG = {
    "activity_label": "Dancing",
    "ctx_a": "A man [header] runs.",
    "ctx_b": "he",
    "endings": ["falls.", "jumps [step] up.", "sits.", "sings."],
    "label": 1,
}
WINOGRANDE = {"sentence": "The _ is big.", "option1": "cat", "option2": "ox", "answer": "2"}
BOOLQ = {"question": "is it so", "title": "It", "answer": True, "passage": "It is so."}
PUBLISHED = {
    "boolq": {"train.jsonl": BOOLQ, "dev.jsonl": {**BOOLQ, "answer": False}},
    "piqa": {"train.jsonl": PIQA, "valid.jsonl": PIQA},
    "social_i_qa": {"train.jsonl": SIQA, "dev.jsonl": SIQA},
    "hellaswag": {"hellaswag_train.jsonl": HELLASWAG, "hellaswag_val.jsonl": HELLASWAG},
    "winogrande": {"train_xl.jsonl": WINOGRANDE, "dev.jsonl": WINOGRANDE},
    "ARC-Easy": {"ARC-Easy-Train.jsonl": CHOICES, "ARC-Easy-Test.jsonl": CHOICES},
    "ARC-Challenge": {"ARC-Challenge-Train.jsonl": CHOICES, "ARC-Challenge-Test.jsonl": CHOICES},
    "openbookqa": {"train.jsonl": CHOICES, "test.jsonl": CHOICES},
}
LABELS = {
    "piqa": {"train-labels.lst": "0", "valid-labels.lst": "1"},
    "social_i_qa": {"train-labels.lst": "3", "dev-labels.lst": "1"},
}
ANSWERS = {
    "boolq": "true",
    "piqa": "solution2",
    "social_i_qa": "answer3",
    "hellaswag": "ending4",
    "winogrande": "option1",
    "ARC-Easy": "answer5",
    "ARC-Challenge": "answer1",
    "openbookqa": "answer2",
}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))
    return importlib.import_module


@pytest.fixture
def glue_folder(tmp_path):
    for folder, splits in GLUE.items():
        (tmp_path / "GLUE" / folder).mkdir(parents=True)
        for split, text in splits.items():
            path = tmp_path / "GLUE" / folder / f"{split}.tsv"
            path.write_bytes(text.encode("utf-8"))
    return tmp_path / "GLUE"


@pytest.fixture
def commonsense_folder(tmp_path):
    """Both formats, two records a file."""
    root = tmp_path / "commonsense"
    records = []
    for folder, files in PUBLISHED.items():
        (root / folder).mkdir(parents=True)
        for name, record in files.items():
            (root / folder / name).write_text(2 * (json.dumps(record) + "\n"))
        for name, label in LABELS.get(folder, {}).items():
            (root / folder / name).write_text(2 * f"{label}\n")
        answer = ANSWERS[folder]
        output = f"the correct answer is {answer}"
        records.append(dict(instruction=f"{folder}?", input="", output=output, answer=answer))
        (root / folder / "test.json").write_text(json.dumps(records[-1:] * 2))
    (root / "commonsense_170k.json").write_text(json.dumps(records))
    return root


def save_tokenizer(folder, pairs):
    """A token a byte; with pairs, [CLS] a [SEP] b [SEP]."""
    special = ["<pad>", "</s>", "[CLS]", "[SEP]"]
    signs = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    return len(signs)


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


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder, pairs=False),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def row(path, name, **changes):
    """One of the rows, with other settings of ours."""
    content = json.loads((ROWS / f"{name}.json").read_text(encoding="utf-8"))
    for setting, value in changes.items():
        section = next((s for s in content.values() if setting in s), content["ours"])
        section[setting] = value
    path.write_text(json.dumps(content))
    return str(path)


# The rows


def test_every_row_is_valid_and_its_scores_have_the_average_that_it_reports(example):
    load = example("paper_configuration").load
    found = {path.stem: load(path) for path in sorted(ROWS.glob("*.json"))}

    assert len(found) == 11
    assert len({(r.benchmark, r.row) for r in found.values()}) == 11
    for name in ("lora", "scalora", "full"):
        reported = dict(found[f"glue-{name}"].reported)
        average = reported.pop("average")
        assert len(reported) == 8
        assert statistics.fmean(reported.values()) == pytest.approx(average, abs=0.0051)
        assert found[f"glue-{name}"].rank == (None if name == "full" else 4)
    assert found["llama3-lora-r32"].rank == 32
    assert found["llama3-scalora-interval10"].rebasing["interval"] == 10
    ranks = {r.rank for name, r in found.items() if "llama" in name and "r32" not in name}
    assert ranks == {8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interval": 0}, "interval"),
        ({"rule": "best"}, "rule"),
        ({"method": "dora"}, "'dora' is not one of lora, scalora, full"),
        ({"method": "lora"}, "'lora' does not re-base: no interval, rule"),
        ({"rank": None}, "needs rank"),
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [-1.0]}, "-1.0 is not a positive"),
        ({"seeds": []}, "seeds"),
        ({"batch": 2.5}, "batch"),
        ({"micro_batch": 5}, "no multiple of micro_batch"),
        ({"base": "int3"}, "'int3' is not one of"),
        ({"ranks": 4}, "'ranks' is not a setting; did you mean 'rank'"),
    ],
)
def test_a_wrong_row_is_refused_by_name(example, tmp_path, capsys, changes, message):
    path = row(tmp_path / "wrong.json", "glue-scalora", **changes)
    with pytest.raises(SystemExit, match="2"):
        example("glue").main([path, "--data", str(tmp_path)])
    printed = " ".join(capsys.readouterr().err.split())
    assert "wrong.json" in printed
    assert message in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "the sections paper, reflora, ours"),
        ('{"ours": {"rank": 4}, "paper": {"rank": 4}}', "'rank' is in two sections"),
        ('{"ours": {"rank": 4}}', "missing: row, benchmark, model"),
    ],
)
def test_a_file_that_is_no_row_is_refused(example, tmp_path, text, message):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        example("paper_configuration").load(path)


def test_rows_of_another_benchmark_and_missing_files_are_refused(example, tmp_path, capsys):
    for path, message in ((ROWS / "llama3-lora.json", "not of glue"), (tmp_path / "no", "No such")):
        with pytest.raises(SystemExit, match="2"):
            example("glue").main([str(path), "--data", str(tmp_path)])
        assert message in " ".join(capsys.readouterr().err.split())


# GLUE


def test_every_file_of_glue(example, glue_folder):
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


def test_metrics_of_constant_answers(example):
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


def test_a_file_that_holds_no_results_is_not_overwritten(example, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"notes\.json: not a file of results"):
        example("paper_results").Results(path)
    assert path.read_text() == "[1, 2]"


def test_one_learning_rate_is_chosen_for_what_was_trained_together(example):
    best = example("paper_results").best

    def run(task, rate, **scores):
        return {"settings": {"task": task, "learning_rate": rate}, "scores": scores}

    together = [run("mixture", 0.1, a=90.0, b=10.0), run("mixture", 0.2, a=60.0, b=60.0)]
    assert best(together) == {"a": (0.2, [60.0]), "b": (0.2, [60.0])}
    apart = [run("a", 0.1, a=90.0), run("a", 0.2, a=60.0), run("a", 0.1, a=70.0)]
    assert best([*apart, run("b", 0.2, b=5.0)]) == {"a": (0.1, [90.0, 70.0]), "b": (0.2, [5.0])}


def test_the_average_is_of_all_tasks_or_not_given(example):
    average = example("paper_results").average
    found = {"a": (0.1, [90.0, 70.0]), "b": (0.2, [5.0])}
    assert average(found, ["a", "b"]) == ("42.50", "", "1", "")
    assert not any(average(found, ["a", "b", "c"]))


def test_missing_data_end_the_scripts_with_a_message(example, tmp_path):
    for script, name, missing in (
        ("glue", "glue-lora", "CoLA/train.tsv"),
        ("commonsense", "llama3-lora", "boolq/train.jsonl"),
    ):
        command = [str(ROWS / f"{name}.json"), "--data", str(tmp_path)]
        with pytest.raises(SystemExit, match=f"{missing} is not in --data"):
            example(script).main([*command, "--output", str(tmp_path / "results.json")])


def test_a_row_that_leaves_out_a_task_is_refused_before_any_run(example, glue_folder, tmp_path):
    path = row(tmp_path / "row.json", "glue-lora", epochs={"rte": 3})
    command = [path, "--data", str(glue_folder), "--output", str(tmp_path / "results.json")]
    with pytest.raises(SystemExit, match="LoRA: epochs says nothing of the task 'cola'"):
        example("glue").main(command)


# Commonsense reasoning


def test_questions_of_the_published_files(example, commonsense_folder):
    tasks = example("commonsense_tasks")
    found = {name: tasks.load(commonsense_folder, name) for name in tasks.TASKS}
    held_out = {name: questions[0] for name, (_, questions) in found.items()}

    boolq = held_out["boolq"]
    assert boolq.options[1] == ("It is so.\nQuestion: is it so?\nAnswer:", " yes")
    assert (boolq.answer, found["boolq"][0][0].answer) == (0, 1)
    assert (held_out["piqa"].answer, found["piqa"][0][0].answer) == (1, 0)
    assert held_out["siqa"].options[0] == ("Question: Al fell. Why?\nAnswer:", " a")
    assert (held_out["siqa"].answer, found["siqa"][0][0].answer) == (0, 2)
    assert held_out["hellaswag"].options[1] == ("Dancing: A man runs. He", " jumps up.")
    assert held_out["winogrande"].options == [("The cat", " is big."), ("The ox", " is big.")]
    for name in ("winogrande", "arc_easy", "arc_challenge", "obqa"):
        assert held_out[name].answer == 1
    assert held_out["obqa"].options[1] == ("Question: What is hot?\nAnswer:", " fire")


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("boolq", "boolq/dev.jsonl", None, "boolq/dev.jsonl is not in --data"),
        ("boolq", "boolq/dev.jsonl", "", "has no questions"),
        ("boolq", "boolq/dev.jsonl", "{", "line 1: not JSON"),
        ("boolq", "boolq/dev.jsonl", '{"answer": 1}', "'answer' is 1, not true or false"),
        ("boolq", "boolq/dev.jsonl", '{"answer": true}', "line 1: no field 'passage'; it has"),
        ("piqa", "piqa/valid-labels.lst", None, "valid-labels.lst is not in --data"),
        ("piqa", "piqa/valid-labels.lst", "0", "line 2: valid-labels.lst has only 1 labels"),
        ("piqa", "piqa/valid-labels.lst", "0 1 0", "has 3 labels, more than questions"),
        ("piqa", "piqa/valid-labels.lst", "0 2", "line 2: the label 2 is none of the 2 options"),
        ("siqa", "social_i_qa/dev-labels.lst", "A B", "dev-labels.lst: invalid literal"),
        (
            "winogrande",
            "winogrande/dev.jsonl",
            json.dumps({**WINOGRANDE, "answer": ""}),
            "the answer '' is not one of 1, 2",
        ),
        (
            "winogrande",
            "winogrande/dev.jsonl",
            json.dumps({**WINOGRANDE, "sentence": "No gap."}),
            "no gap",
        ),
        (
            "obqa",
            "openbookqa/test.jsonl",
            json.dumps({**CHOICES, "answerKey": "D"}),
            "openbookqa/test.jsonl, line 1: the answer 'D' is not one of 1, 2",
        ),
    ],
)
def test_what_is_wrong_with_published_files_is_said(
    example, commonsense_folder, name, file, text, message
):
    (commonsense_folder / file).unlink()
    if text is not None:
        (commonsense_folder / file).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        example("commonsense_tasks").load(commonsense_folder, name)


def test_records_and_their_prompts(example, commonsense_folder):
    records = example("commonsense_records")
    training = records.training(commonsense_folder)
    assert len(training) == 8
    assert training[0].response == "the correct answer is true"
    assert training[0].prompt.endswith("### Instruction:\nboolq?\n\n### Response:\n")
    assert "### Input:\nmore\n\n### Response:\n" in records.prompt("do", "more")
    for name in records.TASKS:
        for record in records.held_out(commonsense_folder, name):
            assert records.extract(record.response, name) == record.answer


@pytest.mark.parametrize(
    ("generated", "task", "answer"),
    [
        ("the correct answer is true</s> false", "boolq", "true"),
        ("solution2, not solution1", "piqa", "solution2"),
        ("answer4", "arc_easy", "answer4"),
        ("ending5", "hellaswag", None),
        ("True", "boolq", None),
        ("", "winogrande", None),
    ],
)
def test_the_first_of_the_words_is_the_answer(example, generated, task, answer):
    assert example("commonsense_records").extract(generated, task) == answer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "boolq/test.json is not in --data"),
        ("{", "not JSON"),
        ("{}", "expected a list of records"),
        ('[{"instruction": "?"}]', "record 0: no 'output' or 'answer'"),
        (
            '[{"instruction": "?", "output": "", "answer": "yes"}]',
            "record 0: the answer 'yes' is not one of true, false",
        ),
    ],
)
def test_what_is_wrong_with_records_is_said(example, commonsense_folder, text, message):
    path = commonsense_folder / "boolq" / "test.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        example("commonsense_records").held_out(commonsense_folder, "boolq")


def test_only_the_answer_is_trained_on(example, llama):
    scoring = example("commonsense_scoring")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)

    encoded = scoring.encode(tokenizer, "Is it?", " yes", 64, end=True)
    assert tokenizer.decode(encoded["input_ids"]) == "Is it? yes</s>"
    learned = [label for label in encoded["labels"] if label != scoring.IGNORED]
    assert tokenizer.decode(learned) == " yes</s>"
    assert encoded["labels"][:6] == [scoring.IGNORED] * 6

    cut = scoring.encode(tokenizer, "Is it?", " yes", 6)
    assert tokenizer.decode(cut["input_ids"]) == "t? yes"
    assert cut["labels"] == [scoring.IGNORED] * 2 + cut["input_ids"][2:]

    batch = scoring.padded(tokenizer, [encoded, cut])
    assert batch["input_ids"][1, 6:].eq(tokenizer.pad_token_id).all()
    assert batch["labels"][1, 6:].eq(scoring.IGNORED).all()
    assert batch["attention_mask"].sum(1).tolist() == [11, 6]


def test_likelihoods_of_options_are_those_of_one_after_another(example, llama):
    scoring, tasks = example("commonsense_scoring"), example("commonsense_tasks")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    options = [("a question:", " yes"), ("a question:", " certainly not"), ("b", " c")]
    expected = []
    for prompt, continuation in options:
        ids = torch.tensor([tokenizer(prompt + continuation)["input_ids"]])
        logs = model(ids).logits[0].log_softmax(-1)
        start = len(tokenizer(prompt)["input_ids"])
        expected.append(sum(logs[i - 1, ids[0, i]] for i in range(start, ids.shape[1])).item())
    encoded = [scoring.encode(tokenizer, *option, 64) for option in options]
    found = torch.cat(list(scoring.log_likelihoods(model, tokenizer, encoded, batch=2)))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)

    likeliest = max(range(2), key=lambda i: expected[i])
    questions = [tasks.Question(options[:2], likeliest), tasks.Question(options[:2], 1 - likeliest)]
    assert scoring.option_accuracy(model, tokenizer, questions, 64, 2)["sum"] == 50.0
    by_byte = max(range(2), key=lambda i: expected[i] / len(options[i][1].strip()))
    right = tasks.Question(options[:2], by_byte)
    assert scoring.option_accuracy(model, tokenizer, [right], 64, 2)["a byte"] == 100.0


def test_commonsense_from_end_to_end_and_again(
    example, commonsense_folder, llama, tmp_path, capsys
):
    commonsense = example("commonsense")
    small = {"batch": 2, "micro_batch": 1, "seeds": [0], "learning_rates": [1e-2]}
    names = ("lora", "scalora", "scalora-interval10")
    rows = [row(tmp_path / f"{name}.json", f"llama3-{name}", **small) for name in names]
    output = tmp_path / "results.json"
    command = [*rows, "--data", str(commonsense_folder), "--output", str(output)]
    command += ["--model", str(llama), "--base", "float32", "--steps", "2"]
    command += ["--tasks", "boolq", "winogrande", "obqa"]

    assert commonsense.main(command) == 0
    printed = capsys.readouterr().out
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"]
    assert len(runs) == 3 * 3
    rebasings = [run["details"].get("rebasings") for run in runs[::3]]
    assert rebasings == [None, 2, 0]
    for expected in ("77.85", "77.57", "76.83", "--base float32"):
        assert expected in printed

    assert commonsense.main(command) == 0
    again = capsys.readouterr().out
    assert again.count("already") == len(runs)
    assert again.split("Scores")[1] == printed.split("Scores")[1]


@pytest.mark.filterwarnings("ignore:the carry of")
def test_records_on_a_base_in_4_bits(example, commonsense_folder, llama, tmp_path, capsys):
    """One run learns all tasks; --interval holds where the row re-bases."""
    small = {"batch": 2, "micro_batch": 2, "seeds": [0], "learning_rates": [1e-2]}
    small |= {"max_length": 300, "beams": 2}
    names = ("lora", "scalora")
    rows = [row(tmp_path / f"{name}.json", f"llama3-{name}", **small) for name in names]
    output = tmp_path / "results.json"
    command = [*rows, "--data", str(commonsense_folder), "--output", str(output)]
    command += ["--model", str(llama), "--base", "nf4", "--steps", "2", "--interval", "2"]
    command += ["--protocol", "records"]

    assert example("commonsense").main([*command, "--tasks", "boolq", "piqa"]) == 0
    assert "--interval 2, --base nf4, --protocol records" in capsys.readouterr().out
    plain, rebased = json.loads(output.read_text(encoding="utf-8"))["runs"]
    assert rebased["settings"]["task"] == "mixture"
    assert set(rebased["scores"]) == {"boolq", "piqa"}
    assert set(rebased["details"]["boolq"]) == {"right", "no answer"}
    assert (plain["settings"]["interval"], rebased["settings"]["interval"]) == (None, 2)
    assert rebased["details"]["rebasings"] == 1


@pytest.mark.slow
def test_answers_that_were_learned_are_generated_and_read(
    example, commonsense_folder, llama, tmp_path
):
    """From labels to words: a tiny model that has learned eight answers by heart gives them all."""
    adapter = dict.fromkeys(("rank", "alpha", "target_modules"))
    small = {"method": "full", "batch": 8, "micro_batch": 8, "seeds": [0], "learning_rates": [3e-3]}
    small |= {"warmup_steps": 5, "max_length": 400, "protocol": "records"}
    path = row(tmp_path / "full.json", "llama3-lora", **adapter, **small)
    output = tmp_path / "results.json"
    command = [path, "--data", str(commonsense_folder), "--output", str(output)]
    command += ["--model", str(llama), "--base", "float32", "--steps", "250"]

    assert example("commonsense").main(command) == 0
    [run] = json.loads(output.read_text(encoding="utf-8"))["runs"]
    assert set(run["scores"].values()) == {100.0}
