"""README's quickstart runs as it is printed, without a network."""

import re

from readme import README, quickstart
from transformers import LlamaForCausalLM


def test_quickstart_runs_and_leaves_the_adapters_rank_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    exec(compile(quickstart(), "README.md", "exec"), {"__name__": "__main__"})

    printed = re.search(r"rank of the change: ([\d.]+)", capsys.readouterr().out)
    assert printed and float(printed[1]) > 3  # the adapter's is 2
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged, "peft_config")


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
