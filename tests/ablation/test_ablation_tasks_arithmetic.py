import re
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scalora.ablation.tasks import arithmetic, task_of
from scalora.ablation.tasks.arithmetic import Arithmetic, answers, is_right
from scalora.ablation.tasks.byte_llama import ByteLlama
from scalora.ablation.tasks.word_problems import (
    Problem,
    one_step_problems,
    stream_of,
    tokens_of,
    two_step_problems,
)


class Writer(nn.Module):
    """Writes a fixed text after each question's colon, one byte at a time."""

    def __init__(self, text):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.text = text.encode()

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 256)
        for row, tokens in enumerate(input_ids.tolist()):
            start = tokens.index(ord(":")) + 1
            for i, byte in enumerate(self.text):
                if start + i < len(tokens):
                    logits[row, start + i, byte] = 1
        return SimpleNamespace(logits=logits)


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "_SHAPE", ByteLlama(32, 32, layers=1, heads=2))
    monkeypatch.setattr(Arithmetic, "pretraining_steps", 3)
    task = task_of("arithmetic")
    task.prepare(tmp_path)
    return task


def problems(split, count, seed=0):
    return list(islice(two_step_problems(seed, split), count))


SIGNS = {
    **dict.fromkeys(("found", "made", "got", "drew"), "+"),
    **dict.fromkeys(("sold", "gave", "ate", "broke"), "-"),
}


def core(problem):
    """The numbers and operations of a question, without its words and other things."""
    first, thing, told = re.fullmatch(
        r"[A-Z][a-z]+ had (\d) (\w+), (.*): ", problem.question
    ).groups()
    steps = [clause.split() for clause in told.split(", ")]
    others = [clause for clause in steps if clause[2:]]
    assert len(steps) - len(others) == 2
    assert [thing] not in [clause[2:] for clause in others]
    (one, b), (two, c) = (clause for clause in steps if not clause[2:])
    return int(first), SIGNS[one], int(b), SIGNS[two], int(c)


def step(a, sign, b):
    return a + b if sign == "+" else a - b


def test_answers_are_chains_of_both_steps():
    for problem in problems("train", 300):
        a, one, b, two, c = core(problem)
        first = step(a, one, b)
        second = step(first, two, c)
        assert problem.answer == f"{a}{one}{b}={first}{two}{c}={second}\n"
        assert min(first, second) >= 0


def test_half_of_the_problems_tell_of_another_thing_anywhere():
    told = [problem.question.split(", ")[1:] for problem in problems("train", 600)]
    more = [clauses for clauses in told if len(clauses) == 3]
    assert 0.4 < len(more) / len(told) < 0.6
    assert {len(clauses) for clauses in told} == {2, 3}
    assert {[len(clause.split()) for clause in clauses].index(3) for clauses in more} == {0, 1, 2}


def test_problems_of_pretraining_are_right():
    asked = list(islice(one_step_problems(seed=0), 1000))
    bare = [problem for problem in asked if problem.question.endswith("=")]
    assert 0.65 < len(bare) / len(asked) < 0.85
    for problem in bare:
        a, sign, b = re.fullmatch(r"(\d+)([+-])(\d)=", problem.question).groups()
        assert problem.answer == f"{step(int(a), sign, int(b))}\n"
    for problem in set(asked) - set(bare):
        a, verb, b = re.fullmatch(
            r"[A-Z][a-z]+ had (\d) \w+, (\w+) (\d): ", problem.question
        ).groups()
        sign = "+" if verb in ("found", "won") else "-"
        assert problem.answer == f"{a}{sign}{b}={step(int(a), sign, int(b))}\n"


def test_pretraining_has_every_step_that_a_chain_can_have():
    bare = {problem.question for problem in islice(one_step_problems(seed=0), 60_000)}
    for split in ("train", "validation", "test"):
        for problem in problems(split, 1000):
            a, one, b, two, c = core(problem)
            assert {f"{a}{one}{b}=", f"{step(a, one, b)}{two}{c}="} <= bare


def test_no_numbers_and_operations_are_on_two_sides():
    train = {core(problem) for problem in problems("train", 4000)}
    validation = {core(problem) for problem in problems("validation", 400)}
    test = {core(problem) for problem in problems("test", 400)}
    assert not (train & validation or train & test or validation & test)
    assert min(len(validation), len(test)) > 50


def test_loss_is_on_the_bytes_of_the_answer_alone():
    tokens, labels = tokens_of([Problem("2, 3: ", "2+3=5\n"), Problem("1: ", "1\n")])
    assert bytes(tokens[0].tolist()) == b"2, 3: 2+3=5\n"
    assert bytes(labels[0][labels[0] >= 0].tolist()) == b"2+3=5\n"
    assert bytes(labels[1][labels[1] >= 0].tolist()) == b"1\n"
    assert labels[0].tolist().count(-100) == 6
    tokens, labels = stream_of([Problem("2+3=", "5\n"), Problem("9+9=", "18\n")])
    assert bytes(tokens.tolist()) == b"2+3=5\n9+9=18\n"
    assert bytes(labels[labels >= 0].tolist()) == b"5\n18\n"


def test_a_piece_of_the_text_of_pretraining_begins_with_a_problem(monkeypatch):
    lines = [Problem(f"{number}=", "\n") for number in range(60)]
    monkeypatch.setattr(arithmetic, "one_step_problems", lambda seed: iter(lines))
    tokens, _ = next(arithmetic._one_step_batches(0, 60))
    assert tokens.shape == (16, 64)
    for row in tokens.tolist():
        numbers = [int(number) for number in re.findall(r"(\d+)=", bytes(row).decode())]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert bytes(row).startswith(f"{numbers[0]}=\n".encode())


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("9+7=16-4=12\n", True),
        ("9+7=15-4=12\n", True),  # what is asked for is the last number
        ("12=12\n", True),
        ("9+7=16-4=2\n", False),
        ("9+7=16-4=112\n", False),
        ("9+7=16\n", False),
        ("9+7=16-4=12", False),  # not ended
        ("\n", False),
        ("", False),
    ],
)
def test_an_answer_is_graded_by_its_last_number(written, right):
    assert is_right(Problem("", "9+7=16-4=12\n"), written) is right


def test_a_model_s_own_answers_are_read_to_the_first_line_end():
    questions = ["Ann: ", "a longer question: "]
    assert answers(Writer("9+1=10\n7"), questions) == ["9+1=10\n"] * 2
    longest = max(len(problem.answer) for problem in problems("train", 4000))
    endless = answers(Writer("1234567890" * 3), questions)
    assert endless == [("1234567890" * 3)[: len(endless[0])]] * 2
    assert len(endless[0]) >= longest


def test_what_is_written_is_what_the_model_finds_likeliest(task):
    model = task.model(seed=0)
    asked = [problem.question for problem in problems("test", 5)]
    together = answers(model, asked)
    assert together == [answers(model, [question])[0] for question in asked]


def test_the_loss_falls_and_every_seed_has_its_batches(task):
    first, again, other = (list(task.batches(seed, 3)) for seed in (1, 1, 2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0][:, :20], other[0][0][:, :20])
    model = task.model(seed=0)
    before, source = task.score(model, "validation"), task.source_loss(model)
    assert before.keys() == {"loss", "accuracy"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in task.batches(seed=0, steps=40):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    after = task.score(model, "validation", quick=True)
    assert after.keys() == {"loss"}
    assert after["loss"] < 0.6 * before["loss"]
    assert task.source_loss(model) != source
    assert len(task.probes()) == 4
