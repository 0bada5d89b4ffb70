"""Training with bitsandbytes' optimizers: re-based, resumed, refused whole."""

from __future__ import annotations

import functools
import io
from typing import Any

import internals
import models
import numpy as np
import pytest
import reference
import torch
from bitsandbytes_optimizers import BITS_8, BITS_32, P_AXIS, Q_AXIS, ROUND_OFF, create
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import scalora
from scalora.moments import moments_of
from scalora.peft_layers import LayerLookup, lora_pairs
from scalora.rebasing.batches import Batching, LayerBatch

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def mixed_model() -> nn.Module:
    """Layers with an 8-bit lora_A and a 32-bit lora_B and the other way round."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 40), nn.Tanh(), nn.Linear(40, 1000))
    return get_peft_model(base, LoraConfig(r=8, target_modules=["0", "2"]))


def equal_model() -> nn.Module:
    """Two layers of one shape, all factors 8-bit; lora_B's blocks cross its columns."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))
    config = LoraConfig(r=8, target_modules=["0", "2"], init_lora_weights=False)
    return get_peft_model(base, config)


def wrapped(name: str, model: nn.Module, **options: Any) -> scalora.ScaLoRA:
    return scalora.ScaLoRA(
        create(name, models.trainable(model)), model, **{"rule": "exact", **options}
    )


def batches_of(optimizer: scalora.ScaLoRA) -> list[LayerBatch]:
    layers = LayerLookup(optimizer.rebased_pairs)
    return Batching(layers, lambda pair: None).of_step(optimizer.inner)


def backward(model: nn.Module, seed: int) -> Tensor:
    """The loss against a target of rank 2."""
    first, last = model.base_model.model[0], model.base_model.model[2]
    answer = torch.Generator().manual_seed(99)
    U = torch.randn(2, last.out_features, generator=answer)
    V = torch.randn(first.in_features, 2, generator=answer) / first.in_features**0.5
    x = torch.randn(64, first.in_features, generator=torch.Generator().manual_seed(seed))
    loss = (model(x) - x @ V @ U).square().mean()
    loss.backward()
    return loss.detach()


train = functools.partial(models.train_by, backward)


def everything(model: nn.Module, optimizer: scalora.ScaLoRA) -> dict[str, Tensor]:
    """A copy of every tensor that training changes."""
    found = models.parameters(model)
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{name} {key}"] = torch.as_tensor(value).clone()
    return found


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *((name, "exact") for name in (*BITS_32, *BITS_8)),
        # SGD itself learns nothing here in 30 steps, or diverges.
        *((name, "auto") for name in (*BITS_32, *BITS_8) if not name.startswith("SGD")),
    ],
)
def test_training_rebases_and_lowers_the_loss(name: str, rule: str) -> None:
    model = mixed_model()
    optimizer = wrapped(name, model, rule=rule, interval=1)
    base = {pair.name: pair.base_weight.clone() for pair in lora_pairs(model, "default")}
    losses = train(model, optimizer, range(30))
    assert optimizer.rebase_count == 30
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    for pair in optimizer.rebased_pairs:
        assert not torch.equal(pair.base_weight, base[pair.name])
    kinds = {v["state1"].dtype for v in optimizer.state.values()}
    assert kinds == ({torch.float32, torch.uint8} if name in BITS_8 else {torch.float32})

    optimizer.zero_grad()
    backward(model, 30)
    x = torch.randn(16, 512)
    before = model(x).detach()
    internals.rebase(optimizer)
    scaled = torch.cat([torch.cat(pair) for pair in optimizer.last_scaling.values()])
    assert torch.any(scaled != 1)
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix8bit", "SGD8bit", "AdamW"])
@pytest.mark.parametrize("rule", ["leak", "exact", "direction"])
def test_a_rebasing_carries_every_state_with_the_other_factors_scaling(
    name: str, rule: str
) -> None:
    model = equal_model()
    optimizer = wrapped(name, model, rule=rule)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    moments = moments_of(optimizer.inner)
    old = {p: moments.stacked_states(optimizer.inner, [p]) for p in models.trainable(model)}
    internals.rebase(optimizer)
    for pair in optimizer.rebased_pairs:
        alpha, beta = optimizer.last_scaling[pair.name]
        assert torch.any(alpha != 1) and torch.any(beta != 1) != (rule == "leak")
        for p, factor, axis in (
            (pair.P_parameter, beta, P_AXIS - 1),
            (pair.Q_parameter, alpha, Q_AXIS - 1),
        ):
            new = moments.stacked_states(optimizer.inner, [p])
            for key, degree in moments.degrees.items():
                wanted = reference.transferred(old[p][key][0].numpy(), factor.numpy(), degree, axis)
                # The widest gap of a map is 0.0141: half of it, of the largest element.
                widest = 0.0071 * np.abs(wanted).max() if name in BITS_8 else 0
                error = np.abs(new[key][0].numpy() - wanted)
                assert np.all(error <= widest + ROUND_OFF * np.abs(wanted)), key


