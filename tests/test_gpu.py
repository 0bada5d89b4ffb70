"""What only a GPU can show: no waiting for the device, few launches, the same numbers.

``make test-gpu`` runs these and the GPU benchmark in one command.
"""

from __future__ import annotations

import copy

import internals
import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import scalora
from examples.benchmark.miub.distributions import layer_paths
from miub import MIUBMonitor
from miub.estimators import tempered
from scalora.peft_layers import lora_pairs

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_model(device: str, dtype: torch.dtype = torch.float32, layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(96, 96) for _ in range(layers)))
    names = [str(i) for i in range(layers)]
    model = get_peft_model(base.to(dtype), LoraConfig(r=4, target_modules=names))
    return model.to(device)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in models.trainable(model):
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def optimizer_for(model: nn.Module, **options) -> scalora.ScaLoRA:
    inner = torch.optim.AdamW(models.trainable(model), lr=1e-3, fused=options.pop("fused", None))
    return scalora.ScaLoRA(inner, model, **{"rule": "exact", **options})


@pytest.mark.parametrize("rule", ["exact", "paper", "scalar", "direction"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_never_waits_for_the_device(rule, fused, dtype):
    model = make_model("cuda", dtype)
    optimizer = optimizer_for(model, rule=rule, fused=fused)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    set_gradients(model, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_that_adds_to_a_carry_never_waits_for_the_device(dtype, fused):
    model = make_model("cuda", dtype)
    optimizer = optimizer_for(model, fused=fused, accumulator="carry", carry_rank=64)
    x = torch.randn(8, 96, device="cuda", dtype=dtype)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
        model(x)
    set_gradients(model, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(pair.carry.columns < pair.carry.capacity for pair in lora_pairs(model, "default"))


def test_carry_is_the_cpus_through_compressions():
    found = {}
    for device in ("cpu", "cuda"):
        model = make_model(device)
        optimizer = optimizer_for(model, accumulator="carry", carry_rank=16, carry_tolerance=0.99)
        for seed in range(12):
            set_gradients(model, seed)
            optimizer.step()
        found[device] = [
            (pair.learned_change().cpu(), pair.carry.cut.cpu())
            for pair in lora_pairs(model, "default")
        ]
    for (one, cut), (other, other_cut) in zip(found["cpu"], found["cuda"], strict=True):
        assert cut > 0
        assert (one - other).norm() < 1e-4 * one.norm()
        torch.testing.assert_close(cut, other_cut, rtol=1e-3, atol=0)


def test_four_bit_base_keeps_its_function_and_its_bytes():
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(
        *(bnb.nn.Linear4bit(128, 128, quant_type="nf4", compute_dtype=torch.float32) for _ in "ab")
    ).to("cuda")
    base.is_loaded_in_4bit = True
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"]))
    optimizer = optimizer_for(model, carry_rank=16)
    quantized = [module for module in base.modules() if isinstance(module, bnb.nn.Linear4bit)]
    codes = [module.weight.data.clone() for module in quantized]
    for seed in range(8):
        set_gradients(model, seed)
        pairs = lora_pairs(model, "default")
        weights = [pair.effective_weight() for pair in pairs]
        cuts = [0.0 if pair.carry is None else float(pair.carry.cut) for pair in pairs]
        internals.rebase(optimizer, seed)
        for pair, weight, cut in zip(pairs, weights, cuts, strict=True):
            cut_now = pair.scaling * (float(pair.carry.cut) - cut) ** 0.5
            moved = (pair.effective_weight() - weight).norm()
            assert moved <= 1e-6 * weight.norm() + 1.01 * cut_now
        optimizer.inner.step()
    for module, old in zip(quantized, codes, strict=True):
        assert torch.equal(module.weight.data, old)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_and_cpu_agree(dtype, rounding):
    effective = {}
    for device in ("cpu", "cuda"):
        model = make_model(device, dtype)
        optimizer = optimizer_for(model, rounding=rounding)
        for seed in range(5):
            set_gradients(model, seed)
            optimizer.step()
        effective[device] = {
            pair.name: pair.effective_weight().cpu() for pair in lora_pairs(model, "default")
        }
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for name, weight in effective["cpu"].items():
        largest = weight.abs().max().item()
        torch.testing.assert_close(
            effective["cuda"][name], weight, atol=2 * unit * largest + 1e-5, rtol=0
        )


@pytest.mark.parametrize("fused", [True, False])
def test_a_calibrated_step_is_as_long_as_on_the_cpu(fused):
    """A fused optimizer reads the factor from its learning rate, on the device."""
    found = {}
    for device in ("cpu", "cuda"):
        model = make_model(device)
        optimizer = optimizer_for(model, rule="leak", calibration=3, interval=4, fused=fused)
        for seed in range(8):
            set_gradients(model, seed)
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 1e-3
        found[device] = [p.detach().cpu() for p in models.trainable(model)]
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rebasing_preserves_the_function(dtype):
    model = make_model("cuda", dtype)
    optimizer = optimizer_for(model, rounding="compensated")
    for seed in range(4):
        set_gradients(model, seed)
        optimizer.step()
    set_gradients(model, 4)
    before = [pair.effective_weight() for pair in lora_pairs(model, "default")]
    internals.rebase(optimizer, optimizer.rebase_count)
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for pair, weight in zip(lora_pairs(model, "default"), before, strict=True):
        atol = unit * weight.abs().max().item()
        torch.testing.assert_close(pair.effective_weight(), weight, atol=atol, rtol=0)


def test_fused_inner_optimizer_leaves_a_non_finite_step_out():
    model = make_model("cuda")
    optimizer = optimizer_for(model, fused=True)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    set_gradients(model, 3)
    models.trainable(model)[0].grad.view(-1)[0] = torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.inner.state_dict()["state"])
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, old, atol=1e-6, rtol=1e-6)
    for index, moments in optimizer.inner.state_dict()["state"].items():
        assert all(value.isfinite().all() for value in moments.values())
        assert torch.equal(moments["step"], state[index]["step"])


def test_non_finite_gradient_never_reaches_the_base():
    model = make_model("cuda")
    optimizer = optimizer_for(model, fused=False)
    for seed in range(4):
        set_gradients(model, seed)
        if seed == 3:
            models.trainable(model)[0].grad.view(-1)[0] = torch.inf
        optimizer.step()
    assert all(pair.base_weight.isfinite().all() for pair in lora_pairs(model, "default"))


def test_launches_do_not_grow_with_the_layers_of_one_shape():
    from examples.benchmark.launches import kernels_added

    device = torch.device("cuda")
    assert kernels_added(8, device) == kernels_added(32, device)


def test_large_increments_fold_as_on_the_cpu_at_ragged_shapes():
    from scalora.fold import fold, noise_seed

    generator = torch.Generator().manual_seed(0)
    for shape, rank in [((130, 257), 8), ((64, 128), 16), ((33, 31), 3), ((5, 1000), 24)]:
        for dtype in DTYPES:
            weights = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
            left = torch.randn(3, shape[0], rank, generator=generator)
            right = torch.randn(3, shape[1], rank, generator=generator)
            seeds = [noise_seed(0, layer) for layer in range(3)]
            on_gpu = [weight.cuda() for weight in weights]
            fold(weights, left, right, seeds=seeds)
            fold(on_gpu, left.cuda(), right.cuda(), seeds=seeds)
            unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
            for one, other in zip(weights, on_gpu, strict=True):
                torch.testing.assert_close(other.cpu(), one, atol=1e-5, rtol=2 * unit)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_measuring_pass_never_waits_for_the_device(dtype, masked):
    model = make_model("cuda", dtype)
    for parameter in models.trainable(model):
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(8, 40, 96, device="cuda", dtype=dtype)
    mask = (torch.arange(40, device="cuda") < 30).expand(8, 40)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x, attention_mask=None):
            return self.model(x)

    monitor = MIUBMonitor(Root(), every=1, tokens=64)
    with monitor, torch.no_grad():
        monitor.model(x)  # libraries set themselves up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            monitor.model(x, attention_mask=mask if masked else None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(row.value > 0 for row in monitor.report())


def test_the_estimate_is_the_cpus():
    _, sampler = layer_paths(192, 192, 8, 1.0, 0.01)
    u, v = sampler((4, 512), torch.Generator().manual_seed(0))
    expected = tempered(u, v, noise=0.01).value
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = tempered(u.cuda(), v.cuda(), noise=0.01).value.cpu()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
