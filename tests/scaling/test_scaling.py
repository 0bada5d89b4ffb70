from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samplers import BATCHES, COLUMNS, RANKS, SEEDS, SIDES, normal
from torch import Tensor

from scalora import optimal_scaling
from scalora.scaling.quadratic import quadratic_model

RULES = ["paper", "exact", "scalar", "direction"]
GRADIENT_RULES = ["paper", "exact", "scalar"]
NO_BOUND = 1e30  # far enough that clamping does not show in an objective
# Of the objective, relative to what it is without a step.  Below float64 the factors' gradients
# are rounded, so that no G has exactly them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass
class Layers:
    """A batch of LoRA pairs with the gradient G (float64) that their own gradients stem from."""

    P: Tensor
    Q: Tensor
    G: Tensor
    s: float

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        P, Q = self.P.double(), self.Q.double()
        return (
            (self.s * self.G @ Q).to(self.P.dtype),
            (self.s * self.G.mT @ P).to(self.P.dtype),
        )

    @property
    def factors_and_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (self.P, self.Q, *self.gradients)


def _random_layers(
    seed: int,
    kind: str,
    batch: tuple[int, ...],
    m: int,
    n: int,
    r: int,
    s: float,
    dtype: torch.dtype = torch.float64,
) -> Layers:
    generator = torch.Generator().manual_seed(seed)
    P, Q = normal(generator, *batch, m, r), normal(generator, *batch, n, r)
    G = normal(generator, *batch, m, n)
    if kind in COLUMNS:
        P, Q = COLUMNS[kind](P), COLUMNS[OF_Q.get(kind, kind)](Q)
    elif kind == "zero P":
        P = torch.zeros_like(P)
    elif kind == "rank-one gradient":
        G = G[..., :1] @ G[..., :1, :]
    elif kind == "tiny gradient":
        G = G * 1e-20
    elif kind == "huge gradient":
        G = G * 1e10
    return Layers(P.to(dtype), Q.to(dtype), G, s)


KINDS = [*COLUMNS, "rank-one gradient", "tiny gradient", "huge gradient", "zero P"]
# Where the columns of Q lie otherwise than those of P.
OF_Q = {"opposite columns": "duplicated columns", "nearly parallel": "generic"}


@st.composite
def layers(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,), kinds: list[str] = KINDS
) -> Layers:
    """Ranks go past both sides of the weight."""
    return _random_layers(
        seed=draw(SEEDS),
        kind=draw(st.sampled_from(kinds)),
        batch=draw(BATCHES),
        m=draw(SIDES),
        n=draw(SIDES),
        r=draw(RANKS),
        s=draw(st.sampled_from([1.0, 0.5, 2.0])),
        dtype=draw(st.sampled_from(dtypes)),
    )


def _each(*tensors: Tensor) -> list[tuple[np.ndarray, ...]]:
    """One tuple of float64 arrays a layer, batch dimensions flattened."""
    flat = [t.double().reshape(-1, *t.shape[-2:]).numpy() for t in tensors]
    return list(zip(*flat, strict=True))


def _vectors(tensor: Tensor) -> np.ndarray:
    return tensor.double().reshape(-1, tensor.shape[-1]).numpy()


def _moving(P: np.ndarray, Q: np.ndarray, g_P: np.ndarray, g_Q: np.ndarray) -> bool:
    """Whether either factor's move counts: neither half of the rank-one matrices is all zero."""
    matrices = reference.rank_one_matrices(P, Q, g_P, g_Q, 1.0)
    r = P.shape[1]
    return all(any(M.any() for M in half) for half in (matrices[:r], matrices[r:]))


# Optimality


