"""Every kind of PEFT layer: the function is kept, the base takes the change, the rest is left."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import internals
import models
import pytest
import torch
from layer_cases import (
    CASES,
    TOLERANCE,
    Case,
    gpt2,
)
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from training import optimizer_of
from transformers import BertForMaskedLM

import scalora
from scalora.fold.rounding import decode_residual


def _rebase_alone(optimizer: scalora.ScaLoRA) -> None:
    """Re-base on the gradients that are there, without the inner optimizer's step."""
    internals.rebase(optimizer, optimizer.rebase_count)


def _trained(case: Case, dtype: torch.dtype, **options: Any) -> tuple[Any, scalora.ScaLoRA, Tensor]:
    """A model whose factors have left their initial values, with gradients at hand."""
    model, inputs = case.model(dtype), case.batch(dtype)
    optimizer = optimizer_of(model, **options)
    models.train(model, optimizer, inputs, steps=4)
    optimizer.zero_grad()
    models.loss(model, inputs).backward()
    return model, optimizer, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rebasing_keeps_the_function_and_moves_the_base(case: Case, dtype: torch.dtype) -> None:
    model, optimizer, inputs = _trained(case, dtype)
    before = models.answers(model, inputs)
    bases = {n: models.layer(model, n).get_base_layer().weight.clone() for n in case.layers}
    _rebase_alone(optimizer)

    after = models.answers(model, inputs)
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE[dtype])
    assert optimizer.last_scaling.keys() == set(case.layers)
    for name, base in bases.items():
        moved = models.layer(model, name).get_base_layer().weight - base
        assert moved.norm() > 1e-3 * base.norm(), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_factors_and_gradients_are_carried_into_the_new_coordinates(case: Case) -> None:
    model, optimizer, inputs = _trained(case, torch.float64)
    before = {name: models.factors(models.layer(model, name)) for name in case.layers}
    _rebase_alone(optimizer)

    carried = {name: models.factors(models.layer(model, name)) for name in case.layers}
    optimizer.zero_grad()
    models.loss(model, inputs).backward()
    for name in case.layers:
        alpha, beta = optimizer.last_scaling[name]
        P, Q, grad_P, grad_Q = before[name]
        assert (alpha / beta).log().abs().max() > 1e-3, "a crossed scaling would go unnoticed"
        for found, expected in zip(
            carried[name], (P * alpha, Q * beta, grad_P * beta, grad_Q * alpha), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        true_gradients = models.factors(models.layer(model, name))[2:]
        for found, expected in zip(carried[name][2:], true_gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["exact", "paper", "scalar"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_scaling_is_the_optimum_of_the_layers_own_matrices(case: Case, rule: str) -> None:
    model, optimizer, _ = _trained(case, torch.float64, rule=rule, lipschitz=3.0)
    expected = {}
    for name in case.layers:
        lora = models.layer(model, name)
        expected[name] = scalora.optimal_scaling(
            *models.factors(lora),
            rule=rule,
            lipschitz=3.0,
            lr=1e-2,
            scaling=lora.scaling["default"],
        )
    _rebase_alone(optimizer)
    for name, scaling in expected.items():
        for found, wanted in zip(optimizer.last_scaling[name], scaling, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["linear", "Conv1D in GPT-2", "embedding", "conv2d 3x3"])
def test_loraplus_learning_rates_enter_the_optimum(name: str) -> None:
    case = CASES[name]
    lr, ratio = 1e-3, 16.0

    def last_scaling(lr_P: float, lr_Q: float) -> dict[str, tuple[Tensor, Tensor]]:
        torch.manual_seed(0)
        model, inputs = case.model(torch.float64), case.batch(torch.float64)
        inner = create_loraplus_optimizer(
            model,
            torch.optim.SGD,
            lr=lr,
            loraplus_lr_ratio=ratio,
            loraplus_lr_embedding=lr,
        )
        models.train(model, inner, inputs, steps=4)
        inner.zero_grad()
        models.loss(model, inputs).backward()
        optimizer = scalora.ScaLoRA(inner, model, rule="exact", lipschitz=2.0)
        groups = {id(p): g["lr"] for g in inner.param_groups for p in g["params"]}
        for layer in case.layers:
            lora = models.layer(model, layer)
            by_hand = scalora.optimal_scaling(
                *models.factors(lora),
                lipschitz=2.0,
                lr=tuple(groups[id(p)] for p in models.factor_parameters(lora)),
                scaling=lora.scaling["default"],
            )
            expected[layer] = by_hand
        if lr_P == lr_Q:
            for group in inner.param_groups:
                group["lr"] = lr_P
        before = models.answers(model, inputs)
        _rebase_alone(optimizer)
        torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-12)
        return optimizer.last_scaling

    expected: dict[str, tuple[Tensor, Tensor]] = {}
    apart = last_scaling(lr * ratio, lr)
    for layer, scaling in expected.items():
        for found, wanted in zip(apart[layer], scaling, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    equal = last_scaling(lr, lr)
    linear = [layer for layer in case.layers if layer != "tokens"]
    for layer in linear:
        alpha, beta = apart[layer]
        assert (beta / equal[layer][1] - 1).abs().max() > 0.5
        torch.testing.assert_close(alpha, equal[layer][0], rtol=1e-6, atol=0)


def test_dropout_in_training_leaves_the_evaluated_function_alone() -> None:
    model = CASES["linear"].model(torch.float64, lora_dropout=0.5)
    inputs = CASES["linear"].batch(torch.float64)
    optimizer = optimizer_of(model)
    models.train(model, optimizer, inputs, steps=4)
    optimizer.zero_grad()
    models.loss(model, inputs).backward()
    before = models.answers(model, inputs)
    base = models.layer(model, "first").get_base_layer().weight.clone()
    _rebase_alone(optimizer)
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-12)
    assert not torch.equal(base, models.layer(model, "first").get_base_layer().weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains_to_the_same_losses(reentrant: bool) -> None:
    case = CASES["Conv1D in GPT-2"]

    def run(checkpointing: bool) -> list[float]:
        torch.manual_seed(0)
        model, inputs = case.model(torch.float64), case.batch()
        model.config.use_cache = False
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.base_model.model.is_gradient_checkpointing
        optimizer = optimizer_of(model)
        losses = models.train(model, optimizer, inputs, steps=6)
        optimizer.zero_grad()
        models.loss(model, inputs).backward()
        before = models.answers(model, inputs)
        _rebase_alone(optimizer)
        torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-12)
        return losses

    assert run(checkpointing=True) == pytest.approx(run(checkpointing=False), rel=1e-9)


def test_modules_to_save_are_stepped_as_the_inner_optimizer_would_alone() -> None:
    case = CASES["modules_to_save"]

    def run(wrap: bool) -> Tensor:
        torch.manual_seed(0)
        model, inputs = case.model(torch.float64), case.batch()
        inner = torch.optim.AdamW(models.trainable(model), lr=1e-2)
        optimizer = scalora.ScaLoRA(inner, model, rule="exact") if wrap else inner
        head = model.get_base_model().classifier
        start = head.modules_to_save["default"].weight.detach().clone()
        original = head.original_module.weight.detach().clone()
        models.train(
            model, optimizer, inputs, steps=2
        )  # the first re-basing that scales is the 2nd
        assert torch.equal(original, head.original_module.weight)
        assert not torch.equal(start, head.modules_to_save["default"].weight)
        return head.modules_to_save["default"].weight.detach().clone()

    torch.testing.assert_close(run(wrap=True), run(wrap=False), rtol=0, atol=1e-12)


def _with_second_adapter(active: str | list[str]) -> Any:
    model = CASES["linear"].model()
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["first", "second"], init_lora_weights=False
    )
    model.add_adapter("other", config)
    model.base_model.set_adapter(active)
    return model


@pytest.mark.parametrize("active, idle", [("default", "other"), ("other", "default")])
def test_inactive_adapter_keeps_its_factors(active: str, idle: str) -> None:
    model, inputs = _with_second_adapter(active), CASES["linear"].batch()
    idle_factors = {n: p.clone() for n, p in model.named_parameters() if f".{idle}." in n}
    assert len(idle_factors) == 4
    optimizer = optimizer_of(model, adapter_name=active)
    models.train(model, optimizer, inputs, steps=4)
    optimizer.zero_grad()
    models.loss(model, inputs).backward()
    before = models.answers(model, inputs)
    _rebase_alone(optimizer)
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-5)
    alpha, _ = optimizer.last_scaling["first"]
    assert len(alpha) == (3 if active == "default" else 2)
    parameters = dict(model.named_parameters())
    for name, factor in idle_factors.items():
        assert torch.equal(factor, parameters[name]), name


