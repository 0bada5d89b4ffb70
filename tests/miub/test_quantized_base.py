"""The monitor on a quantized base: its output is what counts, not its weight."""

from __future__ import annotations

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from miub import MIUBMonitor

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_a_quantized_base_are_measured_as_those_of_the_base_in_float(bits, tmp_path):
    torch.manual_seed(0)
    models.llama(vocab_size=32, num_hidden_layers=2, num_attention_heads=4).save_pretrained(
        tmp_path
    )
    quantized = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    reports = []
    for quantization in (None, quantized):
        base = LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantization, dtype=torch.float32
        )
        if quantization is not None:
            base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        monitor = MIUBMonitor(model, every=1, tokens=128)
        with monitor:
            model(input_ids=models.token_ids(8, 24), labels=models.token_ids(8, 24)).loss.backward()
        reports.append(monitor.report())
    plain, found = reports
    assert found.layers == plain.layers
    assert len(found) == 4
    for row in plain:
        assert found[row.layer].value == pytest.approx(row.value, rel=0.25)
        assert not found[row.layer].rebased
