"""Every method of an ablation on tiny models."""

from __future__ import annotations

import pytest
import torch
from ablation_methods import Sentences, Tokens, setup_of, started, train
from models import answers, token_ids
from torch import Tensor, nn

from scalora.ablation.change import effective_weights, trainable_parameters
from scalora.ablation.methods import RECIPES, SUITES, method_of
from scalora.ablation.methods.full import adapted_layers
from scalora.ablation.methods.schedule import linear_factor

TOKENS = Tokens()
METHODS = tuple(RECIPES)
# HiRA multiplies with the weights, which are about 0.02 here.
LEARNING_RATES = {"hira": 0.5}


def logits(model: nn.Module) -> Tensor:
    return answers(model, token_ids(3, 10))


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_starts_at_the_pretrained_model_and_its_loss_falls(name: str) -> None:
    pretrained = TOKENS.model(0)
    training = started(name, TOKENS, learning_rate=LEARNING_RATES.get(name, 1e-2))
    torch.testing.assert_close(logits(training.model), logits(pretrained), rtol=1e-4, atol=1e-5)
    losses = train(training, TOKENS, steps=TOKENS.steps)
    assert min(losses[-3:]) < losses[0] - 0.02


@pytest.mark.parametrize("name", [*METHODS, "scalora:accumulator=carry"])
def test_effective_weights_in_the_plain_model_give_the_same_answers(name: str) -> None:
    training = started(name, TOKENS, learning_rate=LEARNING_RATES.get(name, 1e-2))
    train(training, TOKENS)
    found = logits(training.model)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    layers = adapted_layers(TOKENS.model(0), TOKENS).shapes
    weights = effective_weights(training.model, layers)
    after = dict(training.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    plain = TOKENS.model(0)
    if name == "full":
        plain.load_state_dict(training.model.state_dict())
    pretrained = logits(plain)
    for layer, weight in weights.items():
        assert weight.shape == layers[layer]
        with torch.no_grad():
            plain.get_submodule(layer).weight.copy_(weight)
    torch.testing.assert_close(logits(plain), found, rtol=1e-4, atol=1e-4)
    assert name == "full" or not torch.allclose(pretrained, found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "full"])
def test_the_layers_are_those_that_lora_adapts(name: str) -> None:
    training = started(name, TOKENS)
    layers = adapted_layers(TOKENS.model(0), TOKENS).shapes
    if name == "full-adapted":
        assert trained_names(training.model) == {f"{layer}.weight" for layer in layers}
    else:
        assert effective_weights(training.model).keys() == layers.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_new_head_is_trained_by_every_method(name: str) -> None:
    training = started(name, Sentences())
    assert any("classifier" in parameter for parameter in trained_names(training.model))
    head = [p for n, p in training.model.named_parameters() if "classifier" in n]
    trained = [p for p in head if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    train(training, Sentences(), steps=3)
    assert not any(torch.equal(p, old) for p, old in zip(trained, before, strict=True))


def test_full_adapted_trains_the_head_and_nothing_else_besides() -> None:
    training = started("full-adapted", Sentences())
    layers = adapted_layers(Sentences().model(0), Sentences())
    assert layers.head == {"classifier.weight", "classifier.bias"}
    assert (
        trained_names(training.model) == {f"{name}.weight" for name in layers.shapes} | layers.head
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_decides_everything(name: str) -> None:
    def run(seed: int) -> Tensor:
        torch.rand(seed + 3)  # whatever else has drawn from the generator
        training = started(name, TOKENS, seed=seed)
        train(training, TOKENS, seed=1, steps=3)
        return logits(training.model)

    assert torch.equal(run(1), run(1))


def test_dropout_draws_the_same_for_every_method() -> None:
    def drawn(name: str) -> float:
        started(name, TOKENS, seed=7)
        return torch.rand(()).item()

    assert len({drawn(name) for name in METHODS}) == 1


def test_lora_and_scalora_begin_with_the_same_adapter() -> None:
    plain, rebased = (started(name, TOKENS, seed=3).model for name in ("lora", "scalora"))
    other = started("lora", TOKENS, seed=4).model
    factors = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, rebased.get_parameter(n)) for n, p in factors.items())
    assert not all(torch.equal(p, other.get_parameter(n)) for n, p in factors.items())


