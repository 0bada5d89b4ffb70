"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}

_STYLE = """
:root { color-scheme: light dark; --line: #d8d8d8; --dim: #666; --stripe: #f6f6f6; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --dim: #aaa; --stripe: #242424; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { border-bottom: 1px solid var(--line); padding-bottom: .2em; }
h2 { margin-top: 2.5em; }
h3 { margin: 2em 0 .5em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .8em; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { text-align: left; border-bottom-width: 2px; }
tbody tr:nth-child(even) { background: var(--stripe); }
p { color: var(--dim); font-size: .875rem; }
figure { margin: 2em 0; padding: .75rem; background: white; border-radius: 6px; }
img { display: block; width: 100%; height: auto; }
"""


def as_page(text: str, folder: Path) -> str:
    """Return Markdown as one HTML page with its pictures inside.

    A picture that has an SVG of the same name beside it is embedded as that: it stays sharp.

    Args:
        text: Markdown, with tables; raw HTML in it is shown as text.
        folder: the folder that the paths of pictures start from.

    Raises:
        OSError: a picture cannot be read.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("image", _embed)
    markdown.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    body = markdown.render(text, {"folder": folder})
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(_title(text))}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def _title(text: str) -> str:
    first = next((line for line in text.splitlines() if line.startswith("# ")), "# Report")
    return first[2:].strip()


def _embed(
    renderer: RendererHTML, tokens: Sequence[Token], place: int, options: Any, env: Any
) -> str:
    token = tokens[place]
    path: Path = env["folder"] / unquote(str(token.attrs["src"]))
    sharp = path.with_suffix(".svg")
    path = sharp if sharp.is_file() else path
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    source = f"data:{_MEDIA[path.suffix]};base64,{content}"
    return f'<img alt="{html.escape(token.content)}" src="{source}">'
