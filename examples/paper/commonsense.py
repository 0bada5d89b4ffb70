"""Fine-tune LLaMA on commonsense reasoning as rows of the ScaLoRA paper's table, and print both.

    python commonsense.py configurations/llama3-*.json --data DATA
    python commonsense.py configurations/llama3-scalora.json --data DATA --base nf4 --interval 10

With protocol "options" every task is trained on its own, in the files that it is published in,
and answered by the most likely option. With "records" one model learns LLM-Adapters' mixture of
all tasks, and its generated answers are read. Every run is added to --output when it is done, and
is not done again. README.md says where each setting comes from.
"""

import logging
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

# They say on import which optional kernels they lack, and what of torch they still use.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)

import commonsense_records as records
import commonsense_scoring as scoring
import commonsense_tasks as tasks
import paper_options
import paper_training
import torch
import transformers
from paper_configuration import Configuration
from paper_results import Results, print_table
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

MIXTURE = "mixture"

# What is trained together -> what of it is learned, and what each task is examined with.
Data = dict[str, tuple[list[Any], dict[str, list[Any]]]]


def load(args: Any, protocol: str | None) -> Data:
    """Return a protocol's data by what is trained together."""
    folder = Path(args.data)
    if protocol == "records":
        examined = {task: records.held_out(folder, task) for task in args.tasks}
        return {MIXTURE: (records.training(folder), examined)}
    loaded = {task: tasks.load(folder, task) for task in args.tasks}
    return {task: (train, {task: held_out}) for task, (train, held_out) in loaded.items()}


def plan(
    rows: list[Configuration], data: dict[str | None, Data]
) -> Iterator[tuple[Configuration, dict[str, Any]]]:
    """Yield every run's row and settings."""
    for row in rows:
        for trained, (train, examined) in data[row.protocol].items():
            for rate in row.of("learning_rates", trained):
                for seed in row.seeds:
                    settings = row.settings(trained, rate, seed)
                    yield row, {**settings, "training_examples": len(train), "on": [*examined]}


def run(
    row: Configuration, settings: dict[str, Any], data: Data
) -> tuple[dict[str, float], dict[str, Any]]:
    """Train once; return every task's score, and everything else that was measured."""
    train, examined = data[settings["task"]]
    tokenizer = AutoTokenizer.from_pretrained(row.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    learned = scoring.response if row.protocol == "records" else scoring.right_option
    encoded = [learned(tokenizer, example, settings["max_length"]) for example in train]

    transformers.set_seed(settings["seed"])  # draws the adapter
    base = AutoModelForCausalLM.from_pretrained(row.model, **paper_training.loading(row))
    model = paper_training.adapted(base, row, "CAUSAL_LM")
    collate = partial(scoring.padded, tokenizer)
    _, details = paper_training.train(model, row, settings, encoded, collate)
    scores = {}
    for task, held_out in examined.items():
        scores[task], details[task] = examine(model, tokenizer, held_out, task, row, settings)
    return scores, details


def examine(
    model: Any,
    tokenizer: Any,
    held_out: list[Any],
    task: str,
    row: Configuration,
    settings: dict[str, Any],
) -> tuple[float, dict[str, float]]:
    """Return a task's score and what else was measured with it."""
    batch = row.micro_batch or row.batch
    device = model.device.type
    with torch.autocast(device, torch.bfloat16, enabled=paper_training.on_gpu()):
        if row.protocol == "records":
            found = scoring.generated_accuracy(model, tokenizer, held_out, task, batch, row.beams)
            return found["right"], found
        longest = settings["max_length"]
        found = scoring.option_accuracy(model, tokenizer, held_out, longest, batch)
        return found["sum"], found


def main(argv: list[str] | None = None) -> int:
    args, rows = paper_options.parse(__doc__, "commonsense", tasks.TASKS, argv)
    console = Console(soft_wrap=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        results = Results(args.output)
        data = {protocol: load(args, protocol) for protocol in {row.protocol for row in rows}}
        planned = list(plan(rows, data))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    runs: dict[str, list[Any]] = {row.row: [] for row in rows}
    for row, settings in planned:
        what = f"{row.row}, {{task}}, lr {{learning_rate:g}}, seed {{seed}}".format(**settings)
        if results.find(settings) is None:
            results.add(settings, *run(row, settings, data[row.protocol]))
            paper_training.release()
            console.print(f"{what}: done")
        else:
            console.print(f"{what}: in {args.output.name} already")
        runs[row.row].append(results.find(settings))
    titles = {name: task.title for name, task in tasks.TASKS.items()}
    print_table(rows, runs, titles, paper_options.changes(args), console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
