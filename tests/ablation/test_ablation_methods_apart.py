"""What single methods promise: restarts, preconditioning, initialisations, parameter counts."""

from __future__ import annotations

import pytest
import torch
from ablation_methods import Tokens, setup_of, started, train
from hypothesis import given
from hypothesis import strategies as st
from models import answers, token_ids, trainable
from torch import Tensor

from scalora import peft_layers
from scalora.ablation.change import trainable_parameters
from scalora.ablation.methods import method_of
from scalora.ablation.methods.full import adapted_layers
from scalora.ablation.methods.other_adapters import nearest_basis_rank
from scalora.ablation.methods.reflora import balancing
from scalora.ablation.methods.schedule import linear_factor

TOKENS = Tokens()


def moments(training, name: str) -> list[Tensor]:
    return [training.optimizer.state[p][name] for p in trainable(training.model)]


def test_relora_preserves_the_function_over_a_restart() -> None:
    training = started("relora:every=4", TOKENS)
    restart, training.after_step = training.after_step, None
    train(training, TOKENS, steps=4)
    before = answers(training.model, token_ids(3, 10))
    first = [p.detach().clone() for p in trainable(training.model)]
    restart(3)
    assert all(torch.equal(p, old) for p, old in zip(trainable(training.model), first, strict=True))
    restart(4)
    torch.testing.assert_close(
        answers(training.model, token_ids(3, 10)), before, rtol=1e-5, atol=1e-6
    )
    for pair in peft_layers.lora_pairs(training.model, "default"):
        assert not pair.P_parameter.any()
    fresh = trainable(started("lora", TOKENS, seed=1).model)
    for p, old, drawn in zip(trainable(training.model), first, fresh, strict=True):
        assert not torch.equal(p, old)
        assert p.std().item() == pytest.approx(drawn.std().item(), rel=0.2)


@pytest.mark.parametrize(("prune", "kept"), [(1.0, 0.0), (0.99, 0.01), (0.5, 0.5), (0.0, 1.0)])
def test_relora_prunes_the_smallest_moments(prune: float, kept: float) -> None:
    training = started(f"relora:every=4:prune={prune}", TOKENS)
    restart, training.after_step = training.after_step, None
    train(training, TOKENS, steps=4)
    names = ("exp_avg", "exp_avg_sq")
    before = [[m.clone() for m in moments(training, name)] for name in names]
    restart(4)
    after = [moments(training, name) for name in names]
    for first, second, old_first, old_second in zip(*after, *before, strict=True):
        left = first != 0
        assert left.sum() == int(kept * first.numel())
        assert torch.equal(first[left], old_first[left])
        # Otherwise a first moment would be divided by epsilon.
        assert torch.equal(second, old_second * left)
        if left.any() and not left.all():
            assert old_first[left].abs().min() >= old_first[~left].abs().max()
    assert all(state["step"] == 4 for state in training.optimizer.state.values())


def test_relora_goes_on_where_it_was() -> None:
    losses = train(started("relora:every=6", TOKENS, steps=24), TOKENS, steps=24)
    assert max(losses[6:]) < losses[0]
    assert min(losses[-3:]) < min(losses[:6])


def test_relora_warms_up_again_after_a_restart() -> None:
    training = started("relora:every=4:rewarm=2", TOKENS)
    found = []
    for step, batch in enumerate(TOKENS.batches(0, 12)):
        found.append(training.schedule.get_last_lr()[0] / TOKENS.learning_rates[0])
        TOKENS.loss(training.model, batch).backward()
        training.optimizer.step()
        training.schedule.step()
        training.after_step(step + 1)
    expected = [linear_factor(step, 12, 2) for step in range(12)]
    expected[4] /= 2
    expected[8] /= 2
    assert found == pytest.approx(expected)


