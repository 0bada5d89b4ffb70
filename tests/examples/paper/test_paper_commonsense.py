"""Commonsense reasoning: its files, its scores, and the script from end to end."""

import json

import pytest
import torch
from paper_inputs import row, save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def test_published_files_become_questions_with_options(example, commonsense_folder):
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


def test_records_are_prompted_and_their_answers_found_again(example, commonsense_folder):
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
