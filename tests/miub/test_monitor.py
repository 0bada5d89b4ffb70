"""The monitor: what it samples, when, and that it leaves training alone."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import internals
import pytest
import torch
from measuring import collector, encoder, measured, wake
from models import (
    VOCABULARY,
    Convolutions,
    Embedder,
    Perceptron,
    bert,
    gpt2,
    layer,
    outputs,
    token_ids,
    train,
    trainable,
    vectors,
    with_lora,
)
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import scalora
from examples.benchmark.miub.cost import peak_of_a_layer
from miub import MIUBMonitor, estimators
from miub.estimators.bracket import bracket, fit_bracket
from miub.estimators.design import design_of
from miub.estimators.samples import prepare

ALL = "all-linear"


def samples_of(model, name, run):
    """A layer's inputs and its base layer's outputs, by hooks of the test's own."""
    seen = []
    base = layer(model, name).get_base_layer()
    handle = base.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        run()
    handle.remove()
    return seen[0]


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_a_layers_value_is_the_estimators_on_its_two_paths():
    model = wake(with_lora(Perceptron(), target_modules=["first", "second"]))
    x = vectors(64, 12)
    report = measured(model, x)
    lora = layer(model, "second")
    inputs, output = samples_of(model, "second", lambda: model(x))
    contribution = lora.scaling["default"] * lora.lora_B["default"](lora.lora_A["default"](inputs))
    basis = torch.linalg.qr(lora.lora_B["default"].weight)[0]
    samples = prepare(output, contribution @ basis, 0.01)
    upper, lower = bracket([fit_bracket(design_of(samples), penalties=(0.0,))])
    row = report["second"]
    assert row.value == pytest.approx(upper.value.item(), rel=1e-3)
    assert row.stderr == pytest.approx(upper.stderr.item(), rel=1e-2)
    assert row.lower == pytest.approx(lower.value.item(), abs=0.2)
    assert row.lower < row.value
    assert (row.coordinates, row.tokens, row.step, row.rebased) == (3, 64, 1, False)


@pytest.mark.parametrize("name", sorted(estimators.ESTIMATORS))
def test_every_estimator_can_be_chosen_by_name(name):
    report = measured(encoder(), token_ids(8, 12), estimator=name)
    assert report.estimator == name
    assert all(math.isfinite(row.value) for row in report)


def test_padding_is_never_sampled():
    model = encoder()
    ids, mask = token_ids(8, 12), torch.ones(8, 12, dtype=torch.long)
    mask[:, 7:] = 0
    kept, keep = collector()
    with MIUBMonitor(model, every=1, estimator=keep), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    name = "bert.encoder.layer.0.attention.self.query"
    _, output = samples_of(model, name, lambda: model(input_ids=ids, attention_mask=mask))
    tokens = output[mask.bool()]
    u = kept[0][0]
    assert len(u) == 8 * 7
    distance = torch.cdist(u.double(), tokens.double()).min(1).values
    assert distance.max() < 1e-5


def test_as_many_tokens_as_asked_for_are_sampled_without_repetition():
    model = encoder()
    kept, keep = collector()
    with MIUBMonitor(model, every=1, tokens=40, estimator=keep), torch.no_grad():
        model(input_ids=token_ids(8, 12))
    u = kept[1][0]
    assert u.shape[0] == 40
    assert len(u.unique(dim=0)) == 40


def test_training_is_bit_for_bit_what_it_is_without_the_monitor():
    def losses(watch: bool) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        model = with_lora(bert(hidden_dropout_prob=0.1), target_modules=ALL, lora_dropout=0.1)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        monitor = MIUBMonitor(model, every=2, tokens=32)
        if watch:
            monitor.attach()
        found = train(model, optimizer, token_ids(8, 12), 5)
        return found, torch.rand(3)

    plain, watched = losses(False), losses(True)
    assert plain[0] == watched[0]
    assert torch.equal(plain[1], watched[1])


def test_it_measures_every_third_pass_and_no_layer_has_a_hook_between():
    model = encoder()
    before = hooks(model)
    monitor = MIUBMonitor(model, every=3, tokens=32)
    with monitor, torch.no_grad():
        for _ in range(7):
            model(input_ids=token_ids(8, 12))
            assert hooks(model) == before + 2
    assert hooks(model) == before
    history = monitor.report().history[monitor.report().layers[0]]
    assert [row.step for row in history] == [3, 6]


def test_runs_repeat_and_seeds_differ():
    model, ids = encoder(), token_ids(16, 12)
    first, again = (measured(model, ids, tokens=48) for _ in range(2))
    other = measured(model, ids, tokens=48, seed=1)
    values = [[row.value for row in report] for report in (first, again, other)]
    assert values[0] == values[1]
    assert values[0] != values[2]


