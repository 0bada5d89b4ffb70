"""A run that was killed goes on as if it had not been; a file that does not fit is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import scalora
from scalora import files
from scalora.saving.training_state_file import TrainingStateFile

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone")

STEPS, STOP = 14, 6
FILE = "scalora.safetensors"
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Run:
    """A kind of training run, reproducible from its pretrained weights and the step's number."""

    base: Callable[[], nn.Module] = models.Perceptron
    inputs: Callable[[int], Tensor] = lambda step: models.vectors(16, 12) * (1 + step / 10)
    dtype: torch.dtype = torch.float32
    targets: tuple[str, ...] = ("first", "second")
    r: int = 3
    lora: tuple[tuple[str, Any], ...] = ()
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    options: tuple[tuple[str, Any], ...] = ()

    def pretrained(self) -> nn.Module:
        torch.manual_seed(5)
        return self.base().to(self.dtype)

    def model(self) -> Any:
        torch.manual_seed(6)
        base = self.pretrained()
        return models.with_lora(
            base, r=self.r, target_modules=list(self.targets), **dict(self.lora)
        )

    def optimizer_of(self, model: Any) -> scalora.ScaLoRA:
        inner = self.optimizer(models.trainable(model), lr=1e-2)
        return scalora.ScaLoRA(inner, model, **{"rule": "exact", **dict(self.options)})

    def losses(
        self, model: Any, optimizer: scalora.ScaLoRA, first: int = 0, last: int = STEPS
    ) -> list[float]:
        losses = []
        for step in range(first, last):
            inputs = self.inputs(step)
            inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs
            losses += models.train(model, optimizer, inputs, steps=1)
        return losses

    def checkpoint(self, folder: Path, at: int = STOP) -> list[float]:
        """Train, write a checkpoint at step ``at``, and train on: all losses."""
        model = self.model()
        optimizer = self.optimizer_of(model)
        losses = self.losses(model, optimizer, last=at)
        folder.mkdir(exist_ok=True)
        # In this order the base weights are in both files.
        scalora.save_training_state(optimizer, folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        model.save_pretrained(folder)
        return losses + self.losses(model, optimizer, first=at)

    def reloaded(self, folder: Path) -> tuple[Any, scalora.ScaLoRA]:
        """A new model with the checkpoint's factors alone, and a new optimizer for it."""
        model = PeftModel.from_pretrained(self.pretrained(), folder, is_trainable=True)
        self.put_base_back(model)
        return model, self.optimizer_of(model)

    def put_base_back(self, model: Any) -> None:
        """Take out the base weights that came with the adapter."""
        pretrained = self.pretrained().state_dict()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(".base_layer.weight"):
                    weight.copy_(pretrained[name[17:].replace(".base_layer", "")])


RUNS = {
    "float32": Run(),
    "float64": Run(dtype=torch.float64),
    "bfloat16, stochastic rounding": Run(dtype=torch.bfloat16),
    "bfloat16, compensated": Run(
        dtype=torch.bfloat16, options=(("rounding", "compensated"), ("seed", 7))
    ),
    "float16, stochastic rounding": Run(dtype=torch.float16, options=(("seed", 7),)),
    "every third step": Run(options=(("interval", 3),)),
    "every fourth step, stopped between two": Run(options=(("interval", 4),)),
    "nothing folded yet": Run(options=(("interval", STOP + 1),)),
    "paper's rule": Run(options=(("rule", "paper"),)),
    "direction rule": Run(options=(("rule", "direction"),)),
    "fixed Lipschitz constant": Run(options=(("lipschitz", 3.0),)),
    "no re-basing": Run(options=(("rule", "none"),)),
    "carry": Run(options=(("accumulator", "carry"),)),
    "SGD": Run(optimizer=torch.optim.SGD),
    "Adafactor": Run(optimizer=torch.optim.Adafactor),
    "DoRA": Run(lora=(("use_dora", True),)),
    "GPT-2": Run(
        base=models.gpt2,
        inputs=lambda step: (models.token_ids(6, 9) + step) % models.VOCABULARY,
        targets=("c_attn", "c_proj"),
        lora=(("fan_in_fan_out", True),),
    ),
    "embedding": Run(
        base=models.Embedder,
        inputs=lambda step: (models.token_ids(6, 9) + step) % models.VOCABULARY,
        targets=("tokens", "head"),
    ),
    "modules_to_save": Run(
        base=models.bert,
        inputs=lambda step: (models.token_ids(6, 9) + step) % models.VOCABULARY,
        targets=("query", "dense"),
        lora=(("modules_to_save", ["classifier"]),),
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_resumed_run_continues_to_the_same_bits(run: Run, tmp_path: Path) -> None:
    whole = run.checkpoint(tmp_path)
    model, optimizer = run.reloaded(tmp_path)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    scalora.load_training_state(optimizer, tmp_path)
    assert run.losses(model, optimizer, first=STOP) == whole[STOP:]


@pytest.mark.parametrize("name", ["float32", "bfloat16, compensated"])
def test_order_of_the_two_files_does_not_matter(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    whole = run.checkpoint(tmp_path)
    model, optimizer = run.reloaded(tmp_path)
    scalora.load_training_state(optimizer, tmp_path)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert run.losses(model, optimizer, first=STOP) == whole[STOP:]


@pytest.mark.parametrize("name", ["float32", "bfloat16, compensated"])
def test_models_full_state_dict_serves_as_well(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    model = run.model()
    optimizer = run.optimizer_of(model)
    run.losses(model, optimizer, last=STOP)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "both.pt")
    rest = run.losses(model, optimizer, first=STOP)

    model = run.model()
    optimizer = run.optimizer_of(model)
    weights, state = torch.load(tmp_path / "both.pt")
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert run.losses(model, optimizer, first=STOP) == rest


def test_saving_does_not_change_the_run(tmp_path: Path) -> None:
    run = RUNS["bfloat16, compensated"]
    model = run.model()
    assert run.losses(model, run.optimizer_of(model)) == run.checkpoint(tmp_path)


def test_schedule_in_numbers_of_numpy_can_be_saved(tmp_path: Path) -> None:
    run = Run(options=(("rule", "auto"),))
    model = run.model()
    optimizer = run.optimizer_of(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float32(0.5))
    run.losses(model, optimizer, 0, STOP)
    scalora.save_training_state(optimizer, tmp_path)
    scalora.load_training_state(optimizer, tmp_path)


def test_state_of_a_resumed_run_can_be_saved_again(tmp_path: Path) -> None:
    run = RUNS["bfloat16, compensated"]
    whole = run.checkpoint(tmp_path)
    for start in range(STOP, STOP + 3):
        model, optimizer = run.reloaded(tmp_path)
        optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        scalora.load_training_state(optimizer, tmp_path)
        assert run.losses(model, optimizer, first=start, last=start + 1) == [whole[start]]
        model.save_pretrained(tmp_path)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        assert scalora.save_training_state(optimizer, tmp_path) == tmp_path / FILE


def test_resumed_model_knows_that_it_was_rebased(tmp_path: Path) -> None:
    run = RUNS["float32"]
    run.checkpoint(tmp_path)
    model, optimizer = run.reloaded(tmp_path)
    scalora.load_training_state(optimizer, tmp_path)
    with pytest.raises(ValueError, match="pass base="):
        scalora.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(run.pretrained(), tmp_path / "saved")
    inputs = run.inputs(0)
    assert torch.equal(models.answers(loaded, inputs), models.answers(model, inputs))


def _assert_refused_without_a_trace(
    model: Any, optimizer: scalora.ScaLoRA, folder: Path, match: str
) -> None:
    bits, state = models.bits(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match):
        scalora.load_training_state(optimizer, folder)
    models.assert_same_bits(model, bits)
    assert _plain(optimizer.state_dict()) == _plain(state)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.double().tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _rewritten(
    folder: Path,
    change: Callable[[dict[str, Tensor], dict[str, Any]], None],
    *,
    checksum: bool = False,
) -> None:
    """Write the checkpoint's file again, readable but changed, with its old or a right checksum."""
    with safe_open(folder / FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    values = json.loads(metadata["scalora"])
    change(tensors, values)
    if checksum:
        TrainingStateFile.write(folder, tensors, values)
    else:
        save_file(tensors, folder / FILE, metadata={**metadata, "scalora": json.dumps(values)})


def _truncate(folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: len(whole) // 2])


def _cut_off_the_last_byte(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])


def _empty(folder: Path) -> None:
    (folder / FILE).write_bytes(b"")


def _garble_the_header(folder: Path) -> None:
    whole = bytearray((folder / FILE).read_bytes())
    whole[8:40] = b"\xff" * 32
    (folder / FILE).write_bytes(whole)


def _flip_a_bit_of_a_weight(folder: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        tensors["base:first"].view(torch.int32)[3, 4] ^= 1

    _rewritten(folder, change)


def _flip_a_bit_of_a_calibrated_constant(folder: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        tensors["measured:first"].view(torch.int64)[...] ^= 1

    _rewritten(folder, change)


def _leave_out_a_weight(folder: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        del tensors["base:second"]

    _rewritten(folder, change, checksum=True)


def _reshape_a_weight(folder: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        tensors["base:second"] = tensors["base:second"].T.contiguous()

    _rewritten(folder, change, checksum=True)


def _widen_a_weight(folder: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        tensors["base:second"] = tensors["base:second"].double()

    _rewritten(folder, change, checksum=True)


def _leave_out_the_metadata(folder: Path) -> None:
    save_file({"base:first": torch.zeros(2)}, folder / FILE)


def _replace_the_metadata(folder: Path) -> None:
    save_file({"base:first": torch.zeros(2)}, folder / FILE, metadata={"scalora": "{broken"})


def _without(key: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        del metadata[key]

    return lambda folder: _rewritten(folder, change, checksum=True)


def _of_another_version(version: int) -> Callable[[Path], None]:
    return lambda folder: _rewritten(
        folder, lambda tensors, metadata: metadata.update(version=version), checksum=True
    )


def _swap_two_weights(folder: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        tensors["base:first"][0, :2] = tensors["base:first"][0, [1, 0]]

    _rewritten(folder, change)


def _count_one_more_step(folder: Path) -> None:
    _rewritten(folder, lambda tensors, metadata: metadata.update(steps=metadata["steps"] + 1))


DAMAGES = {
    "cut in half": _truncate,
    "last byte missing": _cut_off_the_last_byte,
    "empty": _empty,
    "garbled header": _garble_the_header,
    "one bit flipped": _flip_a_bit_of_a_weight,
    "one bit of a constant flipped": _flip_a_bit_of_a_calibrated_constant,
    "two weights swapped": _swap_two_weights,
    "another step count": _count_one_more_step,
    "a weight missing": _leave_out_a_weight,
    "a weight of another shape": _reshape_a_weight,
    "a weight of another dtype": _widen_a_weight,
    "no metadata": _leave_out_the_metadata,
    "broken metadata": _replace_the_metadata,
    "no record of the adapter": _without("adapter"),
    "no record of the base": _without("base"),
    "no step count": _without("steps"),
    "no record of what was learned": _without("learned"),
    "no length of the step": _without("step_length"),
    "an older version": _of_another_version(3),
    "a newer version": _of_another_version(99),
    "missing": lambda folder: (folder / FILE).unlink(),
    "a folder": lambda folder: ((folder / FILE).unlink(), (folder / FILE).mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_file_is_refused_and_nothing_is_changed(
    damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    run = RUNS["float32"]
    run.checkpoint(tmp_path)
    damage(tmp_path)
    model, optimizer = run.reloaded(tmp_path)
    _assert_refused_without_a_trace(model, optimizer, tmp_path, match="scalora")


OTHERS = {
    "rank": (Run(r=2), "rank"),
    "rule": (Run(options=(("rule", "scalar"),)), "rule"),
    "seed": (Run(options=(("seed", 1),)), "seed"),
    "model": (Run(base=lambda: models.Perceptron(12, 20, 9)), "another model.*'second'"),
    "hidden size": (Run(base=lambda: models.Perceptron(12, 21, 8)), "another model.*'first'"),
    "layers": (Run(targets=("first",)), "second"),
}


@pytest.mark.parametrize("other, match", OTHERS.values(), ids=OTHERS.keys())
def test_state_of_another_kind_of_run_is_refused(other: Run, match: str, tmp_path: Path) -> None:
    RUNS["float32"].checkpoint(tmp_path)
    model = other.model()
    _assert_refused_without_a_trace(model, other.optimizer_of(model), tmp_path, match)


def test_state_of_a_base_in_another_precision_is_refused(tmp_path: Path) -> None:
    RUNS["float32"].checkpoint(tmp_path)
    model, optimizer = Run(dtype=torch.bfloat16).reloaded(tmp_path)
    _assert_refused_without_a_trace(model, optimizer, tmp_path, "float32.*'first'.*bfloat16")


@pytest.mark.parametrize("loaded", ["none", "a later one", "one that differs in lora_A alone"])
def test_adapter_of_another_checkpoint_is_refused(loaded: str, tmp_path: Path) -> None:
    run = RUNS["float32"]
    run.checkpoint(tmp_path)
    if loaded == "none":
        model = run.model()
        optimizer = run.optimizer_of(model)
    elif loaded == "a later one":
        (tmp_path / "later").mkdir()
        run.checkpoint(tmp_path / "later", at=STOP + 1)
        model, optimizer = run.reloaded(tmp_path / "later")
    else:
        model, optimizer = run.reloaded(tmp_path)
        with torch.no_grad():
            models.layer(model, "second").lora_A["default"].weight[0, 0] += 1e-3
    _assert_refused_without_a_trace(
        model, optimizer, tmp_path, match="adapter is not the one.*same checkpoint first"
    )


def test_optimizer_state_on_the_wrong_base_is_refused_at_the_first_step(tmp_path: Path) -> None:
    run = RUNS["float32"]
    whole = run.checkpoint(tmp_path)
    model, optimizer = run.reloaded(tmp_path)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    bits = models.bits(model)
    for _ in range(2):  # it stays refused
        with pytest.raises(ValueError, match=r"base weight of 'first'.*load_training_state"):
            run.losses(model, optimizer, first=STOP, last=STOP + 1)
        models.assert_same_bits(model, bits)
    scalora.load_training_state(optimizer, tmp_path)
    assert run.losses(model, optimizer, first=STOP) == whole[STOP:]


def test_accelerate_that_loads_a_state_again_does_not_make_other_weights_right(
    tmp_path: Path,
) -> None:
    run = RUNS["float32"]
    run.checkpoint(tmp_path)
    model, optimizer = run.reloaded(tmp_path)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    Accelerator(cpu=True).prepare(optimizer)  # loads its own state into it
    with pytest.raises(ValueError, match=r"base weight of 'first'.*load_training_state"):
        run.losses(model, optimizer, first=STOP, last=STOP + 1)


def test_optimizer_state_without_its_own_entry_begins_rebasing_anew(tmp_path: Path) -> None:
    run = RUNS["float32"]
    run.checkpoint(tmp_path)
    model, optimizer = run.reloaded(tmp_path)
    state = torch.load(tmp_path / "optimizer.pt")
    del state["scalora"]
    with pytest.warns(UserWarning, match="holds nothing of re-basing, which begins anew"):
        optimizer.load_state_dict(state)
    assert optimizer.rebase_count == 0
    run.losses(model, optimizer, first=STOP)
    assert optimizer.rebase_count == STEPS - STOP


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_model_alone_takes_up_what_was_folded_or_carried(run: Run, tmp_path: Path) -> None:
    model = run.model()
    optimizer = run.optimizer_of(model)
    run.losses(model, optimizer, last=STOP)
    model.save_pretrained(tmp_path)
    scalora.save_training_state(optimizer, tmp_path)
    inputs = run.inputs(0)
    inputs = inputs.to(run.dtype) if inputs.is_floating_point() else inputs
    loaded = PeftModel.from_pretrained(run.pretrained(), tmp_path)
    run.put_base_back(loaded)
    before = models.answers(loaded, inputs)
    scalora.load_rebased_weights(loaded, tmp_path)
    # The room that a carry has left is not saved, and with it the order of a sum.
    carried = ("accumulator", "carry") in run.options
    torch.testing.assert_close(
        models.answers(loaded, inputs),
        models.answers(model, inputs),
        rtol=0,
        atol=1e-6 if carried else 0,
    )
    if optimizer.rebase_count:
        assert (before - models.answers(loaded, inputs)).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["float32", "carry"])
def test_model_that_took_them_up_can_be_trained_on(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    whole = run.checkpoint(tmp_path)
    model = PeftModel.from_pretrained(run.pretrained(), tmp_path, is_trainable=True)
    scalora.load_rebased_weights(model, tmp_path)
    losses = run.losses(model, run.optimizer_of(model), first=STOP)
    # The first is before the first step; the moments begin anew after it.
    assert losses[0] == whole[STOP]
    assert losses[-1] < losses[0]


def test_carry_that_is_not_saved_is_emptied(tmp_path: Path) -> None:
    early = Run(options=(("accumulator", "carry"), ("interval", STOP + 1)))
    early.checkpoint(tmp_path)  # nothing carried yet
    model, _ = early.reloaded(tmp_path)
    expected = models.answers(model, early.inputs(0))
    run = RUNS["carry"]
    run.losses(model, run.optimizer_of(model), last=2)
    model.load_state_dict(early.reloaded(tmp_path)[0].state_dict())
    assert (models.answers(model, run.inputs(0)) - expected).abs().max() > 1e-3
    scalora.load_rebased_weights(model, tmp_path)
    torch.testing.assert_close(models.answers(model, run.inputs(0)), expected, rtol=0, atol=1e-6)


def _assert_model_refuses(model: Any, folder: Path, match: str) -> None:
    bits, answers = models.bits(model), models.answers(model, models.vectors(16, 12))
    with pytest.raises(ValueError, match=match):
        scalora.load_rebased_weights(model, folder)
    models.assert_same_bits(model, bits)
    assert torch.equal(models.answers(model, models.vectors(16, 12)), answers)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_model_alone_takes_nothing_of_a_damaged_file(
    damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    run = RUNS["float32"]
    run.checkpoint(tmp_path)
    damage(tmp_path)
    _assert_model_refuses(run.reloaded(tmp_path)[0], tmp_path, match="scalora")


def _flip_a_bit_in_the_adapters_file(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    tensors["base_model.model.first.base_layer.weight"].view(torch.int32)[3, 4] ^= 1
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})


def _leave_a_weight_out_of_the_adapters_file(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    del tensors["base_model.model.first.base_layer.weight"]
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_bit_in_the_adapters_file,
        _leave_a_weight_out_of_the_adapters_file,
        lambda folder: (folder / ADAPTER).unlink(),
    ],
    ids=["bit", "weight", "file"],
)
@pytest.mark.parametrize("alone", [False, True])
def test_base_weights_beside_the_adapter_are_checked_as_those_in_the_file(
    damage: Callable[[Path], Any], alone: bool, tmp_path: Path
) -> None:
    run = RUNS["float32"]
    model = run.model()
    optimizer = run.optimizer_of(model)
    run.losses(model, optimizer, last=STOP)
    model.save_pretrained(tmp_path)
    scalora.save_training_state(optimizer, tmp_path)
    assert not [name for name in load_file(tmp_path / FILE) if name.startswith("base:")]
    model, optimizer = run.reloaded(tmp_path)
    damage(tmp_path)
    if alone:
        _assert_model_refuses(model, tmp_path, match="damaged|lacks base weights")
    else:
        _assert_refused_without_a_trace(model, optimizer, tmp_path, "damaged|lacks base weights")


def _flip_a_bit_of_a_carry(folder: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        tensors["carry.down:second"].view(torch.int32)[3, 4] ^= 1

    _rewritten(folder, change)


def _turn_a_carry(folder: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        tensors["carry.up:second"] = tensors["carry.up:second"].T.contiguous()

    _rewritten(folder, change, checksum=True)


def _leave_out_half_a_carry(folder: Path) -> None:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        del tensors["carry.up:second"]

    _rewritten(folder, change)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("damage", [_flip_a_bit_of_a_carry, _turn_a_carry, _leave_out_half_a_carry])
def test_damaged_carry_is_refused_and_nothing_is_changed(
    damage: Callable[[Path], Any], alone: bool, tmp_path: Path
) -> None:
    run = RUNS["carry"]
    run.checkpoint(tmp_path)
    damage(tmp_path)
    model, optimizer = run.reloaded(tmp_path)
    if alone:
        _assert_model_refuses(model, tmp_path, match="damaged|carry")
    else:
        _assert_refused_without_a_trace(model, optimizer, tmp_path, match="damaged|carry")


@pytest.mark.parametrize("name", ["rank", "model", "hidden size", "layers"])
def test_model_alone_refuses_the_state_of_another(name: str, tmp_path: Path) -> None:
    RUNS["float32"].checkpoint(tmp_path)
    other, match = OTHERS[name]
    model = other.model()
    bits = models.bits(model)
    with pytest.raises(ValueError, match=match):
        scalora.load_rebased_weights(model, tmp_path)
    models.assert_same_bits(model, bits)


def test_state_is_not_put_into_a_base_without_memory(tmp_path: Path) -> None:
    run = RUNS["float32"]
    run.checkpoint(tmp_path)
    model, _ = run.reloaded(tmp_path)
    for name in run.targets:
        base = models.layer(model, name).get_base_layer()
        base.weight = nn.Parameter(base.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="no memory"):
        scalora.load_rebased_weights(model, tmp_path)


@pytest.mark.parametrize("failing", ["save_file", "_force_to_disk", "os.replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_write_keeps_the_old_file_and_leaves_no_other(
    failing: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RUNS["float32"]
    model = run.model()
    optimizer = run.optimizer_of(model)
    run.losses(model, optimizer, last=STOP)
    path = scalora.save_training_state(optimizer, tmp_path)
    old = path.read_bytes()
    run.losses(model, optimizer, first=STOP)

    def fail(*args: Any, **kwargs: Any) -> None:
        if failing == "save_file":
            Path(args[1]).write_bytes(old[: len(old) // 2])
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(f"scalora.files.{failing}", fail)
        with pytest.raises(error):
            scalora.save_training_state(optimizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert path.read_bytes() == old
    scalora.save_training_state(optimizer, tmp_path)
    assert path.read_bytes() != old


def test_first_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    model = RUNS["float32"].model()
    with pytest.raises(OSError, match="disk full"):
        scalora.save_training_state(RUNS["float32"].optimizer_of(model), tmp_path)
    assert list(tmp_path.iterdir()) == []