@given(layers((torch.float64, torch.float32, torch.bfloat16)), st.sampled_from([1.0, 0.1, 7.0]))
@settings(max_examples=150)
def test_exact_rule_reaches_the_nonnegative_optimum(given_layers: Layers, L: float) -> None:
    data = given_layers.factors_and_gradients
    alpha, beta = optimal_scaling(
        *data, rule="exact", lipschitz=L, scaling=given_layers.s, bound=NO_BOUND
    )
    for (P, Q, g_P, g_Q, G), a, b in zip(
        _each(*data, given_layers.G), _vectors(alpha), _vectors(beta), strict=True
    ):
        if not _moving(P, Q, g_P, g_Q):
            assert np.all(a == 1) and np.all(b == 1)
            continue
        matrices = reference.rank_one_matrices(P, Q, g_P, g_Q, given_layers.s)
        reached = reference.objective(matrices, G, reference.weights(a, b, 1, 1, degree=1), L)
        best = reference.objective(matrices, G, reference.nonnegative_optimum(matrices, G, L), L)
        nothing = 0.5 * np.sum((G / L) ** 2)
        assert reached <= best + TOLERANCE[given_layers.P.dtype] * nothing


@given(layers(kinds=["generic", "duplicated columns", "nearly parallel"]))
@settings(max_examples=25)
def test_no_other_nonnegative_scaling_does_better(given_layers: Layers) -> None:
    data = given_layers.factors_and_gradients
    alpha, beta = optimal_scaling(*data, rule="exact", scaling=given_layers.s, bound=NO_BOUND)
    draw = np.random.default_rng(0)
    for (P, Q, g_P, g_Q, G), a, b in zip(
        _each(*data, given_layers.G), _vectors(alpha), _vectors(beta), strict=True
    ):
        matrices = reference.rank_one_matrices(P, Q, g_P, g_Q, given_layers.s)
        reached = reference.objective(matrices, G, reference.weights(a, b, 1, 1, degree=1))
        allowed = reached - 1e-10 * np.sum(G**2)
        for spread in (1e-3, 1e-1, 1.0):
            for _ in range(30):
                near = (
                    a * np.exp(spread * draw.normal(size=a.shape)),
                    np.abs(b + spread * draw.normal(size=b.shape)),
                )
                x = reference.weights(*near, 1, 1, degree=1)
                assert reference.objective(matrices, G, x) >= allowed


@given(layers((torch.float64, torch.float32)), st.sampled_from([0, 1]), SEEDS)
@settings(max_examples=100)
def test_direction_rule_reaches_the_optimum_of_the_given_direction(
    given_layers: Layers, degree: int, seed: int
) -> None:
    # A direction that has nothing to do with the gradient: lambda takes both signs.
    dtype, generator = given_layers.P.dtype, torch.Generator().manual_seed(seed)
    direction_P = normal(generator, *given_layers.P.shape).to(dtype)
    direction_Q = normal(generator, *given_layers.Q.shape).to(dtype)
    grad_P, grad_Q = given_layers.gradients
    alpha, beta = optimal_scaling(
        given_layers.P,
        given_layers.Q,
        grad_P,
        grad_Q,
        direction_P=direction_P,
        direction_Q=direction_Q,
        rule="direction",
        direction_degree=degree,
        lr=0.1,
        scaling=given_layers.s,
        bound=NO_BOUND,
    )
    for (P, Q, U_P, U_Q, G), a, b in zip(
        _each(given_layers.P, given_layers.Q, direction_P, direction_Q, given_layers.G),
        _vectors(alpha),
        _vectors(beta),
        strict=True,
    ):
        if not _moving(P, Q, U_P, U_Q):
            continue
        matrices = reference.rank_one_matrices(P, Q, U_P, U_Q, given_layers.s)
        reached = reference.objective(matrices, G, reference.weights(a, b, 0.1, 0.1, degree))
        best = reference.objective(matrices, G, reference.nonnegative_optimum(matrices, G))
        nothing = 0.5 * np.sum(G**2)
        assert reached <= best + 10 * TOLERANCE[dtype] * nothing


