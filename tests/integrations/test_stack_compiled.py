"""torch.compile of the model and of the step: the same numbers as without."""

from __future__ import annotations

import shutil

import pytest
import torch
from models import Perceptron, loss, train, trainable, vectors, with_lora

import scalora


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def script(stack):
    return stack("compiled")


def make(*, compile_inner=False, **options):
    """A small model and its ScaLoRA."""
    torch.manual_seed(0)
    model = with_lora(Perceptron(), target_modules=["first", "second"])
    inner = torch.optim.AdamW(trainable(model), lr=1e-2)
    if compile_inner:
        inner.step = torch.compile(inner.step, backend="eager")
    return model, scalora.ScaLoRA(inner, model, **{"interval": 3, **options})


@pytest.mark.parametrize("rule", ["auto", "exact"])
def test_compiled_step_leaves_the_same_behind(rule):
    found = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        model, optimizer = make(rule=rule)
        step = wrap(optimizer.step)
        for _ in range(6):
            optimizer.zero_grad()
            value = loss(model, vectors(16, 12))
            value.backward()
            step()
        found.append((value.item(), optimizer.rebase_count, optimizer.step_factor))
    assert found[0] == found[1]
    assert found[0][1] > 0


def test_step_within_a_compiled_function_leaves_the_same_behind():
    found = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        model, optimizer = make()

        def step(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(model, vectors(16, 12))
            value.backward()
            optimizer.step()
            return value.detach()

        step = wrap(step)
        found.append(([step().item() for _ in range(6)], optimizer.rebase_count))
    assert found[0] == found[1]
    assert found[0][1] > 0


def test_compiled_model_with_a_carry_is_traced_anew_once():
    model, optimizer = make(accumulator="carry")
    expected = train(model, optimizer, vectors(16, 12), 7)

    model, optimizer = make(accumulator="carry")
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    assert train(compiled, optimizer, vectors(16, 12), 7) == expected
    assert optimizer.rebase_count > 1
    # As it is at first, and with carries in it; later re-basings change no shape.
    assert counter.frame_count == 2


def test_compiled_model_can_be_given_to_the_optimizer():
    model, _ = make()
    compiled = torch.compile(model, backend="eager")
    optimizer = scalora.ScaLoRA(torch.optim.AdamW(trainable(model)), compiled)
    assert len(optimizer.rebased_pairs) == 2


def test_inner_optimizer_may_be_compiled():
    losses = [train(*make(compile_inner=c), vectors(16, 12), 6) for c in (False, True)]
    # Without ScaLoRA a compiled AdamW rounds differently too.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_script_trains_and_rebases(script):
    run = script.main(21, backend="eager")
    assert run.losses[-1] < run.losses[0]
    assert run.optimizer.rebase_count == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_to_the_same_losses_within_round_off(script, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    eager = script.main(21, backend="eager").losses
    torch.compiler.reset()
    run = script.main(21)
    torch.testing.assert_close(run.losses, eager, rtol=1e-3, atol=0)
    assert run.optimizer.rebase_count == 2