def test_second_active_adapter_is_part_of_the_function_that_is_kept() -> None:
    model, inputs = _with_second_adapter(["default", "other"]), CASES["linear"].batch()
    optimizer = optimizer_of(model, adapter_name="default")
    models.train(model, optimizer, inputs, steps=4)
    optimizer.zero_grad()
    models.loss(model, inputs).backward()
    before = models.answers(model, inputs)
    _rebase_alone(optimizer)
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-5)
    assert optimizer.last_scaling.keys() == {"first", "second"}


HALF_BITS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("half_adapters", [False, True])
@pytest.mark.parametrize("dtype", HALF_BITS, ids=str)
@pytest.mark.parametrize("name", ["linear", "Conv1D in GPT-2", "embedding", "conv2d channels_last"])
def test_half_precision_base_takes_the_change_to_a_unit_in_the_last_place(
    name: str, dtype: torch.dtype, half_adapters: bool, rounding: str
) -> None:
    case = CASES[name]
    base = case.base().to(dtype)
    if case.channels_last:
        base = base.to(memory_format=torch.channels_last)
    model = models.with_lora(
        base,
        autocast_adapter_dtype=not half_adapters,
        target_modules=list(case.layers),
        **case.config,
    )
    inputs = case.batch(dtype)
    # SGD: AdamW's eps vanishes in float16.
    inner = torch.optim.SGD(models.trainable(model), lr=0.1)
    optimizer = scalora.ScaLoRA(inner, model, rule="exact", rounding=rounding)
    models.train(model, optimizer, inputs, steps=4)
    optimizer.zero_grad()
    models.loss(model, inputs).backward()

    def weight(layer: str) -> tuple[Tensor, Tensor]:
        """The base weight, and the weight that the layer stands for: both (m, n), float64."""
        lora = models.layer(model, layer)
        P, Q, _, _ = models.factors(lora)
        stored = lora.get_base_layer().weight.detach().flatten(1).double()
        if (
            rounding == "compensated"
            and (residual := internals.residual(optimizer, layer)) is not None
        ):
            weight = lora.get_base_layer().weight.detach().flatten(1)
            stored = stored + decode_residual(residual, weight).double()
        transposed = layer == "tokens" or lora.__dict__.get("fan_in_fan_out", False)
        stored = stored.T if transposed else stored
        return stored, stored + lora.scaling["default"] * P.double() @ Q.double().T

    assert {p.dtype for p in models.trainable(model)} == {dtype if half_adapters else torch.float32}
    before = {layer: weight(layer) for layer in case.layers}
    answers = models.answers(model, inputs)
    _rebase_alone(optimizer)
    for layer, (base_before, effective_before) in before.items():
        base_after, effective_after = weight(layer)
        change = (base_after - base_before).norm()
        assert change > 0
        # Stochastic rounding errs by at most a unit in the last place, compensation by a 254th.
        unit = HALF_BITS[dtype] / (254 if rounding == "compensated" else 1)
        largest = torch.maximum(base_before.abs(), base_after.abs())
        error = (effective_after - effective_before).abs()
        assert (error <= unit * largest + 1e-6).all(), layer
    torch.testing.assert_close(
        models.answers(model, inputs).float(), answers.float(), rtol=0, atol=10 * HALF_BITS[dtype]
    )


