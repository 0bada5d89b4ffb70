"""Loops of one's own, accelerate and Lightning: trained, re-based, clipped, scaled, saved."""

from __future__ import annotations

import pytest
import torch
from models import Perceptron, bits, loss, trainable, vectors, with_lora
from transformers import AutoModelForCausalLM

import scalora

STEPS = 27  # re-based twice, at steps 10 and 20

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained writes the adapter alone")


@pytest.mark.parametrize("name", ["bare_loop", "accelerate_loop", "lightning_module"])
def test_script_trains_rebases_and_merges_to_the_same_model(name, stack, logits, tmp_path):
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="PyTorch Lightning is not installed")
    run = stack(name).main(STEPS)
    assert run.losses[-1] < 0.8 * run.losses[0]
    assert run.optimizer.rebase_count == 2
    scalora.save_merged(run.model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(run.model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", ["auto", "exact"])
def test_scaler_skips_an_overflow_and_nothing_is_rebased(rule):
    model = with_lora(Perceptron(), target_modules=["first", "second"])
    inner = torch.optim.AdamW(trainable(model), lr=1e-2)
    optimizer = scalora.ScaLoRA(inner, model, rule=rule, interval=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(spoil):
        optimizer.zero_grad()
        scaler.scale(loss(model, vectors(16, 12))).backward()
        if spoil:
            optimizer.rebased_pairs[0].P_parameter.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()

    for _ in range(4):
        step(spoil=False)
    before, count, factor = bits(model), optimizer.rebase_count, optimizer.step_factor
    assert count > 0
    step(spoil=True)
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(model).items())
    assert (optimizer.rebase_count, optimizer.step_factor) == (count, factor)
    step(spoil=False)
    assert optimizer.rebase_count > count


def test_calibration_finds_about_the_same_factor_with_every_gradient_clipped():
    factors = []
    for bound in (None, 1e-3):
        torch.manual_seed(0)
        model = with_lora(Perceptron(), target_modules=["first", "second"])
        inner = torch.optim.Adam(trainable(model), lr=1e-3, eps=1e-12)
        optimizer = scalora.ScaLoRA(inner, model)
        for _ in range(12):
            optimizer.zero_grad()
            loss(model, vectors(16, 12)).backward()
            if bound is not None:
                assert torch.nn.utils.clip_grad_norm_(model.parameters(), bound) > 10 * bound
            optimizer.step()
        factors.append(float(optimizer.step_factor))
    plain, clipped = factors
    assert plain > 2
    # Clipping weighs the gradients otherwise; that is worth less than one step's growth of 1.25.
    assert plain / 1.25 < clipped < plain * 1.25


def test_lightning_resumes_with_the_rebased_model(stack, tmp_path):
    pytest.importorskip("lightning", reason="PyTorch Lightning is not installed")
    script = stack("lightning_module")
    data = script.data(10)
    whole = script.Module(30)
    script.trainer(30).fit(whole, data)

    first, trainer = script.Module(30), script.trainer(20)
    trainer.fit(first, data)
    assert trainer.optimizers[0].rebase_count == 2
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest, resumed = script.Module(30), script.trainer(30)
    resumed.fit(rest, data, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.optimizers[0].rebase_count == 3
    # Which batches follow is Lightning's to say, and not those of a run that went on.
    assert rest.losses[0] == whole.losses[40]
