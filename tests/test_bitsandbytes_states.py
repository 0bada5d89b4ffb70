"""bitsandbytes' optimizers: moments decoded, scaled and encoded; 32-bit ones exactly."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import reference
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import scalora
from scalora.inner_states import moved_states, stacked_states
from scalora.layer_batches import batches_with_gradients
from scalora.moments import Moments, moments_of
from scalora.moments.blockwise import decode
from scalora.moments.table import _TABLE
from scalora.peft_layers import lora_pairs

bnb = pytest.importorskip("bitsandbytes").optim

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

BITS_32 = (
    *("Adam", "Adam32bit", "PagedAdam", "PagedAdam32bit"),
    *("AdamW", "AdamW32bit", "PagedAdamW", "PagedAdamW32bit"),
    *("Lion", "Lion32bit", "PagedLion", "PagedLion32bit"),
    *("AdEMAMix", "PagedAdEMAMix"),
    *("SGD", "SGD32bit", "RMSprop", "RMSprop32bit", "Adagrad", "Adagrad32bit"),
)
BITS_8 = (
    *("Adam8bit", "PagedAdam8bit", "AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit"),
    *("AdEMAMix8bit", "PagedAdEMAMix8bit", "SGD8bit", "RMSprop8bit", "Adagrad8bit"),
)
REFUSED = {
    *("LAMB", "LAMB8bit", "LAMB32bit", "LARS", "LARS8bit", "LARS32bit", "PytorchLARS"),
    *("AdEMAMix32bit", "PagedAdEMAMix32bit"),
}
RATES = {
    **{"Adam": 4e-2, "AdamW": 4e-2, "AdEMAMix": 2e-2, "Lion": 2e-2},
    **{"SGD": 6.0, "RMSprop": 1e-2, "Adagrad": 1e-1},
}

P_AXIS, Q_AXIS = 2, 1  # of stacks (layers, m, r) and (layers, r, n)
ROUND_OFF = 8 * 2.0**-24  # of a float32 number, a few operations deep


def create(name: str, parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    family = name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
    options = {"lr": RATES[family], "weight_decay": 0.0, **options}
    if family == "SGD":
        options["momentum"] = 0.9
    return getattr(bnb, name)(parameters, **options)


def feed(optimizer: torch.optim.Optimizer, histories: list[list[Tensor]]) -> None:
    """Step through gradients: ``histories[i][t]`` is the i-th parameter's at step t."""
    parameters = optimizer.param_groups[0]["params"]
    for grads in zip(*histories, strict=True):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()


def held_still(name: str, *shapes: tuple[int, ...]) -> torch.optim.Optimizer:
    return create(name, [nn.Parameter(torch.zeros(shape)) for shape in shapes], lr=0.0)


def history(*shape: int, steps: int = 5) -> list[Tensor]:
    """Columns and rows whose sizes differ, as real gradients' do."""
    sizes = torch.exp(torch.randn(shape[0], 1)) * torch.exp(2 * torch.randn(shape[1]))
    return [torch.randn(shape) * sizes for _ in range(steps)]


def move(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], factor: Tensor, axis: int
) -> None:
    """Carry the state across, as a re-basing writes it."""
    for targets, old, new in moved_states(
        optimizer, moments_of(optimizer), parameters, factor, axis
    ):
        assert old.dtype == new.dtype == targets[0].dtype
        for target, value in zip(targets, new, strict=True):
            target.copy_(value)


def tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def decoded(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The state of one parameter by bitsandbytes' names, in float64, with absmax and levels.

    Two averages in one tensor come out as two.
    """
    found = {}
    for i in "12":
        if f"state{i}" not in state:
            continue
        codes, absmax = state[f"state{i}"], state[f"absmax{i}"]
        level_map = state[f"qmap{i}"].double().numpy()
        many = absmax.ndim == 2
        for k in range(len(absmax) if many else 1):
            one, scales = (codes[k], absmax[k]) if many else (codes, absmax)
            value = reference.decoded(one.numpy(), scales.double().numpy(), level_map)
            found[f"state{i}[{k}]"] = (value, scales.double().numpy(), level_map)
    return found


def degree_of(optimizer: torch.optim.Optimizer, name: str) -> int:
    moments = moments_of(optimizer)
    return moments.degrees[moments.holds[name[: len("state1")]][0]]


# The transfer


@pytest.mark.parametrize("name", [*BITS_32, *BITS_8])
def test_32_bit_state_is_that_of_a_history_in_the_new_coordinates(name: str) -> None:
    # Also the 8-bit optimizers' states of tensors of fewer than 4096 elements.  Powers of two are
    # exact in every operation, so the two states are the same to the bit.
    shapes, r = ((9, 3), (3, 11)), 3
    beta, alpha = (2.0 ** torch.randint(-3, 4, (r,)) for _ in range(2))
    histories = [history(*shape) for shape in shapes]
    old, new = held_still(name, *shapes), held_still(name, *shapes)
    feed(old, histories)
    feed(new, [[g * beta for g in histories[0]], [g * alpha[:, None] for g in histories[1]]])
    for p, fresh, factor, axis in zip(
        *(optimizer.param_groups[0]["params"] for optimizer in (old, new)),
        (beta, alpha),
        (P_AXIS, Q_AXIS),
        strict=True,
    ):
        before = copy.deepcopy(tensors(old, p))
        move(old, [p], factor[None].double(), axis)
        moved, expected = tensors(old, p), tensors(new, fresh)
        assert moved.keys() == expected.keys() and "qmap1" not in moved
        for key, value in moved.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[key]), key
            assert not torch.equal(value, before[key])


@pytest.mark.parametrize("name", BITS_8)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1000, 8), P_AXIS), ((513, 8), P_AXIS), ((1366, 3), P_AXIS), ((6, 700), Q_AXIS)],
    ids=str,
)
def test_8_bit_state_moves_by_at_most_half_a_quantization_step(
    name: str, shape: tuple[int, int], axis: int
) -> None:
    # Blocks of 256 elements hold several columns here, and the last one may be short.
    optimizer = held_still(name, shape)
    feed(optimizer, [history(*shape)])
    (p,) = optimizer.param_groups[0]["params"]
    before = decoded(tensors(optimizer, p))
    factor = torch.exp(torch.randn(1, shape[axis - 1], dtype=torch.float64))
    move(optimizer, [p], factor, axis)
    after = decoded(tensors(optimizer, p))
    for key, (old, _, _) in before.items():
        degree = degree_of(optimizer, key)
        wanted = reference.transferred(old, factor[0].numpy(), degree, axis - 1)
        found, absmax, level_map = after[key]
        step = reference.quantization_gaps(wanted, absmax, level_map)
        error = np.abs(found - wanted)
        assert np.all(error <= step / 2 + ROUND_OFF * np.abs(wanted))
        assert np.any(error > 0.4 * step)  # it is rounding that is bounded here
        crossed = reference.transferred(old, 1 / factor[0].numpy(), degree, axis - 1)
        assert np.mean(np.abs(found - crossed) > step) > 0.5  # and another factor is noticed


@pytest.mark.parametrize("name", BITS_8)
def test_8_bit_state_of_whole_rows_keeps_its_codes(name: str) -> None:
    # lora_A (r, n) with n a multiple of 256: all of a block is scaled alike.
    shape = (8, 512)
    optimizer = held_still(name, shape)
    feed(optimizer, [history(*shape)])
    (p,) = optimizer.param_groups[0]["params"]
    before = copy.deepcopy(tensors(optimizer, p))
    factor = torch.exp(torch.randn(1, 8, dtype=torch.float64))
    move(optimizer, [p], factor, Q_AXIS)
    after = tensors(optimizer, p)
    assert before["state1"].dtype == torch.uint8
    for key, old in before.items():
        if not key.startswith("absmax"):
            assert torch.equal(after[key], old), key
            continue
        degree = degree_of(optimizer, key.replace("absmax", "state"))
        expected = old.double() * factor[0].pow(degree).repeat_interleave(2)
        torch.testing.assert_close(after[key].double(), expected, rtol=ROUND_OFF, atol=0)


@pytest.mark.parametrize("name", BITS_8)
def test_layers_move_together_as_they_do_alone(name: str) -> None:
    shapes = [(700, 6)] * 3
    optimizer = held_still(name, *shapes)
    feed(optimizer, [history(*shape) for shape in shapes])
    parameters = optimizer.param_groups[0]["params"]
    saved = {p: {k: copy.deepcopy(v) for k, v in tensors(optimizer, p).items()} for p in parameters}
    factor = torch.exp(torch.randn(3, 6, dtype=torch.float64))
    move(optimizer, parameters, factor, P_AXIS)
    together = [copy.deepcopy(tensors(optimizer, p)) for p in parameters]
    for i, p in enumerate(parameters):
        optimizer.state[p].update(saved[p])
        move(optimizer, [p], factor[i : i + 1], P_AXIS)
        for key, value in tensors(optimizer, p).items():
            assert torch.equal(value, together[i][key]), key


# The coming direction


@pytest.mark.parametrize("name", [*BITS_32, *BITS_8])
@pytest.mark.parametrize("shape", [(5, 3), (700, 6)], ids=["small", "large"])
def test_predicted_direction_is_the_step_that_bitsandbytes_takes(
    name: str, shape: tuple[int, int]
) -> None:
    check_direction(create(name, [nn.Parameter(torch.zeros(shape))]), shape)


@pytest.mark.parametrize("name", ["AdEMAMix", "AdEMAMix8bit"])
@pytest.mark.parametrize(
    "schedules", [{"t_alpha": 4}, {"t_beta3": 4}, {"t_alpha": 3, "t_beta3": 6}]
)
def test_ademamix_schedules_are_followed(name: str, schedules: dict[str, int]) -> None:
    # Nine steps: on the way up and past its end.
    betas, shape = (0.8, 0.99, 0.995), (700, 6)
    optimizer = create(
        name, [nn.Parameter(torch.zeros(shape))], betas=betas, alpha=3.0, **schedules
    )
    check_direction(optimizer, shape)


def check_direction(optimizer: torch.optim.Optimizer, shape: tuple[int, int]) -> None:
    (p,), group = optimizer.param_groups[0]["params"], optimizer.param_groups[0]
    moments = moments_of(optimizer)
    assert moments.direction is not None
    for t in range(9):
        p.data.zero_()  # so that the step is not rounded on its way into the parameter
        p.grad = torch.randn(shape) * 2.0**-t
        state = stacked_states(optimizer, moments, [p])
        assert state.get("step", torch.zeros(())).item() == t
        state = {key: value.double() for key, value in state.items()}
        predicted = moments.direction(p.double()[None], p.grad.double()[None], state, group)
        optimizer.step()
        taken = -p.detach().double() / group["lr"]
        torch.testing.assert_close(predicted[0], taken, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion8bit", "AdEMAMix8bit", "SGD8bit"])
def test_states_are_read_decoded_by_torchs_names(name: str) -> None:
    shape = (700, 6)
    optimizer = held_still(name, shape, shape)
    feed(optimizer, [history(*shape), history(*shape)])
    parameters, moments = optimizer.param_groups[0]["params"], moments_of(optimizer)
    found = stacked_states(optimizer, moments, parameters)
    assert found.keys() == moments.degrees.keys() | {"step"}
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert value.shape == (() if key == "step" else (2, *shape))
    state = tensors(optimizer, parameters[1])
    first = state["state1"]
    if first.dtype == torch.uint8:
        first = decode(first, state["absmax1"], state["qmap1"])
    for key, value in zip(moments.holds["state1"], first.view(-1, *shape), strict=True):
        assert torch.equal(found[key][1], value)


# Which are known


def test_every_class_of_bitsandbytes_is_known_or_refused_by_name() -> None:
    for name, cls in vars(bnb).items():
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            continue
        assert (name in BITS_32) + (name in BITS_8) + (name in REFUSED) == 1, name
        options = {"momentum": 0.9} if "LARS" in name else {}
        if name in REFUSED:
            with pytest.raises(TypeError, match=rf"bitsandbytes\.optim\.\w+\.{name} "):
                moments_of(cls([nn.Parameter(torch.zeros(2, 2))], lr=0.1, **options))
        else:
            moments_of(create(name, [nn.Parameter(torch.zeros(2, 2))]))


@pytest.mark.parametrize("name", ["AdEMAMix32bit", "PagedAdEMAMix32bit"])
def test_ademamix32bit_cannot_step_by_itself(name: str) -> None:
    # Why it is refused: it makes room for one of AdEMAMix's two averages.
    optimizer = held_still(name, (9, 3))
    with pytest.raises(RuntimeError, match="shape"):
        feed(optimizer, [history(9, 3)])


def test_a_subclass_is_refused_by_name_with_those_that_are_known() -> None:
    class Mine(bnb.AdamW8bit):
        pass

    with pytest.raises(TypeError, match=r"Mine .*Known: Adam, .*bitsandbytes\.AdamW8bit"):
        moments_of(Mine([nn.Parameter(torch.zeros(2, 2))]))


def test_codes_under_a_users_own_entry_are_refused_not_scaled_as_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mine(bnb.AdamW8bit):
        pass

    names = ("absmax1", "absmax2", "qmap1", "qmap2")
    degrees = {"state1": 1, "state2": 2, **dict.fromkeys(names, 0)}
    monkeypatch.setitem(_TABLE, Mine, Moments(degrees))
    p = nn.Parameter(torch.zeros(700, 6))
    optimizer = Mine([p])
    feed(optimizer, [history(700, 6)])
    with pytest.raises(TypeError, match=r"Mine's state 'state1' is torch\.uint8"):
        moved_states(optimizer, moments_of(optimizer), [p], torch.ones(1, 6), P_AXIS)


def test_a_state_that_is_not_known_is_refused_and_nothing_changed() -> None:
    model = mixed_model()
    optimizer = wrapped("AdamW8bit", model)
    train(model, optimizer, range(2))
    first = next(p for p in trainable(model))
    optimizer.state[first]["unorm_vec"] = torch.zeros(1)
    before = everything(model, optimizer)
    backward(model, 2)
    with pytest.raises(TypeError, match="AdamW8bit keeps a state 'unorm_vec'"):
        optimizer.step()
    assert_same(everything(model, optimizer), before)


# Training


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


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def wrapped(name: str, model: nn.Module, **options: Any) -> scalora.ScaLoRA:
    return scalora.ScaLoRA(create(name, trainable(model)), model, **{"rule": "exact", **options})


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


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for seed in steps:
        optimizer.zero_grad()
        losses.append(backward(model, seed).item())
        optimizer.step()
    return losses


def everything(model: nn.Module, optimizer: scalora.ScaLoRA) -> dict[str, Tensor]:
    """A copy of every tensor that training changes."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{name} {key}"] = torch.as_tensor(value).clone()
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("name", [*BITS_32, *BITS_8])
def test_training_rebases_and_lowers_the_loss(name: str) -> None:
    model = mixed_model()
    optimizer = wrapped(name, model)
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
    optimizer._rebaser.rebase(optimizer.inner, 0)
    scaled = torch.cat([torch.cat(pair) for pair in optimizer.last_scaling.values()])
    assert torch.any(scaled != 1)
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix8bit", "SGD8bit", "AdamW"])
@pytest.mark.parametrize("rule", ["exact", "direction"])
def test_a_rebasing_carries_every_state_with_the_other_factors_scaling(
    name: str, rule: str
) -> None:
    model = equal_model()
    optimizer = wrapped(name, model, rule=rule)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    moments = moments_of(optimizer.inner)
    old = {p: stacked_states(optimizer.inner, moments, [p]) for p in trainable(model)}
    optimizer._rebaser.rebase(optimizer.inner, 0)
    for pair in optimizer.rebased_pairs:
        alpha, beta = optimizer.last_scaling[pair.name]
        assert torch.any(alpha != 1) and torch.any(beta != 1)
        for p, factor, axis in (
            (pair.P_parameter, beta, P_AXIS - 1),
            (pair.Q_parameter, alpha, Q_AXIS - 1),
        ):
            new = stacked_states(optimizer.inner, moments, [p])
            for key, degree in moments.degrees.items():
                wanted = reference.transferred(old[p][key][0].numpy(), factor.numpy(), degree, axis)
                # The widest gap of a map is 0.0141: half of it, of the largest element.
                widest = 0.0071 * np.abs(wanted).max() if name in BITS_8 else 0
                error = np.abs(new[key][0].numpy() - wanted)
                assert np.all(error <= widest + ROUND_OFF * np.abs(wanted)), key


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix8bit", "SGD8bit", "RMSprop8bit",
                                  "Adagrad8bit", "AdamW", "AdEMAMix", "RMSprop"])  # fmt: skip