def test_merged_model_is_not_rebased() -> None:
    model, optimizer, inputs = _trained(CASES["linear"], torch.float32)
    before = models.answers(model, inputs)
    plain = models.bits(model)
    model.merge_adapter()
    merged = models.bits(model)
    _rebase_alone(optimizer)
    assert optimizer.last_scaling == {}
    models.assert_same_bits(model, merged)
    model.unmerge_adapter()
    for name, tensor in models.bits(model).items():
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=1e-6)
    _rebase_alone(optimizer)
    assert optimizer.last_scaling.keys() == {"first", "second"}
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-5)


def test_rebased_model_merges_and_unmerges_as_any_other() -> None:
    model, optimizer, inputs = _trained(CASES["linear"], torch.float64)
    _rebase_alone(optimizer)
    before = models.answers(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-12)
    model.unmerge_adapter()
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-12)


def test_rebasing_within_disable_adapter_keeps_the_function_outside() -> None:
    model, optimizer, inputs = _trained(CASES["linear"], torch.float32)
    before = models.answers(model.eval(), inputs)
    with model.disable_adapter():
        without = models.answers(model, inputs)
        _rebase_alone(optimizer)
    assert (without - before).abs().max() > 1e-2
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("broken", ["lora_A", "lora_B"])
def test_broken_factor_does_not_reach_the_base(broken: str, dtype: torch.dtype) -> None:
    case = CASES["linear"]
    model = models.with_lora(
        case.base().to(dtype), autocast_adapter_dtype=False, target_modules=list(case.layers)
    )
    inner = torch.optim.SGD(models.trainable(model), lr=0.1)
    optimizer = scalora.ScaLoRA(inner, model, rule="exact")
    models.train(model, optimizer, case.batch(dtype), steps=4)
    lora = models.layer(model, "first")
    with torch.no_grad():
        getattr(lora, broken)["default"].weight[0, 0] = torch.nan
    before = lora.get_base_layer().weight.clone()
    _rebase_alone(optimizer)
    assert torch.equal(lora.get_base_layer().weight, before)