def test_layers_at_different_steps_are_no_batch() -> None:
    # `step` is a number on the host; a batch has one.
    model = equal_model()
    optimizer = wrapped("AdamW8bit", model, rule="direction")
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, seed)
        if seed == 0:
            for p in model.base_model.model[2].parameters():
                p.grad = None
        optimizer.step()
    backward(model, 3)
    batches = batches_of(optimizer)
    assert [[pair.name for pair in batch.pairs] for batch in batches] == [["0"], ["2"]]
    steps = [
        moments_of(optimizer.inner).stacked_states(optimizer.inner, batch.P)["step"].item()
        for batch in batches
    ]
    assert steps == [3, 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_gradient_changes_nothing_and_training_goes_on(value: float) -> None:
    model = mixed_model()
    optimizer = wrapped("AdamW8bit", model)
    train(model, optimizer, range(4))
    before = everything(model, optimizer)
    optimizer.zero_grad()
    backward(model, 4)
    models.trainable(model)[0].grad[0, 0] = value
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    models.assert_same(everything(model, optimizer), before)
    assert np.isfinite(train(model, optimizer, range(5, 8))).all()


def test_of_two_layers_in_a_batch_the_finite_one_is_rebased_alone() -> None:
    # What happens on a device that is not waited for.
    model = equal_model()
    optimizer = wrapped("AdamW8bit", model)
    train(model, optimizer, range(4))
    optimizer.zero_grad()
    backward(model, 4)
    model.base_model.model[2].lora_B["default"].weight.grad[5, 5] = torch.nan
    assert len(batches_of(optimizer)) == 1
    before = everything(model, optimizer)
    internals.rebase(optimizer, 5)
    after = everything(model, optimizer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefix = "base_model.model"
    assert not any(name.startswith(f"{prefix}.2.") for name in changed)
    expected = {"base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"}
    expected |= {f"lora_{x}.default.weight absmax{i}" for x in "AB" for i in "12"}
    expected |= {f"lora_B.default.weight state{i}" for i in "12"}  # whole rows keep their codes
    assert changed == {f"{prefix}.0.{name}" for name in expected}


@pytest.mark.parametrize("absmax", [torch.inf, torch.nan])
def test_a_state_that_is_not_finite_stays_and_keeps_its_layer(absmax: float) -> None:
    model = equal_model()
    optimizer = wrapped("AdamW8bit", model)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    first, second = optimizer.rebased_pairs
    optimizer.state[first.P_parameter]["absmax2"][3] = absmax
    before = everything(model, optimizer)
    internals.rebase(optimizer, 4)
    after = everything(model, optimizer)
    for name in before:
        if ".0." in name:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(second.P_parameter, before["base_model.model.2.lora_B.default.weight"])


@pytest.mark.parametrize("name", [*BITS_8, "AdamW", "Lion", "AdEMAMix"])
def test_state_dict_resumes_to_the_same_bits(name: str) -> None:
    whole = mixed_model()
    complete = wrapped(name, whole)
    expected = train(whole, complete, range(8))
    first = mixed_model()
    optimizer = wrapped(name, first)
    train(first, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = mixed_model()
    resumed = wrapped(name, second)
    resumed.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["model"])
    assert train(second, resumed, range(4, 8)) == expected[4:]
    models.assert_same(everything(second, resumed), everything(whole, complete))


def test_a_state_that_is_not_known_is_refused_and_nothing_changed() -> None:
    model = mixed_model()
    optimizer = wrapped("AdamW8bit", model)
    train(model, optimizer, range(2))
    first = next(p for p in models.trainable(model))
    optimizer.state[first]["unorm_vec"] = torch.zeros(1)
    before = everything(model, optimizer)
    backward(model, 2)
    with pytest.raises(TypeError, match="AdamW8bit keeps a state 'unorm_vec'"):
        optimizer.step()
    models.assert_same(everything(model, optimizer), before)


# On a GPU: paged states, no waiting


def to_cuda(make: Any) -> nn.Module:
    return make().to("cuda")


def rebased(model: nn.Module, optimizer: scalora.ScaLoRA) -> dict[str, dict[str, Tensor]]:
    """States by layer and factor, on the CPU, after a re-basing without a step."""
    internals.rebase(optimizer)
    moments = moments_of(optimizer.inner)
    return {
        f"{pair.name} {factor}": {
            key: value.cpu() for key, value in moments.stacked_states(optimizer.inner, [p]).items()
        }
        for pair in optimizer.rebased_pairs
        for factor, p in (("P", pair.P_parameter), ("Q", pair.Q_parameter))
    }


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in models.trainable(model):
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix8bit", "AdamW"])
@pytest.mark.parametrize("rule", ["exact", "direction"])
def test_gpu_a_rebasing_never_waits(name: str, rule: str) -> None:
    model = to_cuda(equal_model)
    optimizer = wrapped(name, model, rule=rule)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    set_gradients(model, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        internals.rebase(optimizer, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("paged", ["PagedAdamW8bit", "PagedAdamW", "PagedLion8bit"])
def test_gpu_paged_states_move_as_those_that_are_not(paged: str) -> None:
    # Only tensors of 1e5 elements or more are paged: torch takes managed memory for the host's.
    def large_model() -> nn.Module:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8192, 64), nn.Tanh(), nn.Linear(64, 8192))
        config = LoraConfig(r=16, target_modules=["0", "2"], init_lora_weights=False)
        return get_peft_model(base, config)

    found = []
    for name in (paged, paged.removeprefix("Paged")):
        model = to_cuda(large_model)
        optimizer = wrapped(name, model)
        for seed in range(3):
            set_gradients(model, seed)
            optimizer.step()
        set_gradients(model, 3)
        found.append(rebased(model, optimizer))
        states = [state["state1"] for state in optimizer.state.values()]
        assert any(getattr(s, "is_paged", False) for s in states) == name.startswith("Paged")
    for key, states in found[0].items():
        for name, value in states.items():
            torch.testing.assert_close(value, found[1][key][name], rtol=1e-5, atol=1e-8)