def test_a_renewal_forgets_the_columns_momenta_and_no_second_moment(name: str) -> None:
    model = equal_model()
    optimizer = wrapped(name, model, rule="renew", lifetime=5)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    moments, before = moments_of(optimizer.inner), everything(model, optimizer)
    old = {p: stacked_states(optimizer.inner, moments, [p]) for p in trainable(model)}
    assert optimizer._rebaser.renew(optimizer.inner, 4, 5, 1)
    after = everything(model, optimizer)
    for key in after:
        if key.endswith("2") and key[:-1].endswith((" state", " absmax")):
            assert torch.equal(after[key], before[key]), key
    for pair in optimizer.rebased_pairs:
        for p, axis in ((pair.P_parameter, 1), (pair.Q_parameter, 0)):
            new = stacked_states(optimizer.inner, moments, [p])
            for key, degree in moments.degrees.items():
                found, wanted = new[key][0], old[p][key][0].clone()
                if degree == 2:
                    assert torch.equal(found, wanted), key
                    continue
                assert wanted.select(axis, 0).any()
                wanted.select(axis, 0).zero_()
                assert not found.select(axis, 0).any(), key
                # The widest gap of a map is 0.0141: half of it, of the largest element.
                widest = 0.0071 * wanted.abs().max() if name in BITS_8 else 0
                assert ((found - wanted).abs() <= widest).all(), key


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
    batches = batches_with_gradients(optimizer.rebased_pairs, optimizer.inner, lambda pair: None)
    assert [[pair.name for pair in batch.pairs] for batch in batches] == [["0"], ["2"]]
    steps = [
        stacked_states(optimizer.inner, moments_of(optimizer.inner), batch.P)["step"].item()
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
    trainable(model)[0].grad[0, 0] = value
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert_same(everything(model, optimizer), before)
    assert np.isfinite(train(model, optimizer, range(5, 8))).all()


def test_of_two_layers_in_a_batch_the_finite_one_is_rebased_alone() -> None:
    # What happens on a device that is not waited for.
    model = equal_model()
    optimizer = wrapped("AdamW8bit", model)
    train(model, optimizer, range(4))
    optimizer.zero_grad()
    backward(model, 4)
    model.base_model.model[2].lora_B["default"].weight.grad[5, 5] = torch.nan
    assert (
        len(batches_with_gradients(optimizer.rebased_pairs, optimizer.inner, lambda pair: None))
        == 1
    )
    before = everything(model, optimizer)
    optimizer._rebaser.rebase(optimizer.inner, 5)
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
    optimizer._rebaser.rebase(optimizer.inner, 4)
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
    assert_same(everything(second, resumed), everything(whole, complete))


# On a GPU: kernels that see flat memory, paged states, no waiting


def to_cuda(make: Any) -> nn.Module:
    return make().to("cuda")


def rebased(model: nn.Module, optimizer: scalora.ScaLoRA) -> dict[str, dict[str, Tensor]]:
    """States by layer and factor, on the CPU, after a re-basing without a step."""
    optimizer._rebaser.rebase(optimizer.inner, 0)
    moments = moments_of(optimizer.inner)
    return {
        f"{pair.name} {factor}": {
            key: value.cpu() for key, value in stacked_states(optimizer.inner, moments, [p]).items()
        }
        for pair in optimizer.rebased_pairs
        for factor, p in (("P", pair.P_parameter), ("Q", pair.Q_parameter))
    }


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in trainable(model):
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
        optimizer._rebaser.rebase(optimizer.inner, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", BITS_8)
def test_gpu_codes_move_by_at_most_half_a_quantization_step(name: str) -> None:
    shape = (1024, 8)
    optimizer = create(name, [nn.Parameter(torch.zeros(shape, device="cuda"))], lr=0.0)
    feed(optimizer, [[g.cuda() for g in history(*shape)]])
    (p,) = optimizer.param_groups[0]["params"]
    before = decoded({key: value.cpu() for key, value in tensors(optimizer, p).items()})
    factor = torch.exp(torch.randn(1, 8, dtype=torch.float64))
    move(optimizer, [p], factor.cuda(), P_AXIS)
    after = decoded({key: value.cpu() for key, value in tensors(optimizer, p).items()})
    for key, (old, _, _) in before.items():
        wanted = reference.transferred(old, factor[0].numpy(), degree_of(optimizer, key), 1)
        found, absmax, level_map = after[key]
        step = reference.quantization_gaps(wanted, absmax, level_map)
        assert np.all(np.abs(found - wanted) <= step / 2 + ROUND_OFF * np.abs(wanted))


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW"])
def test_gpu_states_of_channels_last_parameters_are_read_as_the_kernels_write(name: str) -> None:
    p = nn.Parameter(torch.zeros(8, 64, 3, 3, device="cuda").to(memory_format=torch.channels_last))
    plain = nn.Parameter(torch.zeros(8, 64, 3, 3, device="cuda"))
    optimizer = create(name, [p, plain], lr=0.0)
    grads = [torch.randn(8, 64, 3, 3, device="cuda") for _ in range(3)]
    feed(optimizer, [grads, grads])
    assert not optimizer.state[p]["state1"].is_contiguous()
    factor = torch.exp(torch.randn(1, 8, dtype=torch.float64, device="cuda"))
    found = []
    for parameter in (p, plain):
        move(optimizer, [parameter], factor, Q_AXIS)
        found.append(stacked_states(optimizer, moments_of(optimizer), [parameter]))
    for key, value in found[1].items():
        torch.testing.assert_close(found[0][key], value, rtol=0, atol=0)


@pytest.mark.gpu
def test_gpu_ademamix8bit_is_refused_where_its_scales_overlap() -> None:
    optimizer = create("AdEMAMix8bit", [nn.Parameter(torch.zeros(513, 8, device="cuda"))], lr=0.0)
    feed(optimizer, [[g.cuda() for g in history(513, 8)]])
    (p,) = optimizer.param_groups[0]["params"]
    factor = torch.ones(1, 8, device="cuda", dtype=torch.float64)
    with pytest.raises(TypeError, match=r"overwrite each other's scale .*4104.*min_8bit_size"):
        moved_states(optimizer, moments_of(optimizer), [p], factor, P_AXIS)