def _left_conv(**convolution: Any) -> tuple[Any, Tensor]:
    base = models.Convolutions(nn.Conv2d(4, 6, 3, **convolution))
    model = models.with_lora(base, r=2, target_modules=["convolution", "head"])
    return model, models.vectors(12, 4, 9, 8)


def _left_attention() -> tuple[Any, Tensor]:
    model = models.with_lora(models.Attention(), target_modules=["attention", "head"])
    return model, models.vectors(12, 5, 12)


def _left_parameter() -> tuple[Any, Tensor]:
    model = models.with_lora(
        models.Perceptron(), target_modules=["second"], target_parameters=["first.weight"]
    )
    return model, models.vectors(64, 12)


def _left_embedding() -> tuple[Any, Tensor]:
    base = models.Embedder(max_norm=1.0)
    model = models.with_lora(base, target_modules=["tokens", "head"])
    return model, models.token_ids(16, 7)


def _left_frozen_factor() -> tuple[Any, Tensor]:
    model = CASES["linear"].model()
    models.layer(model, "first").lora_A["default"].weight.requires_grad_(False)
    return model, CASES["linear"].batch()


def _left_parametrized() -> tuple[Any, Tensor]:
    base = models.Perceptron()
    nn.utils.parametrizations.weight_norm(base.first)
    return models.with_lora(base, target_modules=["first", "second"]), models.vectors(64, 12)


LEFT_AS_PLAIN_LORA = {
    "grouped convolution": (lambda: _left_conv(groups=2), "convolution", "grouped", "head"),
    "dilated convolution": (
        lambda: _left_conv(dilation=2, padding="same"),
        "convolution",
        "dilation",
        "head",
    ),
    "reflect-padded convolution": (
        lambda: _left_conv(padding=1, padding_mode="reflect"),
        "convolution",
        "reflect",
        "head",
    ),
    "MultiheadAttention": (_left_attention, "attention", "MultiheadAttention", "head"),
    "target_parameters": (_left_parameter, "first", "ParamWrapper", "second"),
    "embedding with max_norm": (_left_embedding, "tokens", "max_norm", "head"),
    "frozen factor": (_left_frozen_factor, "first", "frozen", "second"),
    "parametrized base weight": (_left_parametrized, "first", "parametrization", "second"),
}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(
    "make, left, reason, other", LEFT_AS_PLAIN_LORA.values(), ids=LEFT_AS_PLAIN_LORA.keys()
)
def test_what_cannot_be_rebased_trains_on_as_plain_lora_under_one_warning(
    make: Callable[[], tuple[Any, Tensor]], left: str, reason: str, other: str
) -> None:
    model, inputs = make()
    model = model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    inner = torch.optim.SGD(models.trainable(model), lr=0.3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = scalora.ScaLoRA(inner, model, rule="exact", accumulator="dense")
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert len(messages) == 1, messages
    assert f"{left} (" in messages[0] and reason in messages[0]
    assert f"{other} (" not in messages[0]

    models.answers(model, inputs)  # max_norm renormalises what it looks up, once
    bases = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    losses = models.train(model, optimizer, inputs, steps=6)
    assert losses[-1] < losses[0]
    models.loss(model, inputs).backward()
    before = models.answers(model, inputs)
    _rebase_alone(optimizer)
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-12)
    moved = [
        name
        for name, parameter in model.named_parameters()
        if name in bases and (parameter - bases[name]).abs().max() > 1e-9
    ]
    assert moved == [f"base_model.model.{other}.base_layer.weight"]