def test_hooks_come_off_after_an_exception_in_the_model():
    model = encoder()
    before = hooks(model)
    with pytest.raises(IndexError), MIUBMonitor(model, every=1):
        model(input_ids=torch.full((8, 12), VOCABULARY + 5))
    assert hooks(model) == before
    assert measured(model, token_ids(8, 12)).layers


def test_a_monitor_that_is_attached_cannot_be_attached_again_but_later_it_can():
    model = encoder()
    monitor = MIUBMonitor(model, every=1, tokens=32)
    with monitor, pytest.raises(ValueError, match="attached already"):
        monitor.attach()
    for _ in range(2):
        with monitor, torch.no_grad():
            model(input_ids=token_ids(8, 12))
    assert [row.step for row in next(iter(monitor.report().history.values()))] == [1, 2]
    monitor.reset()
    with pytest.raises(ValueError, match="no layer was measured"):
        monitor.report()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_does_not_count_a_layer_twice(reentrant):
    model = encoder(target_modules=["query"])
    plain = measured(model, token_ids(8, 12))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    monitor = MIUBMonitor(model, every=1, tokens=64)
    with monitor:
        outputs(model, token_ids(8, 12)).sum().backward()
    report = monitor.report()
    assert [row.tokens for row in report] == [64, 64]
    assert [row.value for row in report] == pytest.approx([row.value for row in plain], rel=1e-4)


def test_gradients_under_selective_checkpointing_are_those_without_the_monitor():
    """Selective checkpointing keeps every product of the forward pass, in order."""
    contexts = partial(
        create_selective_checkpoint_contexts,
        [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
    )

    class Checkpointed(Perceptron):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False, context_fn=contexts)

    def gradients(watch: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = wake(with_lora(Checkpointed(), target_modules=["first", "second"]))
        monitor = MIUBMonitor(model, every=1)
        if watch:
            monitor.attach()
        outputs(model, vectors(64, 12)).square().mean().backward()
        assert not watch or len(monitor.report()) == 2
        return [parameter.grad for parameter in trainable(model)]

    for plain, watched in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, watched)


def test_under_autocast_the_estimate_is_in_float32():
    model = encoder()
    plain = measured(model, token_ids(8, 12))
    with torch.autocast("cpu", torch.bfloat16):
        cast = measured(model, token_ids(8, 12))
    for row in plain:
        assert cast[row.layer].value == pytest.approx(row.value, rel=0.1)


def test_inference_mode_and_evaluation_are_measured():
    model = encoder()
    monitor = MIUBMonitor(model, every=1, tokens=64)
    with monitor, torch.inference_mode():
        model(input_ids=token_ids(8, 12))
    plain = measured(model, token_ids(8, 12))
    assert [row.value for row in monitor.report()] == [row.value for row in plain]


def test_a_compiled_model_is_measured():
    model = encoder()
    compiled = torch.compile(model, backend="eager")
    ids = token_ids(8, 12)
    with torch.no_grad():
        compiled(input_ids=ids)
    monitor = MIUBMonitor(compiled, every=2, tokens=64)
    with monitor, torch.no_grad():
        compiled(input_ids=ids)
        compiled(input_ids=ids)
    assert len(monitor.report()) == len(measured(model, ids))


def test_a_fresh_adapter_shares_nothing():
    model = with_lora(Perceptron(), target_modules=["first", "second"])
    assert [row.value for row in measured(model, vectors(64, 12))] == [0.0, 0.0]


