"""The pages name what is there: files, tests, options, public names."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import miub
import scalora
import scalora.ablation
from scalora.options import RebasingOptions

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted((REPOSITORY / "examples").rglob("*.md")),
]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_that_a_page_names_are_there(page):
    named = set(re.findall(r"\b(?:tests|examples|scalora|miub)/[\w/]*\.py\b", text_of(page)))
    assert {name for name in named if not (REPOSITORY / name).is_file()} == set()


def test_tests_that_a_page_names_are_there():
    sources = "".join(text_of(path) for path in (REPOSITORY / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^\s*def (test_\w+)", sources, re.MULTILINE))
    modules = {path.stem for path in (REPOSITORY / "tests").rglob("test_*.py")}
    named = {
        name for page in PAGES for name in re.findall(r"`(test_\w+)(?:\.\.\.)?`", text_of(page))
    }
    assert len(named) > 50
    # A name may be cut, as in `test_factors_put_back_...`.
    missing = {
        name
        for name in named - defined - modules
        if not (name.endswith("_") and any(test.startswith(name) for test in defined))
    }
    assert missing == set()


def test_every_public_name_is_in_the_reference():
    documented = set(re.findall(r"^::: (\S+)", text_of(DOCS / "api.md"), re.MULTILINE))
    for module in (scalora, miub, miub.estimators, scalora.ablation):
        for name in module.__all__:
            # Not documented by themselves: a module, and a dictionary of functions that are.
            if name not in ("estimators", "ESTIMATORS"):
                public = getattr(module, name)
                # A function that shares its module's name is documented where it is defined.
                paths = {f"{module.__name__}.{name}", f"{public.__module__}.{name}"}
                assert paths & documented, f"{module.__name__}.{name} in docs/api.md"


def test_every_option_is_described_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text_of(DOCS / "options.md"), re.MULTILINE)
    described = dict(rows)
    assert described.keys() == {option.name for option in fields(RebasingOptions)}
    for option in fields(RebasingOptions):
        assert eval(described[option.name]) == option.default, option.name


def test_site_is_read_without_another_host():
    """No page asks for fonts, styles or scripts; a fence of Mermaid's would load its renderer."""
    site = [REPOSITORY / "mkdocs.yml", *(DOCS / "site").iterdir()]
    assert not [path for path in site if path.is_file() and "https://" in text_of(path)]
    assert not [page for page in PAGES if "```mermaid" in text_of(page)]


def test_records_behind_the_tables_are_of_runs_that_ended():
    records = list((DOCS / "ablations" / "records").glob("*/runs/*.json"))
    assert len(records) > 100
    ended = {path.name: json.loads(text_of(path))["status"] for path in records}
    assert {name for name, status in ended.items() if status != "ok"} == set()
