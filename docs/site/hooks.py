"""What the site adds to the Markdown pages: README, changelog, version, formulas, links to code."""

import ast
import html
import re
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[2]
# Pages of the site that are files of the repository's root.
FROM_ROOT = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_PICTURE = re.compile(r'((?:src|srcset)=")docs/')
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# What latex2mathml knows by another name, or writes in a way that browsers do not read.
_INSTEAD = {"{aligned}": "{align*}", r"\mathbb E": "𝔼", r"\mathbb R": "ℝ"}
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> None:
    """Put the package's version into the site's name; offer edit links where a host is known."""
    if config.repo_url:
        config.edit_uri = "edit/main/docs/"
    source = (REPOSITORY / "scalora" / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            config.site_name = f"{config.site_name} {ast.literal_eval(node.value)}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files of the repository's root."""
    for page, source in FROM_ROOT.items():
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_PICTURE.sub(r"\1", text)))
    return files


def on_pre_page(page: Page, config: MkDocsConfig, files: Files) -> Page:
    """Let the edit link of such a page lead to its file."""
    source = FROM_ROOT.get(page.file.src_uri)
    if source and config.repo_url:
        page.edit_url = f"{config.repo_url.rstrip('/')}/edit/main/{source}"
    return page


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let relative links lead to pages of the site, or to the code host where they leave docs/."""
    folder = "" if page.file.src_uri in FROM_ROOT else "docs"

    def replaced(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        path, hash_, anchor = target.partition("#")
        if not path or ":" in path:
            return link[0]
        inside = _normal(PurePosixPath(folder, path))
        if not (REPOSITORY / inside).exists():
            return link[0]  # the strict build names it
        own = inside.removeprefix("docs/") if inside.startswith("docs/") else _page_of(inside)
        if own and files.get_file_from_path(own):
            return f"{image}[{text}]({own}{hash_}{anchor})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{inside})"
        return text

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(replaced, markdown[end:])])


def on_page_content(page_html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn LaTeX into MathML, which browsers show by themselves: a page asks no other host."""

    def replaced(formula: re.Match[str]) -> str:
        latex = html.unescape(formula[2])
        for name, instead in _INSTEAD.items():
            latex = latex.replace(name, instead)
        return convert(latex, display="block" if formula[1] == "div" else "inline")

    return _FORMULA.sub(replaced, page_html)


def _page_of(source: str) -> str:
    """Return the page that a file of the repository's root is, or an empty string."""
    return next((page for page, name in FROM_ROOT.items() if name == source), "")


def _normal(path: PurePosixPath) -> str:
    """Return a path without its "..", from the repository's root."""
    parts: list[str] = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)