def test_options_reach_the_adapter_and_the_optimizer() -> None:
    model = started("lora:ranks=2:alpha=4:rslora=true", TOKENS).model
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (8, 4, True)
    assert started("lora:r=3", TOKENS).model.peft_config["default"].r == 3
    training = started("scalora:rule=direction:interval=3:carry_rank=20", TOKENS, seed=5)
    options = training.optimizer.options
    assert (options.rule, options.interval, options.carry_rank) == ("direction", 3, 20)
    assert options.seed == 5


def test_weight_decay_is_for_matrices() -> None:
    task = Tokens()
    task.weight_decay = 0.1
    for group in started("full", task).optimizer.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


def test_trainable_parameters() -> None:
    layers = adapted_layers(TOKENS.model(0), TOKENS).shapes.values()
    low_rank = sum(TOKENS.rank * (m + n) for m, n in layers)
    assert trainable_parameters(started("lora", TOKENS).model) == low_rank
    assert trainable_parameters(started("scalora", TOKENS).model) == low_rank
    assert trainable_parameters(started("full-adapted", TOKENS).model) == sum(
        m * n for m, n in layers
    )


def test_effective_weights_of_a_plain_model() -> None:
    model = TOKENS.model(0)
    assert effective_weights(model).keys() == {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    weights = effective_weights(model, ["lm_head", "model.embed_tokens"])
    assert weights["model.embed_tokens"].shape == (64, 23)
    with pytest.raises(ValueError, match="no layer 'head'"):
        effective_weights(model, ["head"])


def test_the_learning_rate_rises_and_falls_in_straight_lines() -> None:
    factors = [linear_factor(step, steps=10, warmup=2) for step in range(12)]
    expected = [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0]
    assert factors == pytest.approx(expected)
    assert linear_factor(0, steps=10, warmup=0) == 1


@pytest.mark.parametrize("name", METHODS)
def test_the_schedule_is_the_same_for_all(name: str) -> None:
    training = started(name, TOKENS)
    top = [group["initial_lr"] for group in training.optimizer.param_groups]
    assert TOKENS.learning_rates[0] in top
    for step in range(TOKENS.steps):
        factor = linear_factor(step, TOKENS.steps, 2)
        found = [group["lr"] for group in training.optimizer.param_groups]
        if name != "relora" or step < TOKENS.steps // 4:
            assert found == pytest.approx([factor * lr for lr in top])
        train(training, TOKENS, steps=1)


def test_a_method_is_named_by_its_spec() -> None:
    assert method_of("lora").name == "lora"
    assert method_of("lora:rslora=TRUE:r=08").name == "lora:r=8:rslora=true"
    assert method_of("scalora:interval=auto").name == "scalora"
    assert method_of("scalora:lipschitz=2:rule=paper").name == "scalora:rule=paper:lipschitz=2.0"
    assert method_of("scalora:rule=exact:lipschitz=auto").name == (
        "scalora:rule=exact:lipschitz=auto"
    )
    assert method_of("full").rate < method_of("lora").rate
    for suite in SUITES.values():
        assert len(set(suite)) == len(suite)
        assert all(method_of(spec).name == spec for spec in suite)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lara", "no method 'lara'.*lora, "),
        ("lora:rank=8", "lora takes r=, ranks=, base=, alpha=, rslora="),
        ("lora:r", "lora takes"),
        ("lora:r=8:r=9", "each once"),
        ("full:r=8", "full takes no options"),
        ("lora:r=x", "r= in .*'x' is not of type int"),
        ("lora:rslora=maybe", "not of type bool"),
        ("lora:r=8:ranks=2", "give one of them"),
        ("lora:r=0", "at least 1"),
        ("lora:base=int8", "base must be float32, bfloat16, float16"),
        ("scalora:interval=0", "interval=0 must be 'auto', 1"),
        ("scalora:rule=best", "is not one of"),
        ("scalora:interval=1.5", "interval='1.5' must be 'auto', 1"),
    ],
)
def test_a_wrong_spec_is_told_what_there_is(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_of(spec)


def test_rank_is_the_setups() -> None:
    training = method_of("lora").start(setup_of(TOKENS, rank=7))
    assert training.model.peft_config["default"].r == 7
