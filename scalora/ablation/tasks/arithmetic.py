"""A small language model that knows sums and learns to solve problems of two steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from scalora.ablation.task import Split, Task
from scalora.ablation.tasks.byte_llama import (
    ByteLlama,
    Pair,
    language_loss,
    pretrained_once,
)
from scalora.ablation.tasks.evaluation import evaluating
from scalora.ablation.tasks.word_problems import (
    Problem,
    one_step_problems,
    stream_of,
    tokens_of,
    two_step_problems,
)

_SHAPE = ByteLlama(width=96, intermediate=256, layers=3, spread=0.08)
_BATCH, _BYTES = 16, 64
_ANSWER = 12
"""Bytes after which an unended answer is cut."""


class Arithmetic(Task):
    """A 3-layer Llama of width 96 over bytes, from problems of one step to problems of two.

    It is pretrained on sums and differences, bare (``16-4=`` and then ``12``) and in words (``Ann
    had 9 pens, found 7: `` and then ``9+7=16``). These are all the steps that a chain of two can
    have. It learns to answer ``Ian had 9 eggs, found 7, broke 5 toys, sold 4: `` with the chain
    ``9+7=16-4=12``; half of the problems do not mention another thing. Loss is on the bytes of the
    answer alone. Names, things and six of the eight words for operations differ from those of
    pretraining. No problem of the validation or test split has the numbers and operations of a
    training problem.

    Scores: ``accuracy``, the share of 400 problems where the model's own greedy answer ends on the
    right number; and ``loss``, nats per byte of the answers (``quick``: the loss on 100 problems).
    """

    name = "arithmetic"
    metric = "accuracy"
    lower_is_better = False
    steps = 600
    short_steps = 150
    learning_rates = (2e-3, 5e-3, 1e-2, 2e-2, 6e-2)
    rank = 4

    pretraining_steps: ClassVar[int] = 1500
    """Batches of 16 x 64 bytes of problems of one step, at a learning rate of 3e-3."""

    def prepare(self, cache: Path) -> None:
        """Pretrain on problems of one step, once."""
        batches = list(islice(_one_step_batches(0, 60_000), self.pretraining_steps))
        self._weights = pretrained_once(cache, _SHAPE, batches, learning_rate=3e-3)

    def model(self, seed: int) -> nn.Module:
        """Return the pretrained model; nothing in it is drawn by the seed."""
        model = _SHAPE.build()
        model.load_state_dict(self._weights)
        return model

    def batches(self, seed: int, steps: int) -> Iterator[Pair]:
        """Yield bytes and labels of 16 problems, (16, longest) each."""
        problems = two_step_problems(1000 + seed, "train")
        for _ in range(steps):
            yield tokens_of(list(islice(problems, _BATCH)))

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        """Return the mean loss of the answers' bytes, () nats."""
        return language_loss(model, *batch)

    def score(self, model: nn.Module, split: Split, *, quick: bool = False) -> dict[str, float]:
        """Return loss, nats per byte of the answers, and the share of right answers."""
        problems = self._problems[split][: 100 if quick else None]
        with evaluating(model):
            loss = language_loss(model, *tokens_of(problems)).item()
        if quick:
            return {"loss": loss}
        written = answers(model, [problem.question for problem in problems])
        right = sum(map(is_right, problems, written))
        return {"loss": loss, "accuracy": right / len(problems)}

    def source_loss(self, model: nn.Module) -> float:
        """Return the loss, nats per byte of the answers, on other problems of one step."""
        with evaluating(model):
            losses = [
                language_loss(model, *batch) for batch in islice(_one_step_batches(1, 2_000), 10)
            ]
            return torch.stack(losses).mean().item()

    def probes(self) -> list[Pair]:
        """Return four batches of validation problems."""
        problems = self._problems["validation"]
        return [tokens_of(problems[i : i + _BATCH]) for i in range(0, 4 * _BATCH, _BATCH)]

    @cached_property
    def _problems(self) -> dict[str, list[Problem]]:
        return {
            split: list(islice(two_step_problems(0, split), 400))
            for split in ("validation", "test")
        }


def _one_step_batches(seed: int, problems: int) -> Iterator[Pair]:
    """Yield bytes and labels, (16, 64) each, of pieces of a text of problems, without end.

    Every piece begins with a problem, as the later questions do.

    Args:
        seed: seed of the problems and of the pieces.
        problems: number of problems in the text.
    """
    tokens, labels = stream_of(list(islice(one_step_problems(seed), problems)))
    begins = (tokens[:-_BYTES] == ord("\n")).nonzero() + 1
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = begins[torch.randint(0, len(begins), (_BATCH,), generator=generator)]
        piece = starts + torch.arange(_BYTES)
        yield tokens[piece], labels[piece]


def is_right(problem: Problem, written: str) -> bool:
    """Return whether an answer ends, and on the right number after its last ``=``."""
    ended = written.endswith("\n")
    return ended and written.rpartition("=")[2] == problem.answer.rpartition("=")[2]


def answers(model: nn.Module, questions: list[str]) -> list[str]:
    """Return the model's greedy answer to each question, up to its first line end.

    Each question is followed by the bytes written so far and then by zeros, which a causal model
    does not see. So all questions are answered in one batch, and the few bytes need no cache.
    """
    device = next(model.parameters()).device
    asked = [question.encode() for question in questions]
    ends = torch.tensor([len(question) for question in asked], device=device)
    tokens = torch.zeros(len(asked), int(ends.max()) + _ANSWER, dtype=torch.long)
    for row, question in enumerate(asked):
        tokens[row, : len(question)] = torch.tensor(list(question))
    tokens = tokens.to(device)
    rows = torch.arange(len(asked), device=device)
    with evaluating(model):
        for written in range(_ANSWER):
            logits = model(input_ids=tokens).logits
            tokens[rows, ends + written] = logits[rows, ends + written - 1].argmax(-1)
    texts = [
        bytes(row[end : end + _ANSWER].tolist()).decode("utf-8", "replace")
        for row, end in zip(tokens.cpu(), ends.tolist(), strict=True)
    ]
    return [text[: text.find("\n") + 1] or text for text in texts]