@given(
    m=st.integers(2, 9),
    n=st.integers(2, 9),
    data=st.data(),
    scale=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_balancing_minimises_the_bound(
    m: int, n: int, data: st.DataObject, scale: float, seed: int
) -> None:
    r = data.draw(st.integers(1, min(m, n)))
    generator = torch.Generator().manual_seed(seed)
    # Orthonormal columns times mild factors: no eigenvalue is near the floor.
    P, Q = (
        torch.linalg.qr(torch.randn(k, r, generator=generator, dtype=torch.float64))[0]
        @ (torch.eye(r) + 0.2 * torch.rand(r, r, generator=generator, dtype=torch.float64))
        for k in (m, n)
    )
    P = P * 10**scale
    S, inverse = balancing(P.T @ P, Q.T @ Q)
    torch.testing.assert_close(S @ inverse, torch.eye(r, dtype=torch.float64))
    torch.testing.assert_close(S @ (P.T @ P) @ S, Q.T @ Q)

    def bound(S: Tensor) -> Tensor:
        return (P @ S @ P.T).square().sum() + (Q @ torch.linalg.inv(S) @ Q.T).square().sum()

    root = torch.linalg.cholesky(S)
    for _ in range(5):
        noise = torch.randn(r, r, generator=generator, dtype=torch.float64)
        other = root @ torch.linalg.matrix_exp(0.1 * (noise + noise.T)) @ root.T
        assert bound(S) <= bound(other) * (1 + 1e-9)


def test_reflora_steps_as_the_balanced_factors_would() -> None:
    generator = torch.Generator().manual_seed(0)
    P, Q, g_P, g_Q = (
        torch.randn(k, 3, generator=generator, dtype=torch.float64) for k in (7, 5, 7, 5)
    )
    S, inverse = balancing(P.T @ P, Q.T @ Q)
    R = torch.linalg.cholesky(S)
    refactored_P, refactored_Q = P @ R, Q @ torch.linalg.inv(R).T
    torch.testing.assert_close(refactored_P @ refactored_Q.T, P @ Q.T)
    torch.testing.assert_close(refactored_P.T @ refactored_P, refactored_Q.T @ refactored_Q)
    there = (refactored_P - 0.1 * g_P @ torch.linalg.inv(R).T) @ (refactored_Q - 0.1 * g_Q @ R).T
    here = (P - 0.1 * g_P @ inverse) @ (Q - 0.1 * g_Q @ S).T
    torch.testing.assert_close(here, there)


def test_balancing_leaves_a_layer_alone_whose_factor_is_zero() -> None:
    gramians = torch.stack([torch.zeros(2, 2), 4 * torch.eye(2)])
    S, inverse = balancing(gramians, torch.eye(2).expand(2, 2, 2))
    identity = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(S, torch.stack([identity, identity / 2]))
    torch.testing.assert_close(inverse, torch.stack([identity, identity * 2]))


def test_reflora_is_plain_lora_at_first_and_touches_gradients_alone() -> None:
    plain, refactored = (started(name, TOKENS) for name in ("lora", "reflora:after=3"))
    same = [train(training, TOKENS, steps=4) for training in (plain, refactored)]
    assert same[0] == same[1]
    before = answers(refactored.model, token_ids(3, 10))
    TOKENS.loss(refactored.model, next(TOKENS.batches(9, 1))).backward()
    gradients = [p.grad.clone() for p in trainable(refactored.model)]
    for group in refactored.optimizer.param_groups:
        group["lr"] = 0.0
    refactored.optimizer.step()
    assert torch.equal(answers(refactored.model, token_ids(3, 10)), before)
    assert not any(
        torch.allclose(p.grad, old)
        for p, old in zip(trainable(refactored.model), gradients, strict=True)
    )


def test_lora_plus_and_lora_fa_train_the_factors_apart() -> None:
    groups = started("lora+:ratio=8", TOKENS).optimizer.param_groups
    assert {group["initial_lr"] for group in groups if group["params"]} == {1e-2, 8e-2}
    trained = [n for n, p in started("lora-fa", TOKENS).model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_B" in name for name in trained)


def test_lora_ga_begins_along_the_gradient() -> None:
    model = TOKENS.model(0)
    for batch in TOKENS.batches(0, 2):
        TOKENS.loss(model, batch).backward()
    training = started("lora-ga:batches=2", TOKENS)
    for pair in peft_layers.lora_pairs(training.model, "default"):
        leading = torch.linalg.svd(model.get_submodule(pair.name).weight.grad)[2][: TOKENS.rank]
        overlap = torch.linalg.svdvals(leading @ pair.Q_parameter.T)
        torch.testing.assert_close(overlap, torch.ones(TOKENS.rank), rtol=0.02, atol=0)
    with pytest.raises(ValueError, match="choose a lower rank"):
        started("lora-ga:r=40", TOKENS)


def test_pissa_takes_the_principal_part() -> None:
    weight = TOKENS.model(0).model.layers[0].mlp.up_proj.weight
    for spec, tolerance in (("pissa", 1e-4), ("pissa:niter=16", 0.05)):
        pairs = peft_layers.lora_pairs(started(spec, TOKENS).model, "default")
        pair = next(p for p in pairs if p.name.endswith("up_proj"))
        found = torch.linalg.svdvals(pair.learned_change())[: TOKENS.rank]
        expected = torch.linalg.svdvals(weight)[: TOKENS.rank]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ["hira", "gralora", "miss", "randlora", "dora"])
def test_other_adapters_have_about_as_many_parameters_as_lora(name: str) -> None:
    for rank in (2, 8):
        low_rank, own = (
            trainable_parameters(method_of(spec).start(setup_of(TOKENS, rank=rank)).model)
            for spec in ("lora", name)
        )
        assert own == pytest.approx(low_rank, rel=0.35)


def test_an_own_rank_is_peft_s() -> None:
    for name in ("miss", "randlora", "hira", "gralora"):
        assert started(f"{name}:r=6", TOKENS).model.peft_config["default"].r == 6


def test_nearest_basis_rank_lies_between_one_and_full_rank() -> None:
    shapes = adapted_layers(TOKENS.model(0), TOKENS).shapes.values()
    # One product of full rank: r + 64 numbers per layer.
    assert nearest_basis_rank(shapes, 0) == 64
    assert nearest_basis_rank(shapes, 10**9) == 1
