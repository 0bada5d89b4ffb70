"""Read README's quickstart, the program that a new user copies first."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def quickstart() -> str:
    """Return the source of the first Python block below README's heading "Quickstart"."""
    section = README.read_text(encoding="utf-8").split("\n## Quickstart\n", 1)[1]
    block = re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block, "README has no quickstart"
    return block[1]