@given(layers((torch.float32,), kinds=["generic", "opposite columns", "nearly parallel"]))
@settings(max_examples=100)
def test_columns_that_cancel_do_not_run_away_in_float32(given_layers: Layers) -> None:
    # With more columns than the weight has room for, some combinations of them move nothing:
    # round-off in H must not turn those into descent.
    P, Q, grad_P, grad_Q = given_layers.factors_and_gradients
    sign = torch.ones_like(P).cumsum(-1).remainder(2) * 2 - 1
    directions = grad_P.sign() * sign, grad_Q.sign()
    alpha, beta = optimal_scaling(
        P,
        Q,
        grad_P,
        grad_Q,
        direction_P=directions[0],
        direction_Q=directions[1],
        rule="direction",
        scaling=given_layers.s,
        bound=NO_BOUND,
    )
    for (P_, Q_, U_P, U_Q, G), a, b in zip(
        _each(P, Q, *directions, given_layers.G), _vectors(alpha), _vectors(beta), strict=True
    ):
        matrices = reference.rank_one_matrices(P_, Q_, U_P, U_Q, given_layers.s)
        reached = reference.objective(matrices, G, reference.weights(a, b, 1, 1, degree=0))
        assert reached <= 1.01 * 0.5 * np.sum(G**2)


@given(layers())
@settings(max_examples=50)
def test_quadratic_model_is_the_gram_matrix_of_the_rank_one_matrices(given_layers: Layers) -> None:
    P, Q, grad_P, grad_Q = given_layers.factors_and_gradients
    model = quadratic_model(P, Q, grad_P, grad_Q, grad_P, grad_Q, given_layers.s)
    r = P.shape[-1]
    for i, (P_, Q_, g_P, g_Q, G) in enumerate(_each(P, Q, grad_P, grad_Q, given_layers.G)):
        H, lam = reference.quadratic(
            reference.rank_one_matrices(P_, Q_, g_P, g_Q, given_layers.s), G
        )
        np.testing.assert_allclose(
            model.H.reshape(-1, 2 * r, 2 * r)[i], H, rtol=1e-9, atol=1e-12 * np.abs(H).max()
        )
        np.testing.assert_allclose(
            model.lam.reshape(-1, 2 * r)[i], lam, rtol=1e-9, atol=1e-12 * np.abs(lam).max()
        )


def test_reference_gradients_are_those_of_autograd() -> None:
    layer = _random_layers(0, "generic", (), 5, 4, 3, 2.0)
    P, Q = layer.P.requires_grad_(), layer.Q.requires_grad_()
    (layer.G * (layer.s * P @ Q.T)).sum().backward()
    arrays = (t.detach().numpy() for t in (layer.G, P, Q))
    for expected, parameter in zip(
        reference.factor_gradients(*arrays, layer.s), (P, Q), strict=True
    ):
        np.testing.assert_allclose(parameter.grad, expected, rtol=1e-12)


@given(layers(kinds=["generic"]))
@settings(max_examples=20)
def test_predicted_move_is_the_first_order_part_of_a_real_step(given_layers: Layers) -> None:
    data = given_layers.factors_and_gradients
    alpha, beta = optimal_scaling(*data, scaling=given_layers.s, lr=(0.1, 0.2))
    for (P, Q, g_P, g_Q), a, b in zip(_each(*data), _vectors(alpha), _vectors(beta), strict=True):
        predicted = reference.move(P, Q, g_P, g_Q, a, b, 0.1, 0.2, given_layers.s, degree=1)
        new_P, new_Q = P * a - 0.1 * g_P * b, Q * b - 0.2 * g_Q * a
        moved = given_layers.s * (new_P @ new_Q.T - (P * a) @ (Q * b).T)
        second_order = given_layers.s * 0.1 * 0.2 * (g_P * b) @ (g_Q * a).T
        np.testing.assert_allclose(predicted, moved - second_order, rtol=1e-9, atol=1e-9)


# The paper's rule and its fallback


