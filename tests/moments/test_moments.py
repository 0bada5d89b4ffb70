from __future__ import annotations

import inspect
from typing import Any

import internals
import numpy as np
import peft
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import OPTIMIZERS, OptimizerCase
from torch import Tensor, nn

import scalora
from scalora.moments import Moments, moments_of, register_moments
from scalora.moments.history import transfer, transfer_reduced
from scalora.moments.table import _TABLE

M, N, R = 6, 5, 3
P_RANK_AXIS, Q_RANK_AXIS = 2, 1  # of stacks (layers, m, r) and (layers, r, n)
VARIANTS: list[dict[str, Any]] = [{}, {"foreach": True}, {"fused": True}, {"maximize": True}]


def _variants() -> list[Any]:
    """Every optimizer in every way to run it that its signature offers."""
    cases = []
    for case in OPTIMIZERS:
        accepted = inspect.signature(case.cls).parameters
        for variant in VARIANTS:
            if not accepted.keys() >= variant.keys():
                continue
            name = "_".join([case.name, *variant])
            cases.append(pytest.param(case, variant, "cpu", id=name))
            cases.append(
                pytest.param(case, variant, "cuda", id=f"{name}_cuda", marks=pytest.mark.gpu)
            )
        if "capturable" in accepted:
            cases.append(
                pytest.param(
                    case,
                    {"capturable": True},
                    "cuda",
                    id=f"{case.name}_capturable_cuda",
                    marks=pytest.mark.gpu,
                )
            )
    return cases


def _create(
    case: OptimizerCase, parameters: list[nn.Parameter], **options: Any
) -> torch.optim.Optimizer:
    """With an exact zero for eps where the state itself depends on it."""
    if case.cls in (torch.optim.Adamax, torch.optim.RMSprop):
        options["eps"] = 0.0
    return case.cls(parameters, **case.options, **options)


