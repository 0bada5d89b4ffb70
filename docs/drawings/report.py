"""Draw the report of README's quickstart: docs/report.svg and .png.

    python docs/drawings/report.py

Runs the quickstart as README prints it, in a temporary folder, and plots ``optimizer.report()``.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]


def quickstart() -> str:
    """Return the first program of README."""
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def main() -> None:
    """Write both files."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec(compile(quickstart(), "README.md", "exec"), names)
        os.chdir(DOCS)
    report = names["optimizer"].report()
    print(report)
    for kind in ("svg", "png"):
        report.plot(DOCS / f"report.{kind}")


if __name__ == "__main__":
    main()
