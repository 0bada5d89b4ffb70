"""What is passed in error is refused by its own name, in a line, with what to do instead."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import miub
import scalora
from examples.benchmark import __main__ as scalora_benchmark
from examples.benchmark.miub import __main__ as miub_benchmark
from miub import cli as miub_command
from scalora import options
from scalora.fold import ROUNDINGS
from scalora.moments import moments_of
from scalora.options import RebasingKeywords, RebasingOptions

# Every way to pass options


def keywords(callable: Any) -> dict[str, Any]:
    """Keyword-only arguments that are options, by name -> (annotation, default)."""
    found = inspect.signature(callable, eval_str=True).parameters.values()
    return {
        p.name: (p.annotation, p.default)
        for p in found
        if p.kind is p.KEYWORD_ONLY and p.name not in ("lr", "resume_from")
    }


@pytest.mark.parametrize(
    "callable", [scalora.ScaLoRA, scalora.create_scalora_optimizer, scalora.ScaLoRACallback]
)
def test_options_have_one_list_of_names_types_and_defaults(callable: Any) -> None:
    types = typing.get_type_hints(RebasingKeywords)
    found = keywords(callable)
    assert {name: annotation for name, (annotation, _) in found.items()} == types
    assert {name: default for name, (_, default) in found.items()} == {
        option.name: option.default for option in dataclasses.fields(RebasingOptions)
    }


def test_callback_takes_those_options_for_a_type_checker_too() -> None:
    [extra] = [
        p
        for p in inspect.signature(scalora.ScaLoRACallback.__init__).parameters.values()
        if p.kind is p.VAR_KEYWORD
    ]
    assert extra.annotation == "Unpack[RebasingKeywords]"
    assert set(typing.get_args(options.Rounding)) == set(ROUNDINGS)


@pytest.mark.slow
def test_type_checker_sees_options_that_are_misspelt_or_of_another_type(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, scalora\n"
        "def make(m: torch.nn.Module, o: torch.optim.Optimizer) -> None:\n"
        "    scalora.ScaLoRACallback(intervall=3)\n"
        "    scalora.ScaLoRACallback(interval='3')\n"
        "    scalora.ScaLoRACallback(rule='exakt')\n"
        "    scalora.create_scalora_optimizer(m, torch.optim.SGD, lr=1.0, accumulator='dens')\n"
        "    scalora.ScaLoRA(o, m, rounding='up')\n"
        "    scalora.ScaLoRACallback(rule='exact', interval=3)\n"
        "    scalora.create_scalora_optimizer(m, torch.optim.SGD, lr=1.0, momentum=0.9)\n"
        f"# {tmp_path}\n"  # of one content, mypy would repeat what it said of another run's file
    )
    root = Path(scalora.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml")]
    found = subprocess.run([*command, str(script)], capture_output=True, text=True, cwd=root)
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    assert [line.split(":")[1] for line in errors] == ["3", "4", "5", "6", "7"], found.stdout


# What the chosen rule ignores

IGNORED: list[tuple[dict[str, Any], str]] = [
    ({"rule": "exact", "memory": 50}, "rule='exact' ignores memory=50.*'auto'"),
    ({"rule": "direction", "lipschitz": 1.0}, "rule='direction' ignores lipschitz=1.0.*'exact'"),
    ({"rule": "none", "lipschitz": "auto"}, "rule='none' ignores lipschitz='auto'"),
    ({"lipschitz": 1.0}, "rule='auto' ignores lipschitz=1.0"),
    ({"rule": "none", "bound": 10.0}, "rule='none' ignores bound=10.0.*'exact'"),
    ({"rule": "none", "interval": 10}, "rule='none' ignores interval=10"),
    ({"rule": "none", "accumulator": "carry"}, "rule='none' ignores accumulator='carry'"),
    ({"rule": "none", "rounding": "nearest"}, "rule='none' ignores rounding='nearest'"),
    ({"rule": "none", "carry_rank": 8}, "rule='none' ignores carry_rank=8"),
    ({"rule": "none", "when_full": "hold"}, "rule='none' ignores when_full='hold'"),
    ({"rule": "none", "carry_tolerance": 0.1}, "rule='none' ignores carry_tolerance=0.1"),
    ({"rule": "none", "calibration": 10}, "rule='none' ignores calibration=10"),
    ({"accumulator": "dense", "carry_rank": 8}, "accumulator='dense' ignores carry_rank=8"),
    ({"accumulator": "dense", "when_full": "hold"}, "accumulator='dense' ignores when_full"),
    ({"accumulator": "dense", "carry_tolerance": 0.1}, "accumulator='dense' ignores carry_tol"),
    ({"accumulator": "carry", "rounding": "compensated"}, "accumulator='carry' ignores rounding"),
]


@pytest.mark.parametrize("given, message", IGNORED, ids=[str(given) for given, _ in IGNORED])
def test_option_that_would_make_no_difference_is_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RebasingOptions(**given)


def test_every_option_is_known_to_be_a_rules_own_or_of_all_rules() -> None:
    names = {option.name for option in dataclasses.fields(RebasingOptions)}
    assert set(options._RULES_OF) <= names
    assert names - set(options._RULES_OF) == {"rule", "adapter_name", "seed"}


@pytest.mark.parametrize("rule", typing.get_args(options.Rule))
def test_defaults_and_a_seed_are_taken_by_every_rule(rule: Any) -> None:
    defaults = dataclasses.asdict(RebasingOptions())
    RebasingOptions(**{**defaults, "rule": rule, "seed": 3, "adapter_name": "other"})


def test_options_of_a_carry_that_may_come_are_taken() -> None:
    RebasingOptions(accumulator="auto", carry_rank=8, rounding="compensated")


# Names, kinds and places of arguments


def perceptron() -> Any:
    torch.manual_seed(0)
    return models.with_lora(models.Perceptron(), target_modules=["first", "second"])


MODEL = perceptron()
SGD = torch.optim.SGD(models.trainable(MODEL), lr=0.1)
OPTIMIZER = scalora.ScaLoRA(SGD, MODEL)
create = scalora.create_scalora_optimizer


class Around(torch.optim.Optimizer):
    """As accelerate has a ScaLoRA inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "misspelt, callback": (
        lambda: scalora.ScaLoRACallback(intervall=50),
        TypeError,
        "ScaLoRACallback has no option 'intervall'. Did you mean 'interval'",
    ),
    "misspelt, MIUB's callback": (
        lambda: miub.MIUBCallback(tokns=50),
        TypeError,
        "MIUBCallback has no option 'tokns'. Did you mean 'tokens'",
    ),
    "misspelt, factory": (
        lambda: create(MODEL, torch.optim.SGD, lr=1.0, intervall=5),
        TypeError,
        "'intervall' is an option neither of ScaLoRA nor of SGD. Did you mean 'interval'",
    ),
    "misspelt option of the inner optimizer": (
        lambda: create(MODEL, torch.optim.SGD, lr=1.0, momentun=0.9),
        TypeError,
        "'momentun'.*Did you mean 'momentum'",
    ),
    "misspelt, like nothing": (
        lambda: create(MODEL, torch.optim.SGD, lr=1.0, xyzzy=0.9),
        TypeError,
        r"'xyzzy' is an option neither of ScaLoRA nor of SGD\.$",
    ),
    "misspelt value": (
        lambda: scalora.ScaLoRACallback(rule="exakt"),
        ValueError,
        "rule='exakt' is not one of.*Did you mean 'exact'",
    ),
    "swapped": (lambda: scalora.ScaLoRA(MODEL, SGD), TypeError, "are swapped"),
    "swapped, factory": (
        lambda: create(torch.optim.SGD, MODEL, lr=1.0),
        TypeError,
        "model and optimizer_cls are swapped",
    ),
    "class": (
        lambda: scalora.ScaLoRA(torch.optim.SGD, MODEL),
        TypeError,
        r"is the class SGD.*create_scalora_optimizer\(model, SGD",
    ),
    "made, factory": (lambda: create(MODEL, SGD, lr=1.0), TypeError, "not its class: pass SGD"),
    "parameters": (
        lambda: scalora.ScaLoRA(MODEL.parameters(), MODEL),
        TypeError,
        "optimizer is an object of type generator",
    ),
    "model for an optimizer": (
        lambda: scalora.ScaLoRA(MODEL, MODEL),
        TypeError,
        "optimizer is an object of type PeftModel, not a torch.optim.Optimizer",
    ),
    "model for a class": (
        lambda: create(MODEL, MODEL, lr=1.0),
        TypeError,
        "optimizer_cls is an object of type PeftModel",
    ),
    "no model": (lambda: scalora.ScaLoRA(SGD, None), TypeError, "model is None, not a torch.nn"),
    "no model, factory": (
        lambda: create([MODEL], torch.optim.SGD, lr=1.0),
        TypeError,
        "model is an object of type list",
    ),
    "model for a number": (
        lambda: scalora.ScaLoRACallback(interval=MODEL),
        TypeError,
        "interval=an object of type PeftModel must be an integer",
    ),
    "model for a choice": (
        lambda: scalora.ScaLoRACallback(accumulator=MODEL),
        ValueError,
        "accumulator=an object of type PeftModel is not one of",
    ),
    "tensor for a number": (
        lambda: scalora.ScaLoRACallback(rule="exact", bound=torch.ones(99)),
        TypeError,
        "bound=an object of type Tensor must be a number",
    ),
    "text for a number": (
        lambda: scalora.ScaLoRACallback(rule="exact", bound="high"),
        TypeError,
        "bound='high' must be a number",
    ),
    "text for a seed": (lambda: scalora.ScaLoRACallback(seed="x"), TypeError, "seed='x'"),
    "number for a name": (
        lambda: scalora.ScaLoRACallback(adapter_name=3),
        TypeError,
        "adapter_name=3 must be a string",
    ),
    "model for a period": (
        lambda: miub.MIUBCallback(MODEL),
        TypeError,
        "every=an object of type PeftModel must be a number of steps",
    ),
    "model for a class to register": (
        lambda: scalora.register_moments(MODEL, {}),
        TypeError,
        "optimizer_class is an object of type PeftModel",
    ),
    "swapped, save_merged": (
        lambda: scalora.save_merged("out", MODEL),
        TypeError,
        r"save_merged\(model, ...\) got 'out', not a torch.nn.Module",
    ),
    "swapped, save_adapter": (
        lambda: scalora.save_adapter("out", MODEL),
        TypeError,
        r"save_adapter\(model, ...\) got 'out'",
    ),
    "optimizer for a model": (
        lambda: scalora.save_adapter(OPTIMIZER, "out"),
        TypeError,
        "got an object of type ScaLoRA",
    ),
    "optimizer for a model, spectrum": (
        lambda: scalora.delta_spectrum(OPTIMIZER),
        TypeError,
        r"delta_spectrum\(model, ...\) got an object of type ScaLoRA",
    ),
    "optimizer for a model, rank": (
        lambda: scalora.effective_rank(OPTIMIZER),
        TypeError,
        r"effective_rank\(model, ...\) got an object of type ScaLoRA",
    ),
    "swapped, load_rebased_weights": (
        lambda: scalora.load_rebased_weights("out", MODEL),
        TypeError,
        r"load_rebased_weights\(model, ...\) got 'out'",
    ),
    "swapped, save_training_state": (
        lambda: scalora.save_training_state("out", OPTIMIZER),
        TypeError,
        r"save_training_state\(optimizer, folder\) got 'out', not a ScaLoRA",
    ),
    "model for an optimizer, load_training_state": (
        lambda: scalora.load_training_state(MODEL, "out"),
        TypeError,
        "got an object of type PeftModel, not a ScaLoRA",
    ),
    "optimizer of accelerate": (
        lambda: scalora.save_training_state(Around(OPTIMIZER), "out"),
        TypeError,
        "type Around, not a ScaLoRA. It is around one: pass its .optimizer",
    ),
}