def _skip_if_torch_refuses(case: OptimizerCase, variant: dict[str, Any], device: str) -> None:
    parameter = nn.Parameter(torch.ones(2, 2, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        _create(case, [parameter], lr=0.1, **variant).step()
    except (RuntimeError, AssertionError, NotImplementedError) as refusal:
        pytest.skip(f"torch: {refusal}")


def _feed(optimizer: torch.optim.Optimizer, histories: list[list[Tensor]]) -> None:
    """Step through gradients: ``histories[i][t]`` is the i-th parameter's at step t."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for grads in zip(*histories, strict=True):
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()


def _tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _scaling(*shape: int, device: str = "cpu") -> Tensor:
    return torch.exp(torch.randn(*shape, dtype=torch.float64)).to(device)


def _histories(device: str, steps: int = 7) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of P (m, r) and of lora_A (r, n)."""
    return (
        [torch.randn(M, R, dtype=torch.float64).to(device) for _ in range(steps)],
        [torch.randn(R, N, dtype=torch.float64).to(device) for _ in range(steps)],
    )


def _held_still(device: str) -> list[nn.Parameter]:
    return [
        nn.Parameter(torch.ones(*shape, dtype=torch.float64, device=device))
        for shape in ((M, R), (R, N))
    ]


@pytest.mark.parametrize(("case", "variant", "device"), _variants())
def test_transferred_state_is_the_state_of_a_history_in_the_new_coordinates(
    case: OptimizerCase, variant: dict[str, Any], device: str
) -> None:
    _skip_if_torch_refuses(case, variant, device)
    alpha, beta = _scaling(R, device=device), _scaling(R, device=device)
    grads_P, grads_Q = _histories(device)
    old, new = (_create(case, _held_still(device), lr=0.0, **variant) for _ in range(2))
    _feed(old, [grads_P, grads_Q])
    _feed(new, [[g * beta for g in grads_P], [g * alpha[:, None] for g in grads_Q]])

    degrees = moments_of(old).degrees
    pairs = zip(old.param_groups[0]["params"], new.param_groups[0]["params"], strict=True)
    for (before, after), factor, axis in zip(
        pairs, (beta, alpha), (P_RANK_AXIS, Q_RANK_AXIS), strict=True
    ):
        states, expected = _tensors(old, before), _tensors(new, after)
        assert states.keys() == expected.keys() <= degrees.keys()
        for name, state in states.items():
            stack = state[None]
            if stack.ndim > axis and stack.shape[axis] != R:
                continue  # averaged over the rank axis: its own test
            moved = transfer(stack, factor[None], degrees[name], axis)[0]
            torch.testing.assert_close(moved, expected[name], rtol=1e-11, atol=0)
            if degrees[name] == 0:
                assert torch.equal(moved, state)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_every_state_that_torch_keeps_is_in_the_table(case: OptimizerCase) -> None:
    for options in ({}, {"amsgrad": True}, {"centered": True}, {"momentum": 0.5}):
        if not inspect.signature(case.cls).parameters.keys() >= options.keys():
            continue
        parameter = nn.Parameter(torch.ones(3, 2))
        parameter.grad = torch.ones_like(parameter)
        optimizer = case.cls([parameter], lr=0.1, **options)
        optimizer.step()
        assert _tensors(optimizer, parameter).keys() <= moments_of(optimizer).degrees.keys()


def test_crossing_alpha_and_beta_would_be_noticed() -> None:
    # P's state goes with beta: with alpha it is another history's.
    alpha, beta = _scaling(R), _scaling(R)
    grads_P, grads_Q = _histories("cpu")
    case = next(case for case in OPTIMIZERS if case.name == "adamw")
    old, new = (_create(case, _held_still("cpu"), lr=0.0) for _ in range(2))
    _feed(old, [grads_P, grads_Q])
    _feed(new, [[g * beta for g in grads_P], [g * alpha[:, None] for g in grads_Q]])
    before, after = (optimizer.param_groups[0]["params"][0] for optimizer in (old, new))
    crossed = transfer(old.state[before]["exp_avg"][None], alpha[None], 1, P_RANK_AXIS)[0]
    assert not torch.allclose(crossed, new.state[after]["exp_avg"], rtol=1e-2)


@given(
    st.integers(0, 2**20),
    st.integers(1, 3),
    st.sampled_from([(4, 3), (1, 1), (5, 2, 3, 3)]),
    st.integers(0, 2),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_transfer_is_its_reference(
    seed: int,
    layers: int,
    shape: tuple[int, ...],
    degree: int,
    dtype: torch.dtype,
    last_axis: bool,
) -> None:
    torch.manual_seed(seed)
    rank_axis = 2 if last_axis else 1
    state = torch.randn(layers, *shape, dtype=torch.float64).to(dtype)
    factor = _scaling(layers, shape[rank_axis - 1])
    moved = transfer(state, factor, degree, rank_axis)
    assert moved.data_ptr() != state.data_ptr()
    for layer in range(layers):
        expected = reference.transferred(
            state[layer].double().numpy(), factor[layer].numpy(), degree, rank_axis - 1
        )
        rtol = 1e-12 if dtype is torch.float64 else 1e-5
        np.testing.assert_allclose(moved[layer].double(), expected, rtol=rtol)


# Adafactor: one factor of its second moment runs along the rank axis, the other is a mean over it


def _adafactor_states(
    grads: list[Tensor], factor: Tensor, rank_axis: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States of one parameter after ``grads``, and after ``grads`` in the new coordinates."""
    shape = [1, 1]
    shape[rank_axis] = R
    states = []
    for history in (grads, [g * factor.reshape(shape) for g in grads]):
        parameter = nn.Parameter(torch.ones_like(history[0]))
        optimizer = torch.optim.Adafactor([parameter], lr=0.0)
        _feed(optimizer, [history])
        states.append(_tensors(optimizer, parameter))
    return states[0], states[1]


@pytest.mark.parametrize(("rank_axis", "own", "reduced"), [(1, "col_var", "row_var"),
                                                          (0, "row_var", "col_var")])  # fmt: skip
def test_adafactor_is_exact_where_squared_gradients_have_rank_one(
    rank_axis: int, own: str, reduced: str
) -> None:
    # Its model of the second moment: v_ij = R_i C_j, with one profile along the rank axis.
    along_rank, factor = torch.rand(R, dtype=torch.float64) + 0.1, _scaling(R)
    grads = []
    for _ in range(5):
        other = torch.randn(M, dtype=torch.float64)
        signs = torch.randn(M, R, dtype=torch.float64).sign()
        grad = other[:, None] * along_rank * signs
        grads.append(grad if rank_axis == 1 else grad.T.contiguous())
    before, after = _adafactor_states(grads, factor, rank_axis)
    axis = rank_axis + 1
    moved = transfer(before[own][None], factor[None], 2, axis)[0]
    torch.testing.assert_close(moved, after[own], rtol=1e-12, atol=0)
    moved = transfer_reduced(before[reduced][None], before[own][None], factor[None], 2, axis)[0]
    torch.testing.assert_close(moved, after[reduced], rtol=1e-12, atol=0)


def test_adafactors_second_moment_is_transferred_whole_under_its_own_model() -> None:
    # Whatever the gradients were: v_ij = R_i C_j / mean(R) gets exactly the factors f_j^2.
    factor = _scaling(R)
    grads = [torch.randn(M, R, dtype=torch.float64) for _ in range(5)]
    before, _ = _adafactor_states(grads, factor, rank_axis=1)
    row, col = before["row_var"][None], before["col_var"][None]
    new_col = transfer(col, factor[None], 2, P_RANK_AXIS)
    new_row = transfer_reduced(row, col, factor[None], 2, P_RANK_AXIS)

    def relative(row: Tensor, col: Tensor) -> Tensor:
        variance = row @ col / row.mean(-2, keepdim=True)
        return variance / variance[..., :1]

    expected = relative(row, col) * (factor / factor[0]).square()
    torch.testing.assert_close(relative(new_row, new_col), expected, rtol=1e-12, atol=0)
    # Both factors of one matrix have one mean.
    torch.testing.assert_close(new_row.mean(), new_col.mean(), rtol=1e-12, atol=0)


def test_a_reduced_state_without_a_partner_yet_takes_the_mean_factor() -> None:
    factor = torch.tensor([[1.0, 2.0, 3.0]])
    zero = torch.zeros(1, 1, 3)
    moved = transfer_reduced(torch.ones(1, 4, 1), zero, factor, 2, P_RANK_AXIS)
    torch.testing.assert_close(moved, torch.full((1, 4, 1), 14 / 3))


# The table


class _Unknown(torch.optim.Adam):
    """A subclass is not its parent."""


def test_an_unknown_class_is_refused_by_name() -> None:
    optimizer = _Unknown([nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match=r"_Unknown.*register_moments"):
        moments_of(optimizer)


def test_a_registered_class_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_TABLE, _Unknown, raising=False)
    register_moments(_Unknown, {"exp_avg": 1, "exp_avg_sq": 2})
    entry = moments_of(_Unknown([nn.Parameter(torch.ones(1))]))
    degrees = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2}
    assert entry == Moments(degrees, linear_in_rate=False)  # that is not known of it
    del _TABLE[_Unknown]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("AdamW", {"exp_avg": 1}), TypeError, "optimizer_class is 'AdamW', not a subclass"),
        ((nn.Linear, {"exp_avg": 1}), TypeError, "not a subclass"),
        ((_Unknown, {"exp_avg": -1}), ValueError, "degree -1 of state 'exp_avg'"),
        ((_Unknown, {"exp_avg": 0.5}), ValueError, "degree 0.5 of state 'exp_avg'"),
    ],
)
def test_registering_nonsense_is_refused(
    arguments: tuple[Any, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        register_moments(*arguments)
    assert _Unknown not in _TABLE


def test_a_direction_degree_other_than_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match="direction_degree=2"):
        register_moments(_Unknown, {"exp_avg": 1}, direction_degree=2)


# The whole way through a re-basing


def _lora_model(dtype: torch.dtype) -> peft.PeftModel:
    base = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 4)).to(dtype)
    config = peft.LoraConfig(r=R, target_modules=["0", "2"], init_lora_weights=False)
    return peft.get_peft_model(base, config).to(dtype)


def _adapter(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _loss(model: nn.Module, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, N, generator=generator, dtype=dtype)
    y = torch.randn(16, 4, generator=generator, dtype=dtype)
    return (model(x) - y).square().mean()


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
@pytest.mark.parametrize("maximize", [False, True])
def test_a_rebasing_carries_states_and_gradients_into_the_new_coordinates(
    case: OptimizerCase, maximize: bool
) -> None:
    model = _lora_model(torch.float64)
    inner = _create(case, _adapter(model), lr=0.0, maximize=maximize)
    wrapped = scalora.ScaLoRA(inner, model, rule="exact")
    names = {id(p): name for name, p in model.named_parameters()}
    histories: list[list[Tensor]] = [[] for _ in _adapter(model)]
    for seed in range(4):
        inner.zero_grad()
        _loss(model, seed, torch.float64).backward()
        for history, parameter in zip(histories, _adapter(model), strict=True):
            history.append(parameter.grad.clone())
        inner.step()  # the parameters do not move: lr is 0
    before = {id(p): p.detach().clone() for p in _adapter(model)}

    inner.param_groups[0]["lr"] = 0.1
    internals.rebase(wrapped)

    for parameter, history in zip(_adapter(model), histories, strict=True):
        name = names[id(parameter)]
        layer = name.split(".lora_")[0].rpartition(".")[2]
        alpha, beta = wrapped.last_scaling[layer]
        assert torch.any(alpha != 1) and torch.any(beta != 1)
        is_P = "lora_B" in name
        own, others = (alpha, beta) if is_P else (beta[:, None], alpha[:, None])
        torch.testing.assert_close(parameter.data, before[id(parameter)] * own, rtol=1e-12, atol=0)
        torch.testing.assert_close(parameter.grad, history[-1] * others, rtol=1e-12, atol=0)

        replayed = nn.Parameter(before[id(parameter)])
        fresh = _create(case, [replayed], lr=0.0, maximize=maximize)
        _feed(fresh, [[grad * others for grad in history]])
        expected, states = _tensors(fresh, replayed), _tensors(inner, parameter)
        assert states.keys() == expected.keys()
        for key, state in states.items():
            if key in ("row_var", "col_var") and (key == "row_var") == is_P:
                continue  # averaged over the rank axis: exact only under Adafactor's model
            torch.testing.assert_close(state, expected[key], rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_rebasing_while_training_does_not_change_the_function(case: OptimizerCase) -> None:
    model = _lora_model(torch.float32)
    inner = case.cls(_adapter(model), lr=1e-3, **case.options)
    wrapped = scalora.ScaLoRA(inner, model, rule="exact", interval=1)
    x = torch.randn(16, N)
    for seed in range(5):
        wrapped.zero_grad()
        _loss(model, seed, torch.float32).backward()
        wrapped.step()
    wrapped.zero_grad()
    _loss(model, 5, torch.float32).backward()
    before = model(x).detach()
    internals.rebase(wrapped)
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=2e-5)
    scaled = torch.cat([torch.cat(pair) for pair in wrapped.last_scaling.values()])
    assert torch.any(scaled != 1)


def test_counters_are_exact_under_another_default_dtype() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    optimizer.state[parameter]["step"] = 257  # a number, as some keep it; bfloat16 has 256 and 258
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        states = moments_of(optimizer).stacked_states(optimizer, [parameter])
    finally:
        torch.set_default_dtype(default)
    assert states["step"].item() == 257
