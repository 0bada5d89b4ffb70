"""The scripts of `examples/stacks`, importable, and the tiny model that they train."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

STACKS = Path(__file__).parents[2] / "examples" / "stacks"


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    """Return the import of a script by name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.syspath_prepend(str(STACKS))
    return importlib.import_module


@pytest.fixture
def tiny(stack: Callable[[str], Any]) -> Any:
    """The scripts' shared module: model, tokenizer, data."""
    return stack("tiny")


@pytest.fixture
def logits(tiny: Any) -> Callable[[Any], Tensor]:
    """Return the logits of a model, in evaluation mode from then on, for four examples."""

    @torch.no_grad()
    def found(model: Any) -> Tensor:
        return model.eval()(input_ids=tiny.examples()[:4]).logits

    return found