@pytest.mark.parametrize("rule", ["paper", "exact"])
def test_feasible_layers_get_the_published_closed_form(rule: str) -> None:
    feasible = 0
    for seed in range(40):
        layer = _random_layers(seed, "generic", (), m=12, n=10, r=2, s=1.0)
        arrays = _each(*layer.factors_and_gradients)[0]
        expected = reference.theorem(*arrays, L=3.0, lr=0.2)
        if expected is None:
            continue
        feasible += 1
        scaling = optimal_scaling(
            *layer.factors_and_gradients, rule=rule, lipschitz=3.0, lr=0.2, bound=NO_BOUND
        )
        np.testing.assert_allclose(torch.cat(scaling), expected, rtol=1e-8)
    assert feasible >= 10


def test_infeasible_layers_get_the_papers_two_scalars() -> None:
    infeasible = 0
    for seed in range(40):
        layer = _random_layers(seed, "generic", (), m=6, n=5, r=4, s=1.0)
        arrays = _each(*layer.factors_and_gradients)[0]
        if reference.theorem(*arrays, L=1.0, lr=1.0) is not None:
            continue
        infeasible += 1
        matrices = reference.rank_one_matrices(*arrays, 1.0)
        x = reference.scalar_optimum(matrices, layer.G.numpy(), L=3.0)
        for rule in ("paper", "scalar"):
            alpha, beta = optimal_scaling(
                *layer.factors_and_gradients, rule=rule, lipschitz=3.0, lr=0.2, bound=NO_BOUND
            )
            np.testing.assert_allclose(
                torch.cat([alpha, beta]), np.sqrt(x / 0.2), rtol=1e-8, atol=1e-6
            )
    assert infeasible >= 10


def test_a_batch_mixes_feasible_and_infeasible_layers() -> None:
    batch = _random_layers(0, "generic", (40,), 6, 5, 2, 1.0)
    together = torch.cat(optimal_scaling(*batch.factors_and_gradients, rule="paper"), -1)
    alone = [
        torch.cat(optimal_scaling(*(t[i] for t in batch.factors_and_gradients), rule="paper"))
        for i in range(40)
    ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-10, atol=0)
    tied = (together[:, 0] == together[:, 1]) & (together[:, 2] == together[:, 3])
    assert 0 < tied.sum() < 40


@given(layers((torch.float64, torch.float32)))
@settings(max_examples=60)
def test_exact_is_never_worse_than_the_other_rules_nor_than_plain_lora(
    given_layers: Layers,
) -> None:
    data = given_layers.factors_and_gradients
    s, dtype = given_layers.s, given_layers.P.dtype
    scalings = {
        rule: optimal_scaling(*data, rule=rule, scaling=s, bound=NO_BOUND)
        for rule in (*GRADIENT_RULES, "none")
    }
    for i, (P, Q, g_P, g_Q, G) in enumerate(_each(*data, given_layers.G)):
        matrices = reference.rank_one_matrices(P, Q, g_P, g_Q, s)
        reached = {
            rule: reference.objective(
                matrices,
                G,
                reference.weights(_vectors(alpha)[i], _vectors(beta)[i], 1, 1, degree=1),
            )
            for rule, (alpha, beta) in scalings.items()
        }
        for rule in ("paper", "scalar", "none"):
            assert reached["exact"] <= reached[rule] + TOLERANCE[dtype] * 0.5 * np.sum(G**2)


# Units and magnitude


