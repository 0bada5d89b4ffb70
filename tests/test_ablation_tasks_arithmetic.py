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


def core(problem):
    """The numbers and operations of a question, without its words."""
    added = {"found": "+", "won": "+", "lost": "-", "sold": "-"}
    numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
    signs = [added[verb] for verb in re.findall("found|won|lost|sold", problem.question)]
    return (*numbers, *signs)


def test_answers_are_the_results_of_both_steps():
    for problem in problems("train", 300):
        a, b, c, one, two = core(problem)
        first = a + b if one == "+" else a - b
        second = first + c if two == "+" else first - c
        assert [int(part[::-1]) for part in problem.answer.split()] == [first, second]
        assert min(first, second) >= 0
        assert problem.answer.endswith("\n")


def test_problems_of_pretraining_are_right():
    asked = list(islice(one_step_problems(seed=0), 1000))
    bare = [problem for problem in asked if problem.question.endswith("=")]
    assert 0.7 < len(bare) / len(asked) < 0.9
    for problem in bare:
        a, sign, b = re.fullmatch(r"(\d\d)([+-])(\d)=", problem.question).groups()
        first = int(a[::-1])
        assert int(problem.answer[::-1]) == (first + int(b) if sign == "+" else first - int(b))
    for problem in set(asked) - set(bare):
        a, verb, b = re.fullmatch(
            r"[A-Z][a-z]+ has (\d) \w+ and (\w+) (\d): ", problem.question
        ).groups()
        result = int(a) + int(b) if verb == "gets" else int(a) - int(b)
        assert int(problem.answer[::-1]) == result


def test_no_numbers_and_operations_are_on_two_sides():
    train = {core(problem) for problem in problems("train", 4000)}
    validation = {core(problem) for problem in problems("validation", 400)}
    test = {core(problem) for problem in problems("test", 400)}
    assert not (train & validation or train & test or validation & test)
    assert min(len(validation), len(test)) > 50


def test_loss_is_on_the_bytes_of_the_answer_alone():
    tokens, labels = tokens_of([Problem("2, 3: ", "5 8\n"), Problem("1: ", "1 2\n")])
    assert bytes(tokens[0].tolist()) == b"2, 3: 5 8\n"
    assert bytes(labels[0][labels[0] >= 0].tolist()) == b"5 8\n"
    assert bytes(labels[1][labels[1] >= 0].tolist()) == b"1 2\n"
    assert labels[0].tolist().count(-100) == 6
    tokens, labels = stream_of([Problem("2+3=", "50\n"), Problem("1+1=", "20\n")])
    assert bytes(tokens.tolist()) == b"2+3=50\n1+1=20\n"
    assert bytes(labels[labels >= 0].tolist()) == b"50\n20\n"


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("91 51\n", True),
        ("00 51\n", True),  # what is asked for is the last number
        ("91 5\n", False),
        ("91 15\n", False),
        ("91 51 \n", True),
        ("91 51", False),  # not ended
        ("\n", False),
        ("", False),
    ],
)
def test_an_answer_is_graded_by_its_last_number(written, right):
    assert is_right(Problem("", "91 51\n"), written) is right


def test_a_model_s_own_answers_are_read_to_the_first_line_end():
    questions = ["Ann: ", "a longer question: "]
    assert answers(Writer("91 51\n7"), questions) == ["91 51\n"] * 2
    assert answers(Writer("123456789"), questions) == ["12345678"] * 2


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