def test_layer_whose_parameters_another_optimizer_has_stays_plain_lora() -> None:
    model, inputs = CASES["linear"].model(), CASES["linear"].batch()
    first, second = models.layer(model, "first"), models.layer(model, "second")
    inner = torch.optim.AdamW(models.factor_parameters(second), lr=1e-2)
    other = torch.optim.AdamW(models.factor_parameters(first), lr=1e-2)
    with pytest.warns(UserWarning, match=r"1 LoRA layers.*first \(.*not in the optimizer"):
        optimizer = scalora.ScaLoRA(inner, model, rule="exact")
    base = first.get_base_layer().weight.clone()
    for _ in range(4):
        model.zero_grad()
        models.loss(model, inputs).backward()
        optimizer.step()
        other.step()
    assert torch.equal(first.get_base_layer().weight, base)
    assert optimizer.last_scaling.keys() == {"second"}


VARIANTS = {
    "aLoRA": {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"},
    "VeLoRA": {"velora_config": {}},
    "MiCA": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_variant_that_is_more_than_a_low_rank_product_is_refused(config: dict[str, Any]) -> None:
    model = gpt2(**config).model()
    with pytest.raises(
        ValueError, match=r"no LoRA layer can be re-based.*transformer\.h\.0.*Variant"
    ):
        optimizer_of(model)


def test_layer_of_a_variant_among_plain_ones_stays_as_it_is() -> None:
    model, inputs = CASES["linear"].model(), CASES["linear"].batch()
    mica = models.with_lora(models.Perceptron(), target_modules=["first"], init_lora_weights="mica")
    model.base_model.model.first = mica.base_model.model.first
    with pytest.warns(UserWarning, match=r"1 LoRA layers.*first \(MiCALinearVariant"):
        optimizer = optimizer_of(model)
    base = models.layer(model, "first").get_base_layer().weight.clone()
    models.train(model, optimizer, inputs, steps=4)
    assert torch.equal(models.layer(model, "first").get_base_layer().weight, base)
    assert optimizer.last_scaling.keys() == {"second"}


@pytest.mark.parametrize(
    "targets, tied, sharer",
    [
        (["wte", "c_attn"], "transformer.wte", "lm_head"),
        (["lm_head", "c_attn"], "lm_head", "transformer.wte"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_folding_into_a_tied_base_weight_is_refused_with_both_names(
    targets: list[str], tied: str, sharer: str
) -> None:
    model = models.with_lora(models.gpt2(), target_modules=targets, fan_in_fan_out=True)
    with pytest.raises(ValueError, match="tied") as error:
        optimizer_of(model, accumulator="dense")
    assert f"{tied!r} is tied" in str(error.value)
    assert sharer in str(error.value).partition("is tied")[2]


def test_folding_into_a_tied_weight_of_a_masked_language_model_is_refused() -> None:
    base = BertForMaskedLM(models.bert_config())
    model = models.with_lora(base, target_modules=["query", "decoder"])
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder.*word_embeddings"):
        optimizer_of(model, accumulator="dense")


def test_tied_layers_with_tied_factors_stay_plain_lora() -> None:
    model = models.with_lora(
        models.gpt2().double(),
        target_modules=["wte", "lm_head", "c_attn"],
        fan_in_fan_out=True,
        ensure_weight_tying=True,
    )
    inputs = models.token_ids(12, 9)
    with pytest.warns(UserWarning, match=r"2 LoRA layers.*wte \(.*shared.*lm_head \(.*shared"):
        optimizer = optimizer_of(model)
    models.train(model, optimizer, inputs, steps=4)
    optimizer.zero_grad()
    models.loss(model, inputs).backward()
    before = models.answers(model, inputs)
    _rebase_alone(optimizer)
    assert optimizer.last_scaling.keys() == {f"transformer.h.{i}.attn.c_attn" for i in range(2)}
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-12)


def test_untied_head_and_embedding_are_rebased() -> None:
    base = models.gpt2(tie_word_embeddings=False).double()
    model = models.with_lora(base, target_modules=["wte", "lm_head"])
    inputs = models.token_ids(12, 9)
    optimizer = optimizer_of(model)
    models.train(model, optimizer, inputs, steps=4)
    optimizer.zero_grad()
    models.loss(model, inputs).backward()
    before = models.answers(model, inputs)
    _rebase_alone(optimizer)
    assert optimizer.last_scaling.keys() == {"transformer.wte", "lm_head"}
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-12)


def test_folding_into_a_base_weight_of_two_layers_is_refused() -> None:
    base = models.Perceptron(8, 8, 8)
    base.second.weight = base.first.weight
    model = models.with_lora(base, target_modules=["first"])
    with pytest.raises(ValueError, match=r"'first' is tied.*second"):
        optimizer_of(model, accumulator="dense")


def test_model_without_the_adapter_is_refused_with_the_adapters_that_are_there() -> None:
    with pytest.raises(ValueError, match=r"no LoRA adapter named 'default'.*found: \[\]"):
        base = models.Perceptron()
        scalora.ScaLoRA(torch.optim.SGD(base.parameters(), lr=0.1), base)
    with pytest.raises(ValueError, match=r"'missing'.*found: \['default', 'other'\]"):
        optimizer_of(_with_second_adapter("default"), adapter_name="missing")


class _ScaledEmbedding(nn.Embedding):
    """Scales its output, as Gemma's does; PEFT reads ``embed_scale`` and scales the adapter's."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.embed_scale = torch.tensor(3.0)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def test_embedding_that_scales_its_output_keeps_its_function() -> None:
    base = models.Embedder()
    base.tokens = _ScaledEmbedding(models.VOCABULARY, 10)
    model = models.with_lora(base, target_modules=["tokens"]).double()
    inputs = models.token_ids(16, 7)
    optimizer = optimizer_of(model)
    models.train(model, optimizer, inputs, steps=4)
    optimizer.zero_grad()
    models.loss(model, inputs).backward()
    before = models.answers(model, inputs)
    _rebase_alone(optimizer)
    torch.testing.assert_close(models.answers(model, inputs), before, rtol=0, atol=1e-12)
    assert optimizer.last_scaling.keys() == {"tokens"}


def test_accumulated_change_reaches_a_target_beyond_the_adapters_rank() -> None:
    size, rank = 16, 2

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Linear(size, size, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.weight(x)

    start = Line()
    inputs = models.vectors(128, size)
    wanted = inputs @ (start.weight.weight.detach() + models.vectors(size, size) / 4).T

    def distance(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - wanted).square().mean()

    def run(rule: str) -> tuple[float, Tensor, float]:
        torch.manual_seed(0)
        base = Line()
        base.load_state_dict(start.state_dict())
        model = models.with_lora(base, r=rank, lora_alpha=rank, target_modules=["weight"])
        optimizer = optimizer_of(model, lr=3e-2, rule=rule)
        losses = models.train(model, optimizer, inputs, steps=300, loss=distance)
        spectrum = scalora.delta_spectrum(model, start)["weight"]
        return losses[-1], spectrum, scalora.effective_rank(model, start)["weight"]

    plain_loss, plain_spectrum, plain_rank = run("none")
    assert (plain_spectrum > 1e-4 * plain_spectrum[0]).sum() <= rank
    assert plain_rank <= rank
    loss, spectrum, effective = run("exact")
    assert (spectrum > 0.05 * spectrum[0]).sum() > 2 * rank
    assert effective > 2 * rank
    assert loss < 0.5 * plain_loss