def test_several_active_adapters_are_measured_each_and_an_inactive_one_is_not():
    model = with_lora(Perceptron(), target_modules=["first"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["default", "second"])
    wake(model)
    report = measured(model, vectors(64, 12))
    assert report.adapters == ["default", "second"]
    assert report["first", "second"].coordinates == 2
    assert report["first", "second"].value != report["first", "default"].value
    model.set_adapter("second")
    assert measured(model, vectors(64, 12)).adapters == ["second"]
    with model.disable_adapter(), pytest.raises(ValueError, match="no layer was measured"):
        measured(model, vectors(64, 12))


def test_one_adapter_can_be_chosen():
    model = with_lora(Perceptron(), target_modules=["first"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["default", "second"])
    wake(model)
    assert measured(model, vectors(64, 12), adapter_name="second").adapters == ["second"]
    with pytest.raises(ValueError, match="no LoRA adapter 'third'"):
        MIUBMonitor(model, adapter_name="third")


KINDS = {
    "transposed base": (lambda: gpt2(), ["c_attn", "c_proj"], lambda: token_ids(8, 12)),
    "embedding": (lambda: Embedder(), ["tokens", "head"], lambda: token_ids(64)),
    "convolution": (
        lambda: Convolutions(nn.Conv2d(3, 6, 3, padding=1)),
        ["convolution"],
        lambda: vectors(4, 3, 5, 5),
    ),
    "1-d convolution": (
        lambda: Convolutions(nn.Conv1d(3, 6, 3)),
        ["convolution"],
        lambda: vectors(4, 3, 20),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_learned_path_of_every_kind_of_layer_is_what_the_layer_adds(kind):
    make, targets, inputs = KINDS[kind]
    model = wake(with_lora(make(), target_modules=targets)).eval()
    x = inputs()
    kept, keep = collector()
    monitor = MIUBMonitor(model, every=1, tokens=1000, estimator=keep)
    with monitor, torch.no_grad():
        outputs(model, x)
    for (u, v), row in zip(kept, monitor.report(), strict=True):
        lora = layer(model, row.layer)
        whole = []
        handle = lora.register_forward_hook(lambda _, args, out, to=whole: to.append(out))
        _, base = samples_of(model, row.layer, lambda: outputs(model, x))
        handle.remove()
        change, base = whole[0] - base, base
        if change.ndim > 2 and kind.endswith("convolution"):
            change, base = change.movedim(1, -1), base.movedim(1, -1)
        change, base = change.flatten(0, -2), base.flatten(0, -2)
        # All positions were drawn, in a random order: lengths and inner products stay.
        torch.testing.assert_close(u.sum(0), base.sum(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            v.norm(dim=1).sort().values, change.norm(dim=1).sort().values, atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_a_layer_of_a_lora_variant_is_measured_once(variant):
    model = wake(with_lora(Perceptron(), target_modules=["first"], **{variant: True}))
    kept, keep = collector()
    x = vectors(64, 12)
    with MIUBMonitor(model, every=1, estimator=keep), torch.no_grad():
        model(x)
    (_, v), lora = kept[0], layer(model, "first")
    product = lora.scaling["default"] * lora.lora_B["default"](lora.lora_A["default"](x))
    assert len(kept) == 1
    torch.testing.assert_close(v.norm(dim=1).sort().values, product.norm(dim=1).sort().values)


def test_dropout_on_the_adapters_input_does_not_enter():
    model = encoder(lora_dropout=0.5, target_modules=["query"])
    still = measured(model, token_ids(8, 12))
    lora = layer(model, still.layers[0])
    lora.train()
    assert measured(model, token_ids(8, 12)).layers == still.layers
    first = still.layers[0]
    assert measured(model, token_ids(8, 12))[first].value == still[first].value


def test_a_layer_with_too_few_tokens_is_left_out_with_one_warning():
    model = wake(with_lora(bert(), target_modules=["query", "classifier"])).eval()
    with pytest.warns(UserWarning, match="'classifier' had 8 tokens") as caught:
        report = measured(model, token_ids(8, 12), token_ids(8, 12))
    assert len(caught) == 1
    assert not any("classifier" in name for name in report.layers)


def test_a_layer_whose_mask_turns_out_to_have_too_few_tokens_is_left_out_of_the_report():
    """A mask on a device is first counted when the report fetches what was measured."""
    model = wake(with_lora(Perceptron(), target_modules=["first", "second"]))
    monitor = MIUBMonitor(model, every=1)
    with monitor, torch.no_grad():
        model(vectors(64, 12))
    internals.pending(monitor)[0].numbers[3] = 15
    with pytest.warns(UserWarning, match="'first' had 15 tokens"):
        report = monitor.report()
    assert report.layers == ["second"]


def test_a_token_that_outweighs_the_others_is_warned_of_once_with_its_layer():
    model = wake(with_lora(Perceptron(), target_modules=["first", "second"]))
    x = vectors(64, 12)
    for estimator in ("tempered", "club"):
        even, outlier = x.clone(), x.clone()
        outlier[3] *= 1000
        monitor = MIUBMonitor(model, every=1, estimator=estimator)
        with monitor, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            model(even)
            monitor.report()
            model(outlier)
        with pytest.warns(UserWarning, match="'first' for one, a single token") as caught:
            monitor.report()
        assert len(caught) == 1
        assert caught[0].filename == __file__
        monitor.detach()
        with monitor, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            model(outlier)
            monitor.report()


@pytest.mark.parametrize("estimator", ["club", "infonce"])
def test_without_noise_a_layer_of_a_high_rank_needs_more_tokens(estimator):
    model = wake(with_lora(Perceptron(), target_modules=["first"], r=8))
    options = {"estimator": estimator, "noise": 0.0}
    with (
        pytest.warns(UserWarning, match="had 19 tokens in a forward pass; 20 are needed"),
        pytest.raises(ValueError, match="no layer was measured"),
    ):
        measured(model, vectors(19, 12), **options)
    assert math.isfinite(measured(model, vectors(20, 12), **options)["first"].value)
    assert measured(model, vectors(19, 12), estimator=estimator)["first"].tokens == 19


def test_a_merged_adapter_is_refused():
    model = encoder()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"), MIUBMonitor(model):
        pass


def test_layers_that_compute_without_being_called_are_named():
    model = nn.Sequential(nn.MultiheadAttention(12, 2, batch_first=True))
    lora = with_lora(model, target_modules=["0"])
    with pytest.raises(ValueError, match="no LoRA layer can be measured"):
        MIUBMonitor(lora)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"tokens": 8}, "tokens must be"),
        ({"noise": -0.1}, "noise must be"),
        ({"estimator": "entropy"}, "estimator must be one of"),
    ],
)
def test_an_argument_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MIUBMonitor(with_lora(Perceptron(), target_modules=["first"]), **options)


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="get_peft_model"):
        MIUBMonitor(Perceptron())
    with pytest.raises(TypeError, match="torch module"):
        MIUBMonitor("bert")


def rebased_model():
    torch.manual_seed(0)
    base = Perceptron()
    start = copy.deepcopy(base)
    model = with_lora(base, target_modules=["first", "second"])
    optimizer = scalora.ScaLoRA(torch.optim.AdamW(trainable(model), lr=1e-2), model, rule="exact")
    train(model, optimizer, vectors(64, 12), 20)
    return model, start


def test_a_rebased_layer_is_flagged_and_a_reference_tells_its_paths_apart():
    model, start = rebased_model()
    x = vectors(64, 12)
    flagged = measured(model, x)
    assert all(row.rebased for row in flagged)
    assert "reference=" in str(flagged)
    kept, keep = collector()
    with MIUBMonitor(model, every=1, estimator=keep, reference=start) as monitor, torch.no_grad():
        model(x)
    assert not any(row.rebased for row in monitor.report())
    u, v = kept[0]
    lora = layer(model, "first")
    delta = lora.get_delta_weight("default") + lora.base_layer.weight - start.first.weight
    torch.testing.assert_close(u.sum(0), start.first(x).sum(0), atol=1e-4, rtol=1e-4)
    learned = (x @ delta.T).norm(dim=1).sort().values
    torch.testing.assert_close(v.norm(dim=1).sort().values, learned, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_reference_tells_the_paths_of_a_rebased_convolution_apart(stride):
    base = Convolutions(nn.Conv2d(3, 6, 3, padding=1, stride=stride))
    start = copy.deepcopy(base)
    model = with_lora(base, target_modules=["convolution"])
    optimizer = scalora.ScaLoRA(torch.optim.AdamW(trainable(model), lr=1e-2), model, rule="exact")
    x = vectors(4, 3, 6, 6)
    train(model, optimizer, x, 10)
    kept, keep = collector()
    monitor = MIUBMonitor(model, every=1, estimator=keep, reference=start)
    with monitor, torch.no_grad():
        model(x)
        frozen = start.convolution(x).movedim(1, -1).flatten(0, -2)
        now = layer(model, "convolution")(x).movedim(1, -1).flatten(0, -2)
    u, v = kept[0]
    torch.testing.assert_close(u.norm(dim=1).sort().values, frozen.norm(dim=1).sort().values)
    learned = (now - frozen).norm(dim=1).sort().values
    assert learned[0] > 1e-3
    torch.testing.assert_close(v.norm(dim=1).sort().values, learned, atol=1e-5, rtol=1e-3)


def test_a_reference_changes_nothing_for_layers_that_were_not_rebased():
    base = Perceptron()
    start = copy.deepcopy(base)
    model = wake(with_lora(base, target_modules=["first"]))
    x = vectors(64, 12)
    with_reference = measured(model, x, reference=start)
    assert with_reference["first"].value == measured(model, x)["first"].value


def test_only_scalars_are_held_after_a_measurement():
    model = encoder()
    monitor = MIUBMonitor(model, every=1)
    with monitor, torch.no_grad():
        model(input_ids=token_ids(8, 12))
    held = [m.numbers for m in internals.pending(monitor)]
    assert held
    assert all(numbers.shape == (5,) and not numbers.requires_grad for numbers in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_512_tokens_and_4096_inputs_and_outputs_takes_at_most_8_megabytes(dtype):
    assert 1e6 < peak_of_a_layer(4096, dtype) <= 8e6
