"""Docstrings as Markdown: reStructuredText's ``::``, and links between the public names."""

import re
from pathlib import Path
from typing import Any

import griffe

_REFERENCE = Path(__file__).parents[1] / "api.md"
_NAME = re.compile(r"(?<![`\[])`((?:scalora|miub)\.[\w.]+)`(?!`)")


class MarkdownDocstrings(griffe.Extension):
    """Turn every docstring into Markdown before it is rendered."""

    def __init__(self) -> None:
        """Read which names the reference documents."""
        text = _REFERENCE.read_text(encoding="utf-8")
        self.documented = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object, if it has one."""
        if obj.docstring:
            text = re.sub(r"^\s*::\n", "", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _NAME.sub(self._linked, re.sub(r"::$", ":", text, flags=re.M))

    def _linked(self, name: re.Match[str]) -> str:
        known = name[1] in self.documented
        return f"[`{name[1]}`][{name[1]}]" if known else name[0]