@pytest.mark.parametrize("call, error, message", WRONG.values(), ids=WRONG.keys())
def test_wrong_argument_is_named_in_a_line(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    assert "RebasingOptions" not in str(caught.value)


def test_numpys_numbers_are_numbers() -> None:
    options = RebasingOptions(rule="exact", bound=np.float32(8), lipschitz=np.float64(2))
    assert options.bound == 8 and options.lipschitz == 2


# Optimizers of which nothing can be registered


def adafactor_of_transformers() -> torch.optim.Optimizer:
    return transformers.Adafactor(models.trainable(perceptron()), lr=1e-3, relative_step=False)


def bitsandbytes_lamb() -> torch.optim.Optimizer:
    return pytest.importorskip("bitsandbytes").optim.LAMB(models.trainable(perceptron()), lr=0.1)


def torchao_adam() -> torch.optim.Optimizer:
    return pytest.importorskip("torchao.optim").AdamW8bit(models.trainable(perceptron()), lr=0.1)


IMPOSSIBLE: dict[str, tuple[Callable[[], torch.optim.Optimizer], str]] = {
    "transformers' Adafactor": (
        adafactor_of_transformers,
        "factored. Use torch.optim.Adafactor.*optimizer_cls_and_kwargs",
    ),
    "LBFGS": (lambda: torch.optim.LBFGS([nn.Parameter(torch.ones(2))]), "torch.optim.AdamW"),
    "bitsandbytes' LAMB": (bitsandbytes_lamb, "norms of whole parameters.*bitsandbytes.optim"),
    "torchao's 8 bits": (torchao_adam, "codes.*adamw_bnb_8bit"),
}


@pytest.mark.parametrize("make, message", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_optimizer_that_cannot_be_registered_is_not_told_to_be(
    make: Callable[[], torch.optim.Optimizer], message: str
) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        moments_of(make())
    assert "register_moments" not in str(caught.value)


class Answering(nn.Module):
    """As a Trainer expects it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = perceptron()

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": models.loss(self.model, inputs)}


def trainer(folder: Path, callback: Any, **options: Any) -> transformers.Trainer:
    args = transformers.TrainingArguments(
        str(folder),
        **{"max_steps": 2, "use_cpu": True, "save_strategy": "no", "report_to": [], **options},
    )
    data: Any = [{"inputs": row} for row in models.vectors(16, 12)]
    return transformers.Trainer(Answering(), args, train_dataset=data, callbacks=[callback])


def test_what_is_advised_in_place_of_a_trainers_adafactor_trains(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="optimizer_cls_and_kwargs"):
        trainer(tmp_path, scalora.ScaLoRACallback(rule="exact"), optim="adafactor").train()
    callback = scalora.ScaLoRACallback(rule="exact")
    working = trainer(tmp_path, callback)
    working.optimizer_cls_and_kwargs = (torch.optim.Adafactor, {"lr": 1e-2})
    working.train()
    assert callback.optimizer is not None
    assert type(callback.optimizer.inner) is torch.optim.Adafactor
    assert callback.optimizer.rebase_count == 2


# Folders and devices


@pytest.mark.parametrize("kind", ["missing", "file", "without"])
def test_folder_is_missing_before_a_file_in_it_is(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    message = r"the folder '.*checkpoint-5' does not exist: nothing was loaded"
    if kind == "file":
        folder.write_text("")
        message = r"the folder '.*checkpoint-5' is not a folder"
    if kind == "without":
        folder.mkdir()
        message = "checkpoint-5 has no scalora.safetensors, which ScaLoRACallback"
    with pytest.raises(ValueError, match=message):
        scalora.load_training_state(OPTIMIZER, folder)
    with pytest.raises(ValueError, match=message):
        scalora.load_rebased_weights(MODEL, folder)


def test_folder_to_write_to_is_to_be_made_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*new' does not exist: make it first"):
        scalora.save_training_state(OPTIMIZER, tmp_path / "new")


def test_folder_to_resume_from_is_missing_and_no_other_is_taken(tmp_path: Path) -> None:
    trainer(
        tmp_path, scalora.ScaLoRACallback(rule="exact"), save_strategy="steps", save_steps=1
    ).train()
    callback = scalora.ScaLoRACallback(rule="exact", resume_from=str(tmp_path / "checkpoint-7"))
    again = trainer(tmp_path, callback, max_steps=3)
    with pytest.raises(ValueError, match=r"checkpoint-7' does not exist.*resume_from"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def _scalora_benchmark(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "step", "--device", device])
    scalora_benchmark.main()


def _miub_benchmark(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "cost", "--device", device])
    miub_benchmark.main()


def _miub(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    miub_command.main(["--model", "m", "--adapter", "a", "--text", "t", "--device", device])


def _example(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    pytest.importorskip("bitsandbytes")
    import qlora

    qlora.parse(["--device", device])


@pytest.mark.parametrize("device", ["cuda:99", "cdua", "meta"])
@pytest.mark.parametrize("command", [_scalora_benchmark, _miub_benchmark, _miub, _example])
def test_device_that_is_not_here_is_refused_by_the_command_line(
    command: Callable[[pytest.MonkeyPatch, str], None],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, device)
    assert stopped.value.code == 2
    assert f"argument --device: '{device}'" in capsys.readouterr().err.splitlines()[-1]
