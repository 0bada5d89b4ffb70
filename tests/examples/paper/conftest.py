import importlib

import pytest
from paper_inputs import PAPER


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))
    return importlib.import_module
