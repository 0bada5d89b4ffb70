"""bitsandbytes' optimizers: moments decoded, scaled and encoded; 32-bit ones exactly."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
from bitsandbytes_optimizers import BITS_8, BITS_32, P_AXIS, Q_AXIS, ROUND_OFF, bnb, create
from torch import Tensor, nn

from scalora.moments import Moments, moments_of
from scalora.moments.blockwise import decode
from scalora.moments.history import Powers
from scalora.moments.table import _TABLE

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

REFUSED = {
    *("LAMB", "LAMB8bit", "LAMB32bit", "LARS", "LARS8bit", "LARS32bit", "PytorchLARS"),
    *("AdEMAMix32bit", "PagedAdEMAMix32bit"),
}


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
    history = moments_of(optimizer).history(optimizer, parameters, axis)
    for moved in history.moved(Powers(factor), slice(len(parameters))):
        for targets, old, new in moved.writes():
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
        state = moments.stacked_states(optimizer, [p])
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
    found = moments.stacked_states(optimizer, parameters)
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
        moments_of(optimizer).history(optimizer, [p], P_AXIS)


# On a GPU: kernels that see flat memory


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
        found.append(moments_of(optimizer).stacked_states(optimizer, [parameter]))
    for key, value in found[1].items():
        torch.testing.assert_close(found[0][key], value, rtol=0, atol=0)


@pytest.mark.gpu
def test_gpu_ademamix8bit_is_refused_where_its_scales_overlap() -> None:
    optimizer = create("AdEMAMix8bit", [nn.Parameter(torch.zeros(513, 8, device="cuda"))], lr=0.0)
    feed(optimizer, [[g.cuda() for g in history(513, 8)]])
    (p,) = optimizer.param_groups[0]["params"]
    factor = torch.ones(1, 8, device="cuda", dtype=torch.float64)
    with pytest.raises(TypeError, match=r"overwrite each other's scale .*4104.*min_8bit_size"):
        moments_of(optimizer).history(optimizer, [p], P_AXIS).moved(Powers(factor), slice(1))