@pytest.mark.parametrize("rule", GRADIENT_RULES)
@pytest.mark.parametrize("lipschitz", [1.0, "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-100, -66, 33, 70])
def test_multiplying_all_gradients_changes_nothing(
    rule: str, lipschitz: float | str, dtype: torch.dtype, exponent: int
) -> None:
    batch = _random_layers(1, "generic", (4,), 7, 6, 3, 1.0, dtype)
    P, Q, grad_P, grad_Q = batch.factors_and_gradients
    constant = 2.0**exponent  # 1e-30, 1e-20, 1e10, 1e21, and exact in every dtype
    before = optimal_scaling(P, Q, grad_P, grad_Q, rule=rule, lipschitz=lipschitz)
    after = optimal_scaling(
        P, Q, grad_P * constant, grad_Q * constant, rule=rule, lipschitz=lipschitz
    )
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def test_a_direction_of_degree_zero_answers_a_larger_gradient_with_a_larger_scaling() -> None:
    batch = _random_layers(2, "generic", (4,), 7, 6, 3, 1.0)
    P, Q, grad_P, grad_Q = batch.factors_and_gradients
    signs = {"direction_P": grad_P.sign(), "direction_Q": grad_Q.sign()}

    def scaled(constant: float, lipschitz: float | str) -> Tensor:
        return torch.cat(
            optimal_scaling(
                P, Q, constant * grad_P, constant * grad_Q, rule="direction", bound=NO_BOUND,
                lipschitz=lipschitz, **signs,
            )
        )  # fmt: skip

    torch.testing.assert_close(scaled(8.0, 1.0), 8 * scaled(1.0, 1.0), rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(scaled(8.0, "auto"), scaled(1.0, "auto"), rtol=1e-8, atol=1e-7)


@given(
    layers(kinds=[kind for kind in KINDS if kind != "zero P"]),
    st.sampled_from(RULES),
    st.sampled_from([(1.0, 1.0), (1e-4, 1e-4), (1e-4, 1.6e-3), (3e-2, 1e-3)]),
)
@settings(max_examples=100)
def test_auto_lipschitz_makes_the_step_as_long_as_plain_loras(
    given_layers: Layers, rule: str, lr: tuple[float, float]
) -> None:
    P, Q, grad_P, grad_Q = given_layers.factors_and_gradients
    directions = {}
    direction_P, direction_Q, degree = grad_P, grad_Q, 1
    if rule == "direction":
        direction_P, direction_Q, degree = grad_P.sign(), grad_Q.sign(), 0
        directions = {"direction_P": direction_P, "direction_Q": direction_Q}
    s = given_layers.s
    alpha, beta = optimal_scaling(
        P, Q, grad_P, grad_Q, rule=rule, lipschitz="auto", lr=lr, scaling=s, bound=NO_BOUND,
        **directions,
    )  # fmt: skip
    ones = np.ones(P.shape[-1])
    for (P_, Q_, U_P, U_Q), a, b in zip(
        _each(P, Q, direction_P, direction_Q), _vectors(alpha), _vectors(beta), strict=True
    ):
        if not _moving(P_, Q_, U_P, U_Q):
            continue
        step = np.linalg.norm(reference.move(P_, Q_, U_P, U_Q, a, b, *lr, s, degree))
        plain = np.linalg.norm(reference.move(P_, Q_, U_P, U_Q, ones, ones, *lr, s, degree))
        assert step == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_each_factors_scaling_answers_the_other_factors_learning_rate(rule: str) -> None:
    # The optimum fixes lr_Q alpha^2 and lr_P beta^2.
    batch = _random_layers(3, "generic", (4,), 7, 6, 3, 2.0)
    data = batch.factors_and_gradients
    alpha, beta = optimal_scaling(*data, rule=rule, scaling=2.0, bound=NO_BOUND)
    alpha_16, beta_16 = optimal_scaling(
        *data, rule=rule, scaling=2.0, bound=NO_BOUND, lr=(16.0, 1.0)
    )
    torch.testing.assert_close(alpha_16, alpha, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(beta_16, beta / 4, rtol=1e-9, atol=1e-6)


def test_a_learning_rate_may_be_a_tensor_with_one_value_a_layer() -> None:
    batch = _random_layers(4, "generic", (3,), 7, 6, 3, 1.0)
    data = batch.factors_and_gradients
    rates = torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64)
    together = torch.cat(optimal_scaling(*data, lr=(rates, 2 * rates)), -1)
    for i, rate in enumerate([0.1, 0.2, 0.3]):
        alone = optimal_scaling(*(t[i] for t in data), lr=(rate, 2 * rate))
        torch.testing.assert_close(together[i], torch.cat(alone), rtol=1e-10, atol=0)
    with_scalar = optimal_scaling(*data, lr=torch.tensor(0.2))
    torch.testing.assert_close(with_scalar, optimal_scaling(*data, lr=0.2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_lora_scaling_may_as_well_be_a_part_of_a_factor(rule: str) -> None:
    # W0 + s P Q^T with gradients s G Q, s G^T P is W0 + P' Q^T with P' = s P.  The step on P is
    # then s times as long in the weight: lr_P' = s^2 lr_P.
    layer = _random_layers(5, "generic", (), 7, 6, 3, 4.0)
    P, Q, grad_P, grad_Q = layer.factors_and_gradients
    with_s = optimal_scaling(P, Q, grad_P, grad_Q, rule=rule, scaling=4.0, bound=NO_BOUND)
    without = optimal_scaling(
        4 * P, Q, grad_P / 4, grad_Q, rule=rule, lr=(16.0, 1.0), bound=NO_BOUND
    )
    torch.testing.assert_close(with_s, without, rtol=1e-9, atol=1e-6)


# Safe cases


@given(
    layers((torch.float64, torch.float32, torch.bfloat16)),
    st.sampled_from([*RULES, "none"]),
    st.sampled_from([1.0, 1e-30, 1e30, "auto"]),
    st.sampled_from([1.0, 10.0, 1e3]),
    st.sampled_from([None, math.nan, math.inf, -math.inf]),
)
@settings(max_examples=150)
def test_every_result_is_finite_positive_and_within_the_bound(
    given_layers: Layers, rule: str, lipschitz: float | str, bound: float, broken: float | None
) -> None:
    P, Q, grad_P, grad_Q = given_layers.factors_and_gradients
    if broken is not None:
        grad_P = grad_P.clone()
        grad_P[..., 0, 0] = broken
    directions = {}
    if rule == "direction":
        directions = {"direction_P": grad_P.sign(), "direction_Q": grad_Q}
    for factors in optimal_scaling(
        P, Q, grad_P, grad_Q, rule=rule, lipschitz=lipschitz, bound=bound, **directions
    ):
        assert factors.shape == (*P.shape[:-2], P.shape[-1])
        assert factors.dtype == torch.promote_types(P.dtype, torch.float32)
        slack = 1 + 1e-6  # the bound itself, rounded to float32
        assert torch.all((factors >= 1 / bound / slack) & (factors <= bound * slack))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lipschitz", [1.0, "auto"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["grad_P", "grad_Q"])
def test_a_non_finite_gradient_leaves_its_layer_alone_and_no_other(
    rule: str, lipschitz: float | str, value: float, which: str
) -> None:
    batch = _random_layers(6, "generic", (3,), 7, 6, 3, 1.0)
    data = dict(zip(["P", "Q", "grad_P", "grad_Q"], batch.factors_and_gradients, strict=True))

    def scaled() -> tuple[Tensor, Tensor]:
        extra = {}
        if rule == "direction":
            extra = {f"direction_{f}": data[f"grad_{f}"].clone() for f in "PQ"}
        return optimal_scaling(**data, **extra, rule=rule, lipschitz=lipschitz)

    healthy = scaled()
    data[which] = data[which].clone()
    data[which][1, 2, 0] = value
    for before, after in zip(healthy, scaled(), strict=True):
        assert torch.all(after[1] == 1)
        torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=1e-10, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("zero", ["P", "Q", "everything"])
def test_a_layer_with_a_zero_factor_is_left_alone(rule: str, zero: str) -> None:
    batch = _random_layers(7, "generic", (), 7, 6, 3, 1.0)
    if zero in ("P", "everything"):
        batch.P.zero_()
    if zero in ("Q", "everything"):
        batch.Q.zero_()
    P, Q, grad_P, grad_Q = batch.factors_and_gradients
    directions = {}
    if rule == "direction":
        directions = {"direction_P": grad_P, "direction_Q": grad_Q}
    for factors in optimal_scaling(P, Q, grad_P, grad_Q, rule=rule, **directions):
        assert torch.all(factors == 1)


@pytest.mark.parametrize("rule", ["paper", "exact"])
def test_a_dead_column_is_scaled_by_one_and_the_others_as_without_it(rule: str) -> None:
    layer = _random_layers(8, "dead column", (), 9, 8, 3, 1.0)
    data = layer.factors_and_gradients
    whole = optimal_scaling(*data, rule=rule)
    alive = optimal_scaling(*(t[:, 1:] for t in data), rule=rule)
    for factors, others in zip(whole, alive, strict=True):
        assert factors[0] == 1
        torch.testing.assert_close(factors[1:], others, rtol=1e-9, atol=0)


def test_rank_one_adapters_are_scaled() -> None:
    layer = _random_layers(9, "generic", (), 7, 6, 1, 1.0)
    alpha, beta = optimal_scaling(*layer.factors_and_gradients, rule="exact")
    assert alpha.shape == beta.shape == (1,)
    assert alpha != 1 and beta != 1


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_is_its_layers(rule: str) -> None:
    batch = _random_layers(10, "generic", (2, 3), 7, 6, 3, 1.0)
    P, Q, grad_P, grad_Q = batch.factors_and_gradients
    data = {"P": P, "Q": Q, "grad_P": grad_P, "grad_Q": grad_Q}
    if rule == "direction":
        data |= {"direction_P": grad_P.sign(), "direction_Q": grad_Q.sign()}
    together = optimal_scaling(**data, rule=rule)
    for i in range(2):
        for j in range(3):
            alone = optimal_scaling(**{name: t[i, j] for name, t in data.items()}, rule=rule)
            for whole, part in zip(together, alone, strict=True):
                torch.testing.assert_close(whole[i, j], part, rtol=1e-9, atol=0)


def test_rule_none_scales_by_one() -> None:
    layer = _random_layers(11, "generic", (2,), 7, 6, 3, 1.0)
    for factors in optimal_scaling(*layer.factors_and_gradients, rule="none"):
        assert torch.equal(factors, torch.ones(2, 3, dtype=torch.float64))


def test_inputs_are_left_as_they_were() -> None:
    layer = _random_layers(12, "generic", (2,), 7, 6, 3, 1.0)
    data = layer.factors_and_gradients
    copies = [t.clone() for t in data]
    optimal_scaling(*data)
    assert all(torch.equal(t, copy) for t, copy in zip(data, copies, strict=True))


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "best"}, "rule='best'"),
        ({"rule": "direction"}, "needs direction_P and direction_Q"),
        ({"rule": "direction", "direction_P": torch.ones(4, 2)}, "needs direction_P"),
        ({"rule": "exact", "direction_P": torch.ones(4, 2)}, "other rules take neither"),
        ({"rule": "exact", "direction_Q": torch.ones(3, 2)}, "other rules take neither"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": (0.1, math.inf)}, "lr=inf"),
        ({"lipschitz": 0.0}, "lipschitz=0.0"),
        ({"lipschitz": -2.0}, "lipschitz=-2.0"),
        ({"lipschitz": math.nan}, "lipschitz=nan"),
        ({"lipschitz": "large"}, "lipschitz='large'"),
        ({"bound": 0.5}, "bound=0.5"),
        ({"bound": math.nan}, "bound=nan"),
        ({"grad_P": torch.ones(2, 4)}, r"grad_P is \(2, 4\)"),
        ({"grad_Q": torch.ones(5, 2)}, r"grad_Q is \(5, 2\)"),
        ({"direction_Q": torch.ones(2, 3)}, r"direction_Q is \(2, 3\)"),
        ({"Q": torch.ones(2, 3)}, "lora_A.weight is Q transposed"),
        ({"Q": torch.ones(5, 3, 2)}, "must be"),
        ({"P": torch.ones(4)}, "must be"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(
    arguments: dict[str, object], message: str
) -> None:
    valid = {
        "P": torch.ones(4, 2),
        "Q": torch.ones(3, 2),
        "grad_P": torch.ones(4, 2),
        "grad_Q": torch.ones(3, 2),
    }
    with pytest.raises(ValueError, match=message):
        optimal_scaling(**{**valid, **arguments})
