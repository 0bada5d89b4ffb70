"""The estimators of mutual information against slow references, and on known answers."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samplers import normal

from examples.benchmark.miub.beyond_normal import paired
from examples.benchmark.miub.distributions import (
    correlated,
    identity,
    layer_paths,
    mapped,
    mixture,
    student,
    student_information,
)
from miub.estimators import (
    ESTIMATORS,
    Estimate,
    club,
    gaussian,
    infonce,
    l1out,
    ranked,
    tempered,
    vub,
)
from miub.estimators.bracket import bracket, fit_bracket
from miub.estimators.conditional import fit_linear
from miub.estimators.design import Design, design_by_columns, design_of
from miub.estimators.positive_definite import add_outer_product, cholesky, inverse_of_triangle
from miub.estimators.ranked import normal_scores
from miub.estimators.ridge import _fit, _fit_at_mean_leverage, fit_ridge
from miub.estimators.samples import Samples, prepare

EVERY = sorted(ESTIMATORS)
OF_MOMENTS = [tempered, gaussian, club, vub, l1out]


def pair(n: int, d: int, r: int, seed: int = 0, dtype=torch.float64):
    """Linearly dependent samples with noise of their own."""
    u = normal(seed, n, d, dtype=dtype)
    v = u @ normal(seed + 1, d, r, dtype=dtype) / d**0.5 + 0.5 * normal(seed + 2, n, r, dtype=dtype)
    return u, v


def design(u, v, noise=0.0) -> Design:
    return design_of(prepare(u, v, noise))


def bracketed(samples: Design, **options):
    """The bounds of one fit."""
    upper, lower = bracket([fit_bracket(samples, **options)])
    return tuple(Estimate(e.value[0], e.stderr[0], e.n, e.heaviest[0]) for e in (upper, lower))


def repeated(sampler, count: int, n: int, seed: int = 0):
    return sampler((count, n), torch.Generator().manual_seed(seed))


def reference_ridge(u, v, penalty):
    """Weights and intercept by the normal equations."""
    mean_u, mean_v = u.mean(0), v.mean(0)
    a, b = u - mean_u, v - mean_v
    identity = torch.eye(u.shape[1], dtype=u.dtype)
    weight = torch.linalg.solve(a.T @ a + penalty * identity, a.T @ b)
    return weight, mean_v - mean_u @ weight


def log_normal(x, mean, covariance):
    d = x - mean
    square = d @ torch.linalg.solve(covariance, d)
    return -(square + torch.logdet(covariance) + len(x) * math.log(2 * math.pi)) / 2


@settings(max_examples=25)
@given(n=st.integers(9, 24), d=st.integers(1, 30), r=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_fit_is_ridge_regression_and_its_left_out_errors_are_those_of_refitting(n, d, r, seed):
    u, v = pair(n, d, r, seed)
    samples = prepare(u, v, 0.05)
    ridge = fit_ridge(design_of(samples), penalties=(0.3,))
    found, fit = ridge.weight(samples.u), ridge.fit
    eps = 4 * torch.finfo(u.dtype).eps
    a = u - u.mean(0)
    penalty = (0.3 / n + eps) * a.square().sum() + n * samples.noise_u.item()
    weight, intercept = reference_ridge(u, v, penalty)
    size = weight.square().sum()
    shrinkage = ((found * weight).sum() / size).item()
    torch.testing.assert_close(found, shrinkage * weight, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(fit.squared_weight, found.T @ found, atol=1e-9, rtol=1e-7)
    assert round(shrinkage * 20) == pytest.approx(shrinkage * 20, abs=1e-6)
    fitted = v.mean(0) + shrinkage * (u @ weight + intercept - v.mean(0))
    torch.testing.assert_close(fit.residual, v - fitted, atol=1e-9, rtol=1e-7)
    # Without shrinkage and with the others' means: leaving one out by hand.
    hat = torch.linalg.solve(a.T @ a + penalty * torch.eye(d, dtype=u.dtype), a.T)
    leverage = (a * hat.T).sum(1)
    torch.testing.assert_close(
        fit.freedom[:, 0],
        (1 - 1 / n) - shrinkage * leverage,
        atol=1e-9,
        rtol=1e-7,
    )
    if shrinkage == 1:
        for i in (0, n - 1):
            kept = torch.arange(n) != i
            others_u, others_v = u[kept], v[kept]
            w = reference_penalised_about_own_mean(others_u, others_v, penalty)
            error = v[i] - (others_v.mean(0) + (u[i] - others_u.mean(0)) @ w)
            torch.testing.assert_close(fit.left_out_error[i], error, atol=1e-8, rtol=1e-6)


def reference_penalised_about_own_mean(u, v, penalty):
    return reference_ridge(u, v, penalty)[0]


def test_primal_and_dual_agree_where_samples_and_coordinates_are_about_as_many():
    u, v = pair(30, 29, 2)
    wide = torch.cat([u, torch.zeros(30, 2, dtype=u.dtype)], 1)
    narrow, dual = (fit_ridge(design(x, v), penalties=(0.1,)) for x in (u, wide))
    torch.testing.assert_close(narrow.fit.residual, dual.fit.residual, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(narrow.fit.freedom, dual.fit.freedom, atol=1e-8, rtol=1e-6)
    weight = dual.weight(prepare(wide, v, 0.0).u)
    torch.testing.assert_close(narrow.coefficients, weight[:29], atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(
        narrow.fit.squared_weight, dual.fit.squared_weight, atol=1e-8, rtol=1e-6
    )


@pytest.mark.parametrize(("n", "d"), [(24, 24), (24, 300), (600, 700), (40, 9)])
def test_a_design_that_is_read_by_columns_is_the_one_of_whole_samples(n, d, monkeypatch):
    monkeypatch.setattr("miub.estimators.design._AT_ONCE", 100 * n)
    u, v = pair(n, d, 2)
    u = 3 + u
    read = []

    def columns(start, end):
        read.append(end - start)
        return u[:, start:end].clone()

    found, expected = design_by_columns(columns, d, v, 0.05), design(u, v, 0.05)
    assert sum(read) == d
    assert d < n or max(read) <= 100
    torch.testing.assert_close(found.gram.tril(), expected.gram.tril())
    assert (found.u is None) == (d >= n)
    torch.testing.assert_close(found.energy, expected.energy)
    for name, value in vars(expected.margins).items():
        torch.testing.assert_close(getattr(found.margins, name), value)


def test_fits_that_are_evaluated_together_are_those_alone():
    pairs = [design(*pair(40, d, 2, seed), noise=0.05) for seed, d in enumerate((3, 50, 7))]
    fits = [fit_bracket(samples, (0.0, 0.1)) for samples in pairs]
    upper, lower = bracket(fits)
    alone = [bracket([fit]) for fit in fits]
    torch.testing.assert_close(upper.value, torch.cat([one.value for one, _ in alone]))
    torch.testing.assert_close(upper.stderr, torch.cat([one.stderr for one, _ in alone]))
    torch.testing.assert_close(upper.heaviest, torch.cat([one.heaviest for one, _ in alone]))
    # The noise that is drawn for the lower bound is each fit's own.
    torch.testing.assert_close(
        lower.value, torch.cat([one.value for _, one in alone]), atol=0.2, rtol=0
    )


def test_a_constant_read_by_columns_shares_nothing():
    _, v = pair(24, 3, 2, dtype=torch.float32)
    constant = design_by_columns(lambda start, end: torch.full((24, end - start), 3.7), 40, v, 0.0)
    assert not constant.margins.informative
    assert bracketed(constant)[0].value == 0


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200, 513])
def test_triangles_are_inverted_and_grams_are_products(size):
    x = normal(0, 2, size, size + 3)
    gram = torch.zeros(2, size, size, dtype=x.dtype)
    for part in x.split(7, -1):
        add_outer_product(gram, part)
    torch.testing.assert_close(gram.tril(), (x @ x.mT).tril())
    penalty = torch.tensor([0.5, 2.0], dtype=x.dtype)[:, None, None]
    factor = cholesky(gram, penalty)
    identity = torch.eye(size, dtype=x.dtype)
    torch.testing.assert_close(factor @ factor.mT, x @ x.mT + penalty * identity)
    torch.testing.assert_close(inverse_of_triangle(factor) @ factor, identity.expand(2, -1, -1))


def test_the_mean_leverage_is_the_mean_of_the_leverages_and_the_fit_is_the_same():
    samples = design(*pair(60, 7, 2), 0.05)
    penalty = 3 * torch.ones(1, 1, dtype=samples.gram.dtype)
    own, mean = _fit(samples, penalty), _fit_at_mean_leverage(samples, penalty)
    torch.testing.assert_close(own.coefficients, mean.coefficients)
    torch.testing.assert_close(own.fit.residual, mean.fit.residual)
    torch.testing.assert_close(own.fit.freedom.mean(), mean.fit.freedom.squeeze())


@pytest.mark.parametrize("n", [512, 513, 4096])
def test_the_penalty_is_the_one_that_predicts_samples_that_were_left_out_best(n):
    """By refitting without a tenth at a time; the choice may be a neighbour where two are close."""
    u, v = pair(n, 100, 2)
    v = v + 8 * normal(5, n, 2)
    penalties = (0.0, 0.1, 1.0, 10.0, 1000.0)
    whole = fit_ridge(design(u, v), penalties)
    size = (u - u.mean(0)).square().sum() / n
    losses = []
    for penalty in penalties:
        error = []
        for out in torch.arange(n).chunk(10):
            kept = torch.ones(n, dtype=torch.bool)
            kept[out] = False
            weight, intercept = reference_ridge(u[kept], v[kept], penalty * size)
            error.append(v[out] - intercept - u[out] @ weight)
        losses.append(torch.logdet(torch.cov(torch.cat(error).T)).item())
    alone = [fit_ridge(design(u, v), (penalty,)) for penalty in penalties]
    distances = [(whole.fit.residual - one.fit.residual).norm().item() for one in alone]
    best = distances.index(min(distances))
    assert distances[best] < 1e-9
    assert abs(best - losses.index(min(losses))) <= 1


@pytest.mark.parametrize("estimator", [gaussian, vub])
def test_more_samples_lead_to_the_truth(estimator):
    """With shrinkage and penalty of the first 512 they led away: to 0.88 and 0.62 of 1.02."""
    truth, sample = paired(25)
    u, v = (x.double() for x in sample((16384,), torch.Generator().manual_seed(0)))
    few, many = (estimator(u[:n], v[:n]) for n in (2048, 16384))
    for found in (few, many):
        assert abs(found.value - truth) < 3 * found.stderr
    assert many.stderr < 0.5 * few.stderr


def test_with_many_samples_nothing_is_shrunk():
    u, v = pair(20_000, 20, 2)
    weight, _ = reference_ridge(u, v, 0.0)
    found = fit_ridge(design(u, v)).coefficients
    assert (found - weight).norm() < 0.01 * weight.norm()


def test_the_order_leads_from_club_to_the_gaussian_value():
    u, v = pair(4000, 3, 2)
    joint = torch.cov(torch.cat([u, v], 1).T)
    S, C, S_u = joint[3:, 3:], joint[3:, :3], joint[:3, :3]
    R = S - C @ torch.linalg.solve(S_u, C.T)
    x = torch.linalg.eigvals(torch.linalg.solve(R, S)).real - 1
    values = [tempered(u, v, order=order).value.item() for order in (1e-4, 0.25, 0.5, 0.75, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(x.sum().item(), rel=0.01)
    assert values[-1] == pytest.approx(torch.log1p(x).sum().item() / 2, rel=0.01)
    half = (2 * torch.log1p(x / 2) + (1 + x) / (1 + x / 2) - 1).sum() / 2
    assert values[2] == pytest.approx(half.item(), rel=0.01)
    assert values[-1] == gaussian(u, v).value.item()


def test_the_tempered_bound_is_its_definition():
    """By Monte Carlo with explicit densities: v = u + e, q the true conditional."""
    generator = torch.Generator().manual_seed(0)
    u, e = (torch.randn(4000, generator=generator, dtype=torch.float64) for _ in range(2))
    v = u + 0.7 * e
    log_q = torch.distributions.Normal(u, 0.7).log_prob
    a = 0.5
    inner = torch.stack([torch.logsumexp(a * log_q(x), 0) for x in v[:1500]]) - math.log(4000)
    expected = torch.distributions.Normal(u, 0.7).log_prob(v).mean() - inner.mean() / a
    found = tempered(u[:, None], v[:, None])
    assert found.value.item() == pytest.approx(expected.item(), abs=0.05)


@pytest.mark.parametrize("name", ["club", "vub", "l1out", "infonce"])
def test_a_variational_estimator_is_the_loop_over_its_definition(name):
    u, v = pair(40, 3, 2)
    half = 20
    mean_u, mean_v = u.mean(0), v.mean(0)
    u, v = u - mean_u, v - mean_v
    values = []
    for train, test in ((slice(0, half), slice(half, 40)), (slice(half, 40), slice(0, half))):
        zero = torch.zeros(1, 1, dtype=u.dtype)
        part = Samples(u[train], v[train], zero, zero, torch.tensor(True), torch.zeros(()))
        q = fit_linear(part)(u[test], None)
        density = [
            [log_normal(v[test][i], q.means[j], q.covariance) for j in range(half)]
            for i in range(half)
        ]
        own = [density[i][i] for i in range(half)]
        if name == "club":
            others = [density[i][j] for i in range(half) for j in range(half) if i != j]
            value = sum(own) / half - sum(others) / len(others)
        elif name == "vub":
            mean, spread = v[train].mean(0), torch.cov(v[train].T)
            r = torch.distributions.MultivariateNormal(mean, spread)
            kls = [
                torch.distributions.kl_divergence(
                    torch.distributions.MultivariateNormal(q.means[i], q.covariance), r
                )
                for i in range(half)
            ]
            value = sum(kls) / half
        else:
            value = 0
            for i in range(half):
                rivals = [density[i][j] for j in range(half) if name == "infonce" or j != i]
                value += own[i] - torch.logsumexp(torch.stack(rivals), 0) + math.log(len(rivals))
            value /= half
        values.append(float(value))
    found = ESTIMATORS[name](u, v).value.item()
    assert found == pytest.approx(sum(values) / 2, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("d", "information", "n"), [(1, 2, 256), (4, 1, 256), (8, 10, 512)])
def test_gaussian_pairs_are_answered_without_bias(d, information, n):
    u, v = repeated(correlated(d, information), 40, n)
    found = gaussian(u, v)
    mean_error = found.value.mean().item() - information
    assert abs(mean_error) < 3 * found.stderr.mean().item() / 40**0.5 + 0.01
    spread = found.value.std().item()
    assert 0.6 < found.stderr.mean().item() / spread < 1.6
    upper = tempered(u, v)
    assert (upper.value > information).float().mean() > 0.95
    assert upper.value.mean() < 2 * information


@pytest.mark.parametrize(
    ("inputs", "outputs", "noise"),
    [(128, 128, 0.01), (96, 384, 0.01), (96, 384, 0.1), (256, 64, 0.1)],
)
def test_a_layers_paths_are_answered_also_with_more_outputs_than_tokens(inputs, outputs, noise):
    truth, sampler = layer_paths(inputs, outputs, 4, 1.0, noise)
    u, v = repeated(sampler, 6, 256)
    assert gaussian(u, v, noise=noise).value.mean().item() == pytest.approx(truth, rel=0.06)
    upper = tempered(u, v, noise=noise).value
    assert (upper >= truth).all()
    assert (upper <= 2.2 * truth).all()


def test_the_bracket_is_the_tempered_bound_over_a_lower_one():
    u, v = repeated(correlated(4, 2.0), 30, 256)
    upper, lower = bracketed(design(u, v))
    assert torch.equal(upper.value, tempered(u, v).value)
    assert (lower.value <= 2 + 2 * lower.stderr).float().mean() > 0.95
    assert lower.value.mean() > 1.5
    independent = bracketed(design(*repeated(correlated(4, 0.0), 30, 256)))[1]
    assert independent.value.mean() < 0.01
    assert (lower.value <= math.log(256)).all()


@pytest.mark.parametrize("estimator", [*(ESTIMATORS[name] for name in EVERY), ranked])
def test_independent_samples_share_about_nothing(estimator):
    u, v = repeated(correlated(3, 0.0), 5, 200)
    assert estimator(u, v).value.abs().max() < 0.2


@pytest.mark.parametrize("estimator", [*(ESTIMATORS[name] for name in EVERY), ranked])
def test_autocast_changes_nothing(estimator):
    u, v = pair(128, 6, 3, dtype=torch.float32)
    found = estimator(u, v, noise=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = estimator(u, v, noise=0.01)
    assert torch.equal(again.value, found.value) and torch.equal(again.stderr, found.stderr)


@pytest.mark.parametrize("estimator", [*(ESTIMATORS[name] for name in EVERY), ranked])
def test_batches_are_the_loop_over_them(estimator):
    u, v = normal(0, 2, 3, 40, 5), normal(1, 2, 3, 40, 2)
    v = v + u[..., :2]
    found = estimator(u, v)
    assert found.value.shape == found.stderr.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            single = estimator(u[i, j], v[i, j])
            torch.testing.assert_close(found.value[i, j], single.value, atol=1e-8, rtol=1e-6)
            torch.testing.assert_close(found.stderr[i, j], single.stderr, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("estimator", [tempered, gaussian])
def test_scales_rotations_shifts_and_the_order_of_samples_do_not_matter(estimator, noise):
    u, v = pair(60, 5, 3)
    expected = estimator(u, v, noise=noise).value
    turn_u, turn_v = (torch.linalg.qr(normal(k, d, d))[0] for k, d in ((7, 5), (8, 3)))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for other in (
        estimator(1e5 * u, 1e-5 * v, noise=noise),
        estimator(u @ turn_u, v @ turn_v, noise=noise),
        estimator(u + 100, v - 100, noise=noise),
        estimator(u[order], v[order], noise=noise),
    ):
        torch.testing.assert_close(other.value, expected, atol=1e-6, rtol=1e-6)


def test_without_noise_any_linear_map_of_v_leaves_the_value():
    u, v = pair(60, 5, 3)
    map_ = normal(9, 3, 3)
    torch.testing.assert_close(
        gaussian(u, v @ map_).value, gaussian(u, v).value, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("f", [*(ESTIMATORS[name] for name in EVERY), ranked])
class TestInput:
    def test_wrong_input_is_refused(self, f):
        u, v = pair(40, 3, 2)
        with pytest.raises(ValueError, match="must hold the same samples"):
            f(u, v[:39])
        with pytest.raises(ValueError, match="samples are needed"):
            f(u[:7], v[:7])
        with pytest.raises(ValueError, match="noise must be"):
            f(u, v, noise=-1)
        with pytest.raises(ValueError, match="one-dimensional"):
            f(u[:, 0], v[:, 0])
        with pytest.raises(TypeError, match="floating-point"):
            f(u.long(), v)
        with pytest.raises(TypeError, match="floating-point"):
            f(u.numpy(), v)

    def test_a_constant_shares_nothing(self, f):
        u, v = pair(40, 3, 2, dtype=torch.float32)
        for a, b in ((u, torch.full_like(v, 3.7)), (torch.zeros_like(u), v)):
            assert f(a, b).value == 0
            assert f(a, b, noise=0.01).value == 0

    def test_what_is_not_finite_gives_nan_and_leaves_the_rest_of_a_batch_alone(self, f):
        u = normal(0, 3, 40, 3, dtype=torch.float32)
        v = normal(1, 3, 40, 2, dtype=torch.float32)
        clean = f(u, v).value
        u[1, 5, 0] = float("nan")
        v[2, 7, 1] = float("inf")
        found = f(u, v).value
        torch.testing.assert_close(found[0], clean[0])
        assert found[1:].isnan().all()

    def test_samples_and_the_global_random_state_are_left_alone(self, f):
        u, v = pair(40, 3, 2, dtype=torch.float32)
        u.requires_grad_()
        before = u.detach().clone(), v.clone(), torch.get_rng_state()
        found = f(u, v, noise=0.01)
        assert torch.equal(u, before[0]) and torch.equal(v, before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
        assert not found.value.requires_grad and found.value.dtype == torch.float32
        assert torch.equal(f(u, v, noise=0.01).value, found.value)

    def test_half_precision_samples_are_estimated_in_float32(self, f):
        u, v = pair(64, 3, 2, dtype=torch.float32)
        u, v = u.bfloat16(), v.bfloat16()
        expected = f(u.float(), v.float())
        assert torch.equal(f(u, v).value, expected.value)

    def test_inference_mode_gives_the_same(self, f):
        u, v = pair(40, 3, 2, dtype=torch.float32)
        expected = f(u, v, noise=0.01).value
        with torch.inference_mode():
            assert torch.equal(f(u.clone(), v.clone(), noise=0.01).value, expected)

    def test_a_constant_coordinate_and_a_huge_offset_do_no_harm(self, f):
        u, v = pair(200, 3, 2, dtype=torch.float32)
        expected = f(u, v, noise=0.01)
        padded = torch.cat([u, torch.ones(200, 1)], 1)
        assert f(padded, v, noise=0.01).value.isfinite()
        assert f(u, torch.cat([v, torch.ones(200, 1)], 1)).value.isfinite()
        shifted = f(u + 1000, v - 1000, noise=0.01)
        torch.testing.assert_close(shifted.value, expected.value, atol=0.02, rtol=0.02)


def test_an_order_out_of_range_or_too_few_samples_for_halves_are_refused():
    u, v = pair(40, 3, 2)
    for order in (0, 1.5):
        with pytest.raises(ValueError, match="order must be"):
            tempered(u, v, order=order)
    with pytest.raises(ValueError, match="draw 16"):
        club(u[:12], v[:12])


def test_the_closed_form_of_student_t_is_what_its_densities_say():
    d, freedom, rho = 2, 5, 0.6
    n = 200_000
    u, v = (x.double() for x in student(d, freedom, rho)((n,), torch.Generator().manual_seed(0)))
    scale = torch.eye(2 * d, dtype=torch.float64)
    scale[:d, d:] = scale[d:, :d] = rho * torch.eye(d, dtype=torch.float64)

    def log_t(x, covariance):
        k = x.shape[-1]
        square = (x * torch.linalg.solve(covariance, x.T).T).sum(-1)
        constant = (
            math.lgamma((freedom + k) / 2)
            - math.lgamma(freedom / 2)
            - k / 2 * math.log(freedom * math.pi)
            - torch.logdet(covariance).item() / 2
        )
        return constant - (freedom + k) / 2 * torch.log1p(square / freedom)

    identity = torch.eye(d, dtype=torch.float64)
    terms = log_t(torch.cat([u, v], 1), scale) - log_t(u, identity) - log_t(v, identity)
    error = terms.std().item() / n**0.5
    assert student_information(d, freedom, rho) == pytest.approx(terms.mean().item(), abs=4 * error)


def test_a_well_separated_mixture_tells_its_class():
    u, v = mixture(4, 5, 12.0)((4000,), torch.Generator().manual_seed(0))
    assert torch.equal(u.argmax(-1), 4 - v.argmax(-1))
    counts = torch.bincount(u.argmax(-1), minlength=4)
    assert (counts > 850).all()


def cauchy(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(2, n, d, generator=generator, dtype=torch.float64) - 0.5
    u, v = (math.pi * angles).tan()
    return u, v


@pytest.mark.parametrize("estimator", OF_MOMENTS)
def test_samples_without_moments_are_warned_of_and_give_nothing_negative(estimator):
    """`club` and `l1out` ran off to tens of nats below zero."""
    for seed in range(3):
        u, v = cauchy(2000, 3, seed)
        with pytest.warns(UserWarning, match=f"{estimator.__name__}: a single sample") as caught:
            found = estimator(u, v + u)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert 0 <= found.value < math.inf
        assert found.heaviest > 0.2


LIGHT = {
    "normal": identity,
    "uniform": torch.special.ndtr,
    "exponential": lambda x: -torch.special.ndtr(x).log(),
}


@pytest.mark.parametrize("n", [16, 64, 512, 8192])
@pytest.mark.parametrize("name", LIGHT)
def test_tails_that_have_moments_are_not_warned_of(name, n):
    u, v = mapped(correlated(3, 1.0), LIGHT[name], LIGHT[name])(
        (n,), torch.Generator().manual_seed(0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tempered(u, v)


def test_a_lower_bound_and_ranks_need_no_moments():
    u, v = cauchy(2000, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 <= infonce(u, v).value < 0.1
        assert ranked(u, v).value < 0.1
        assert ranked(u, u + v).value > 0.5


@pytest.mark.parametrize("estimator", [club, vub, l1out, infonce])
def test_halves_that_cannot_give_a_covariance_are_refused(estimator):
    """64 samples of 64 coordinates gave -4e5 nats, or 7e4, for a truth of 2."""
    u, v = correlated(64, 2.0)((128,), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="draw 132"):
        estimator(u, v)
    assert estimator(u, v, noise=0.01).value.isfinite()
    enough = correlated(6, 2.0)((16,), torch.Generator().manual_seed(0))
    assert club(*enough).value.isfinite()


def test_scores_are_the_normal_quantiles_of_mean_ranks():
    x = torch.tensor([[3.0, 5], [1, 5], [3, 5], [-2, 5], [9, 5], [3, 5]])
    normal = torch.distributions.Normal(0, 1)
    # Ranks 4, 2, 4, 1, 6, 4 of the first column, the three that are equal sharing 3, 4 and 5.
    quantiles = (torch.tensor([4.0, 2, 4, 1, 6, 4]) - 0.5) / 6
    found = normal_scores(x)
    torch.testing.assert_close(found[:, 0], normal.icdf(quantiles))
    assert (found[:, 1] == 0).all()
    x[2, 0] = math.inf
    assert normal_scores(x)[2, 0].isnan()


def test_increasing_maps_of_the_coordinates_leave_the_ranked_bound():
    u, v = (x.double() for x in correlated(3, 2.0)((400,), torch.Generator().manual_seed(0)))
    expected = ranked(u, v)
    for of_u, of_v in ((lambda x: x**3, torch.exp), (torch.asinh, lambda x: 5 * x - 2)):
        found = ranked(of_u(u), of_v(v))
        torch.testing.assert_close(found.value, expected.value)
        torch.testing.assert_close(found.stderr, expected.stderr)


@pytest.mark.parametrize("information", [2.0, 10.0])
def test_a_side_that_is_cubed_alone_is_covered_by_ranks(information):
    u, v = repeated(mapped(correlated(4, information), lambda x: x**3, identity), 10, 512)
    assert tempered(u, v).value.mean() < 0.8 * information
    found = ranked(u, v).value
    assert (found > information).all()
    assert (found < 2.4 * information).all()


@pytest.mark.parametrize(("d", "freedom"), [(1, 1), (2, 2), (5, 3)])
def test_a_scale_that_two_sides_share_is_told_by_ranks(d, freedom):
    truth = student_information(d, freedom, 0.0)
    found = ranked(*repeated(student(d, freedom, 0.0), 4, 4000))
    assert (found.value > truth - 2 * found.stderr - 0.01).all()
    assert (found.value < 2 * truth).all()


def test_ranks_bound_gaussian_samples_under_the_noise_model():
    truth, sampler = layer_paths(48, 48, 4, 1.0, 0.1)
    # Not with seed 0, of which the noise is drawn.
    found = ranked(*repeated(sampler, 6, 1024, seed=1), noise=0.1).value
    assert (found >= truth).all()
    assert (found <= 2.2 * truth).all()
