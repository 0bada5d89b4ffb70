"""From texts to tokens and back: what is trained on, options by likelihood, generated answers."""

from collections.abc import Iterator, Sequence
from typing import Any

import commonsense_records
import torch
from commonsense_records import Record
from commonsense_tasks import Question
from torch import Tensor

IGNORED = -100  # the label of tokens that are not trained on, as transformers has it
NEW_TOKENS = 32


def encode(
    tokenizer: Any, prompt: str, continuation: str, max_length: int, end: bool = False
) -> dict[str, list[int]]:
    """Return tokens and labels; only the continuation, and the end of the text, has labels.

    Both are tokenized in one, since a tokenizer may treat the beginning of a text differently.
    What is too long loses the beginning of its prompt.
    """
    before = len(tokenizer(prompt)["input_ids"])
    tokens = tokenizer(prompt + continuation)["input_ids"]
    if end:
        tokens = [*tokens, tokenizer.eos_token_id]
    labels = [IGNORED] * before + tokens[before:]
    tokens, labels = tokens[-max_length:], labels[-max_length:]
    return {"input_ids": tokens, "labels": labels, "attention_mask": [1] * len(tokens)}


def right_option(tokenizer: Any, question: Question, max_length: int) -> dict[str, list[int]]:
    """Return what a question teaches."""
    return encode(tokenizer, *question.options[question.answer], max_length)


def response(tokenizer: Any, record: Record, max_length: int) -> dict[str, list[int]]:
    """Return what a record teaches, with the end that stops generation."""
    return encode(tokenizer, record.prompt, record.response, max_length, end=True)


def option_accuracy(
    model: Any, tokenizer: Any, questions: Sequence[Question], max_length: int, batch: int
) -> dict[str, float]:
    """Return the share, in percent, of questions whose right option is the most likely one.

    "sum": by the log-likelihood of all of an option's tokens; "a byte": by that for a byte of it.
    """
    options = [option for question in questions for option in question.options]
    encoded = [encode(tokenizer, *option, max_length) for option in options]
    likelihoods = torch.cat(list(log_likelihoods(model, tokenizer, encoded, batch)))
    sizes = torch.tensor([len(continuation.strip().encode()) for _, continuation in options])
    counts = [len(question.options) for question in questions]
    right = torch.tensor([question.answer for question in questions])

    def accuracy(scores: Tensor) -> float:
        chosen = torch.stack([part.argmax() for part in scores.split(counts)])
        return 100 * (chosen == right).double().mean().item()

    return {"sum": accuracy(likelihoods), "a byte": accuracy(likelihoods / sizes)}


@torch.no_grad()
def log_likelihoods(
    model: Any, tokenizer: Any, encoded: Sequence[dict[str, list[int]]], batch: int
) -> Iterator[Tensor]:
    """Yield the log-likelihood of each continuation given its prompt, in nats: (batch,)."""
    model.eval()
    for start in range(0, len(encoded), batch):
        inputs = padded(tokenizer, encoded[start : start + batch], model.device)
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        row, position = (labels != IGNORED).nonzero(as_tuple=True)
        predicted = logits[row, position].float().log_softmax(-1)  # only these in float32
        of_token = predicted.gather(-1, labels[row, position, None]).squeeze(-1)
        sums = torch.zeros(len(labels), device=labels.device).index_add(0, row, of_token)
        yield sums.double().cpu()


def padded(
    tokenizer: Any, encoded: Sequence[dict[str, list[int]]], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return a batch, padded on the right: (sequences, tokens)."""
    longest = max(len(sequence["input_ids"]) for sequence in encoded)
    fill = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED, "attention_mask": 0}
    return {
        name: torch.tensor(
            [s[name] + [value] * (longest - len(s[name])) for s in encoded], device=device
        )
        for name, value in fill.items()
    }


@torch.no_grad()
def generated_accuracy(
    model: Any, tokenizer: Any, records: Sequence[Record], task: str, batch: int, beams: int
) -> dict[str, float]:
    """Return the shares, in percent, of right answers and of texts that hold no answer at all."""
    model.eval()
    found = []
    for start in range(0, len(records), batch):
        prompts = [record.prompt for record in records[start : start + batch]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        outputs = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=NEW_TOKENS,
            num_beams=beams,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :])
        found += [commonsense_records.extract(text, task) for text in texts]
    right = sum(answer == record.answer for answer, record in zip(found, records, strict=True))
    return {"right": 100 * right / len(found), "no answer": 100 * found.count(None) / len(found)}
