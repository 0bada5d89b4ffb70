"""Factors that do not belong to what was taken out of them: put back, exchanged, averaged."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import internals
import models
import pytest
import torch
import training
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import scalora

INPUTS = models.vectors(16, 12)
MESSAGE = "are not those that ScaLoRA left"
accumulators = pytest.mark.parametrize("accumulator", ["dense", "carry"])


def make(accumulator: str, steps: int = 6, **options: Any) -> tuple[Any, scalora.ScaLoRA]:
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(), target_modules=["first", "second"])
    optimizer = training.optimizer_of(model, accumulator=accumulator, **options)
    models.train(model, optimizer, INPUTS, steps)
    return model, optimizer


def said(caught: list[warnings.WarningMessage]) -> int:
    return sum(MESSAGE in str(w.message) for w in caught)


@contextlib.contextmanager
def nothing_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{MESSAGE}")
        yield


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in models.trainable(model)]


# Putting factors back


def by_peft(model: Any, kept: dict[str, Tensor], _: Path) -> None:
    set_peft_model_state_dict(model, kept)


def by_peft_with_new_parameters(model: Any, kept: dict[str, Tensor], _: Path) -> None:
    set_peft_model_state_dict(model, kept, low_cpu_mem_usage=True)


def by_state_dict(model: Any, kept: dict[str, Tensor], _: Path) -> None:
    named = {name.replace(".weight", ".default.weight"): t for name, t in kept.items()}
    assert not model.load_state_dict(named, strict=False).unexpected_keys


def by_data(model: Any, kept: dict[str, Tensor], _: Path) -> None:
    for name, parameter in model.named_parameters():
        if (short := name.replace(".default", "")) in kept:
            parameter.data.copy_(kept[short])


def by_hotswap(model: Any, kept: dict[str, Tensor], folder: Path) -> None:
    other, _ = make("dense", steps=0)
    set_peft_model_state_dict(other, kept)
    other.save_pretrained(folder)
    hotswap_adapter(model, folder, "default")


WAYS = [by_peft, by_state_dict, by_data, by_hotswap]


@accumulators
@pytest.mark.parametrize("put_back", WAYS)
def test_factors_put_back_are_noticed_at_the_next_step(
    put_back: Callable[..., None], accumulator: str, tmp_path: Path
) -> None:
    model, optimizer = make(accumulator)
    kept, then = adapter_of(model), models.answers(model, INPUTS)
    models.train(model, optimizer, INPUTS, 4)
    put_back(model, kept, tmp_path)
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        models.train(model, optimizer, INPUTS, 1)
    assert said(list(caught)) == 1
    assert (models.answers(model, INPUTS) - then).abs().max() > 1e-2  # it is so
    with nothing_said():  # once
        put_back(model, kept, tmp_path)
        models.train(model, optimizer, INPUTS, 2)


@accumulators
@pytest.mark.parametrize("put_back", [*WAYS, by_peft_with_new_parameters])
@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_factors_put_back_are_noticed_when_the_model_is_evaluated(
    mode: str, put_back: Callable[..., None], accumulator: str, tmp_path: Path
) -> None:
    model, optimizer = make(accumulator)
    kept = adapter_of(model)
    models.train(model, optimizer, INPUTS, 4)
    put_back(model, kept, tmp_path)
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        if mode == "eval":
            model.eval()(INPUTS)
        else:
            with torch.no_grad():
                model(INPUTS)
    [warning] = [w for w in caught if MESSAGE in str(w.message)]
    assert warning.filename in (__file__, models.__file__)  # here, or where the layer runs


SAVES: dict[str, Callable[[Any, scalora.ScaLoRA, Path], Any]] = {
    "state_dict": lambda model, optimizer, path: optimizer.state_dict(),
    "save_training_state": lambda model, optimizer, path: scalora.save_training_state(
        optimizer, path
    ),
    "save_adapter": lambda model, optimizer, path: scalora.save_adapter(
        model, path / "adapter", base=models.Perceptron()
    ),
}


@accumulators
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
def test_factors_put_back_are_noticed_when_the_state_is_saved(
    save: Callable[[Any, scalora.ScaLoRA, Path], Any], accumulator: str, tmp_path: Path
) -> None:
    model, optimizer = make(accumulator)
    kept = adapter_of(model)
    models.train(model, optimizer, INPUTS, 4)
    by_data(model, kept, tmp_path)
    with pytest.warns(UserWarning, match=MESSAGE):
        save(model, optimizer, tmp_path)


def exchanged_and_back(model: nn.Module, others: list[Tensor]) -> None:
    """As an average of the factors is, around an evaluation that is not ours."""
    own = parameters_of(model)
    for values in (others, own):
        for parameter, value in zip(models.trainable(model), values, strict=True):
            parameter.data.copy_(value)


def whole_state(model: nn.Module, optimizer: scalora.ScaLoRA) -> Callable[[], None]:
    both = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def put_back() -> None:
        model.load_state_dict(both[0])
        optimizer.load_state_dict(both[1])

    return put_back


@accumulators
def test_what_is_right_says_nothing(accumulator: str, tmp_path: Path) -> None:
    model, optimizer = make(accumulator)
    others, back = parameters_of(model), whole_state(model, optimizer)
    then = models.answers(model, INPUTS)
    with nothing_said():
        models.train(model, optimizer, INPUTS, 2)
        exchanged_and_back(model, others)
        models.answers(model, INPUTS)
        models.train(model, optimizer, INPUTS, 2)
        back()
        torch.testing.assert_close(models.answers(model, INPUTS), then, rtol=0, atol=1e-6)
        models.train(model, optimizer, INPUTS, 2)
        scalora.save_training_state(optimizer, tmp_path, all_base_weights=True)
        kept = adapter_of(model)
        models.train(model, optimizer, INPUTS, 2)
        set_peft_model_state_dict(model, kept)
        scalora.load_training_state(optimizer, tmp_path)
        models.answers(model, INPUTS)
        models.train(model, optimizer, INPUTS, 2)


def test_whole_model_put_back_without_the_optimizer_is_right_if_dense() -> None:
    model, optimizer = make("dense")
    kept, then = models.bits(model), models.answers(model, INPUTS)
    for put_back in (
        lambda: model.load_state_dict(kept),
        lambda: [p.data.copy_(kept[name]) for name, p in model.named_parameters()],
    ):
        models.train(model, optimizer, INPUTS, 3)
        with nothing_said():
            put_back()
            assert torch.equal(models.answers(model, INPUTS), then)
            models.train(model, optimizer, INPUTS, 1)
    model, optimizer = make("carry")
    kept = models.bits(model)
    models.train(model, optimizer, INPUTS, 3)
    model.load_state_dict(kept)
    with pytest.warns(UserWarning, match=r"put back optimizer.state_dict\(\)"):
        models.answers(model, INPUTS)


@accumulators
def test_factors_of_a_model_that_was_not_re_based_yet_can_be_put_back(accumulator: str) -> None:
    model, optimizer = make(accumulator, steps=3, interval=8)
    kept, then = adapter_of(model), models.answers(model, INPUTS)
    models.train(model, optimizer, INPUTS, 3)
    with nothing_said():
        set_peft_model_state_dict(model, kept)
        assert torch.equal(models.answers(model, INPUTS), then)
        models.train(model, optimizer, INPUTS, 6)
    assert optimizer.rebase_count > 0


def clipped_and_scaled(model: Any, optimizer: scalora.ScaLoRA) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(models.loss(model, INPUTS)).backward()
        if step == 1:
            optimizer.rebased_pairs[0].P_parameter.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(models.trainable(model), 0.1)
        scaler.step(optimizer)
        scaler.update()


def failing(model: Any, optimizer: scalora.ScaLoRA) -> None:
    models.train(model, optimizer, INPUTS, 1)
    models.loss(model, INPUTS).backward()

    def fail(*_: Any) -> None:
        raise RuntimeError("half way")

    hook = optimizer.inner.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        optimizer.step()
    hook.remove()
    models.train(model, optimizer, INPUTS, 2)


def compiled(model: Any, optimizer: scalora.ScaLoRA) -> None:
    models.train(torch.compile(model, backend="eager"), optimizer, INPUTS, 3)
    torch.compiler.reset()


def skipped(model: Any, optimizer: scalora.ScaLoRA) -> None:
    models.loss(model, torch.full_like(INPUTS, torch.nan)).backward()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    models.train(model, optimizer, INPUTS, 2)


def converted(model: Any, optimizer: scalora.ScaLoRA) -> None:
    model.bfloat16()
    with torch.no_grad():
        model(INPUTS.bfloat16())
    optimizer.load_state_dict(optimizer.state_dict())
    models.train(model, optimizer, INPUTS.bfloat16(), 2)


def by_a_second_scalora(model: Any, optimizer: scalora.ScaLoRA) -> None:
    second = training.optimizer_of(model, lr=1e-3)
    models.train(model, second, INPUTS, 3)


def by_another_optimizer(model: Any, optimizer: scalora.ScaLoRA) -> None:
    models.train(model, torch.optim.AdamW(models.trainable(model), lr=1e-2), INPUTS, 3)


def merged_for_a_while(model: Any, optimizer: scalora.ScaLoRA) -> None:
    model.merge_adapter()
    models.answers(model, INPUTS)
    model.unmerge_adapter()
    models.train(model, optimizer, INPUTS, 2)


@accumulators
@pytest.mark.parametrize(
    "use",
    [
        *(clipped_and_scaled, failing, compiled, skipped, converted),
        *(by_a_second_scalora, by_another_optimizer, merged_for_a_while),
    ],
)
def test_training_as_people_do_it_says_nothing(
    use: Callable[[Any, scalora.ScaLoRA], None], accumulator: str
) -> None:
    model, optimizer = make(accumulator)
    with nothing_said():
        use(model, optimizer)
        models.answers(model, INPUTS.to(next(model.parameters()).dtype))


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
@accumulators
def test_every_kind_of_inner_optimizer_says_nothing(
    accumulator: str, options: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(), target_modules=["first", "second"])
    optimizer = training.optimizer_of(model, adamw=options, accumulator=accumulator)
    with nothing_said():
        models.train(model, optimizer, INPUTS, 4)


def late(optimizer: scalora.ScaLoRA) -> None:
    """Let the watch defer what it finds, as it does where a look would wait for the device."""
    watch: Any = internals.factor_watch(optimizer)
    watch._worst, watch._arrived = torch.zeros(()), torch.zeros(())


@accumulators
def test_what_an_accelerator_finds_is_said_one_look_later(accumulator: str, tmp_path: Path) -> None:
    model, optimizer = make(accumulator)
    late(optimizer)
    kept, back = adapter_of(model), whole_state(model, optimizer)
    with nothing_said():
        models.train(model, optimizer, INPUTS, 4)
        by_data(model, kept, tmp_path)
        models.train(model, optimizer, INPUTS, 1)
        back()  # what was found is of no account then
        models.train(model, optimizer, INPUTS, 1)
        late(optimizer)
        models.train(model, optimizer, INPUTS, 4)
        by_data(model, kept, tmp_path)
        models.train(model, optimizer, INPUTS, 1)
    with pytest.warns(UserWarning, match=MESSAGE):
        models.train(model, optimizer, INPUTS, 1)


@pytest.mark.gpu
@accumulators
def test_gpu_factors_put_back_are_noticed(accumulator: str, tmp_path: Path) -> None:
    model, optimizer = make(accumulator, steps=0)
    model.cuda()
    optimizer.load_state_dict(optimizer.state_dict())
    inputs = INPUTS.cuda()

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    train(4)
    kept = adapter_of(model)
    with nothing_said():
        train(4)
    by_data(model, kept, tmp_path)
    with pytest.warns(UserWarning, match=MESSAGE):
        train(1)
        torch.cuda.synchronize()
        train(1)


# Copies and averages


@accumulators
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, AveragedModel, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copy_answers_as_the_model_did(clone: Callable[[Any], Any], accumulator: str) -> None:
    model, optimizer = make(accumulator)
    twin, then = clone(model), models.answers(model, INPUTS)
    with nothing_said():
        models.train(model, optimizer, INPUTS, 4)
        assert torch.equal(models.answers(twin, INPUTS), then)
        assert (models.answers(model, INPUTS) - then).abs().max() > 1e-2


def averages(model: Any) -> list[AveragedModel]:
    return [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))]


def test_average_of_whole_models_is_that_of_their_weights() -> None:
    """To what an average of factors costs, which no re-basing has a part in."""
    model, optimizer = make("dense", steps=30)
    [swa, ema], expected, share = averages(model), [], [1.0, 1.0]
    for step in range(10):
        models.train(model, optimizer, INPUTS, 1)
        now = [pair.effective_weight() for pair in optimizer.rebased_pairs]
        share = [1 / (step + 1), 0.5 if step else 1.0]
        if not expected:
            expected = [[w.clone() for w in now] for _ in share]
        for averaged, part in zip(expected, share, strict=True):
            for one, weight in zip(averaged, now, strict=True):
                one.lerp_(weight, part)
        for average in (swa, ema):
            average.update_parameters(model)
    for average, weights in zip((swa, ema), expected, strict=True):
        with nothing_said():
            models.answers(average, INPUTS)
        found = [
            pair.effective_weight()
            for pair in scalora.peft_layers.lora_pairs(average.module, "default")
        ]
        for one, other, now in zip(found, weights, optimizer.rebased_pairs, strict=True):
            assert (one - other).norm() < 0.3 * (now.effective_weight() - other).norm()


def refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="this copy of the model has other factors"):
        models.answers(model, INPUTS)


@pytest.mark.parametrize("steps", [0, 6])
def test_average_that_leaves_the_carry_out_is_refused(steps: int, tmp_path: Path) -> None:
    model, optimizer = make("carry", steps=steps)
    for average in averages(model):
        for _ in range(3):
            models.train(model, optimizer, INPUTS, 1)
            average.update_parameters(model)
        refused(average)
        refused(average)
        with pytest.raises(ValueError, match="this copy of the model has other factors"):
            scalora.save_adapter(average.module, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


def test_copy_of_a_model_that_takes_up_its_state_without_the_carry_is_refused() -> None:
    model, optimizer = make("carry")
    best = copy.deepcopy(model)
    models.train(model, optimizer, INPUTS, 2)
    best.load_state_dict(model.state_dict())
    refused(best)
    dense, optimizer = make("dense")
    best = copy.deepcopy(dense)
    models.train(dense, optimizer, INPUTS, 2)
    best.load_state_dict(dense.state_dict())
    assert torch.equal(models.answers(best, INPUTS), models.answers(dense, INPUTS))


@accumulators
def test_average_of_the_factors_alone_is_refused(accumulator: str) -> None:
    model, optimizer = make(accumulator)
    average = copy.deepcopy(model)
    for _ in range(3):
        models.train(model, optimizer, INPUTS, 1)
        for one, other in zip(models.trainable(average), models.trainable(model), strict=True):
            one.data.lerp_(other.data, 0.5)
    refused(average)


@accumulators
def test_average_between_two_re_basings_is_answered_and_the_warning_tells_when_it_is_right(
    accumulator: str,
) -> None:
    model, optimizer = make(accumulator, steps=8, interval=8)
    average = AveragedModel(model)
    for _ in range(4):
        models.train(model, optimizer, INPUTS, 1)
        average.update_parameters(model)
    assert optimizer.rebase_count == 1
    with pytest.warns(UserWarning, match="Unless they are from after the newest re-basing"):
        models.answers(average, INPUTS)


@accumulators
@pytest.mark.parametrize("train", ["plain", "re-based"])
def test_copy_is_trained_by_itself(accumulator: str, train: str) -> None:
    model, optimizer = make(accumulator)
    twin = copy.deepcopy(model)
    own: torch.optim.Optimizer = torch.optim.AdamW(models.trainable(twin), lr=1e-2)
    if train == "re-based":
        own = scalora.ScaLoRA(own, twin, rule="exact", accumulator=accumulator)
    with nothing_said():
        for _ in range(3):
            models.train(model, optimizer, INPUTS, 1)
            models.train(twin, own, INPUTS, 1)
        for one in (model, twin):
            models.answers(one, INPUTS)
    kept = adapter_of(twin)
    models.train(twin, own, INPUTS, 3)
    if train == "re-based":  # and watched for itself
        set_peft_model_state_dict(twin, kept)
        with pytest.warns(UserWarning, match=MESSAGE):
            models.answers(twin, INPUTS)


@accumulators
def test_lightnings_average_is_right_if_dense_and_said_to_be_wrong_beside_a_carry(
    accumulator: str, tmp_path: Path
) -> None:
    """It is exchanged with the model's parameters around every validation."""
    lightning = pytest.importorskip("lightning", reason="PyTorch Lightning is not installed")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    torch.manual_seed(0)
    lora = models.with_lora(models.Perceptron(), target_modules=["first", "second"])

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.lora = lora

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return models.loss(self.lora, batch[0])

        def validation_step(self, batch: list[Tensor], index: int) -> Tensor:
            return models.loss(self.lora, batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            inner = torch.optim.AdamW(models.trainable(self), lr=1e-2)
            return scalora.ScaLoRA(inner, self, rule="exact", accumulator=accumulator)

    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(INPUTS), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[EMAWeightAveraging(decay=0.5)],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Module(), batches, batches)
    assert said(caught) == (accumulator == "carry")
