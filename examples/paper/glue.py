"""Fine-tune DeBERTaV3-base on GLUE as rows of the ScaLoRA paper's table, and print both.

    python glue.py configurations/glue-*.json --data GLUE
    python glue.py configurations/glue-scalora.json --data hub --tasks rte mrpc --seeds 0

Every run (a row, a task, a learning rate, a seed) is added to --output when it is done, and is
not done again. README.md says where each setting comes from.
"""

import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

# They say on import which optional kernels they lack, and what of torch they still use.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)

import glue_data as data
import numpy as np
import paper_options
import paper_training
import transformers
from glue_data import TASKS, Examples, Task
from paper_configuration import Configuration
from paper_results import Results, print_table
from rich.console import Console
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

Splits = dict[str, Examples]


def plan(
    rows: list[Configuration], tasks: list[str], splits: dict[str, Splits]
) -> Iterator[tuple[Configuration, dict[str, Any]]]:
    """Yield every run's row and settings."""
    for row in rows:
        for task in tasks:
            for rate in row.of("learning_rates", task):
                for seed in row.seeds:
                    settings = row.settings(task, rate, seed)
                    settings["training_examples"] = len(splits[task]["train"].labels)
                    yield row, settings


def run(
    row: Configuration, settings: dict[str, Any], splits: Splits
) -> tuple[dict[str, float], dict[str, Any]]:
    """Train once; return the score of the paper's table, and everything else that was measured."""
    name = settings["task"]
    task = TASKS[name]
    transformers.set_seed(settings["seed"])  # draws the head and the adapter
    tokenizer = AutoTokenizer.from_pretrained(row.model)
    encoded = {
        split: encode(examples, tokenizer, settings["max_length"])
        for split, examples in splits.items()
    }
    model = paper_training.adapted(classifier(row, task), row, "SEQ_CLS")
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trainer, details = paper_training.train(model, row, settings, encoded["train"], collate)
    for split in task.dev:
        outputs = trainer.predict(encoded[split]).predictions
        details[split] = score(task, outputs, splits[split].labels)
    first = next(iter(task.metrics))
    return {name: details[task.dev[0]][first]}, details


def encode(examples: Examples, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Return one set of inputs for each example, not padded yet."""
    encoded = tokenizer(*examples.sentences, truncation=True, max_length=max_length)
    return [
        {"label": label, **{name: values[i] for name, values in encoded.items()}}
        for i, label in enumerate(examples.labels)
    ]


def classifier(row: Configuration, task: Task) -> transformers.PreTrainedModel:
    """Return the pretrained model with a new head; one output is a regression."""
    kind = "single_label_classification" if task.labels else "regression"
    config = AutoConfig.from_pretrained(row.model, num_labels=task.outputs, problem_type=kind)
    if row.classifier_dropout is not None:
        config.cls_dropout = row.classifier_dropout
    return AutoModelForSequenceClassification.from_pretrained(
        row.model, config=config, **paper_training.loading(row)
    )


def score(task: Task, outputs: np.ndarray, labels: list[Any]) -> dict[str, float]:
    """Return all of a task's metrics of its outputs, (examples, classes) or (examples, 1)."""
    predicted = outputs.argmax(-1) if task.labels else outputs.reshape(-1)
    return {name: metric(predicted, np.array(labels)) for name, metric in task.metrics.items()}


def main(argv: list[str] | None = None) -> int:
    args, rows = paper_options.parse(__doc__, "glue", TASKS, argv)
    console = Console(soft_wrap=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        results = Results(args.output)
        splits = {task: data.load(args.data, task) for task in args.tasks}
        planned = list(plan(rows, args.tasks, splits))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    runs: dict[str, list[Any]] = {row.row: [] for row in rows}
    for row, settings in planned:
        what = f"{row.row}, {{task}}, lr {{learning_rate:g}}, seed {{seed}}".format(**settings)
        if results.find(settings) is None:
            results.add(settings, *run(row, settings, splits[settings["task"]]))
            paper_training.release()
            console.print(f"{what}: done")
        else:
            console.print(f"{what}: in {args.output.name} already")
        runs[row.row].append(results.find(settings))
    labels = {name: f"{task.title} ({next(iter(task.metrics))})" for name, task in TASKS.items()}
    print_table(rows, runs, labels, paper_options.changes(args), console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
