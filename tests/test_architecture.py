"""Imports run one way, from the rooms above to the rooms below (docs/architecture.md).

And every module is held by a test that a reader finds.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
PACKAGES = ("scalora", "miub")

# The floors of scalora from above to below. A room is a folder or a module at the top level;
# "__init__" is the package's public names. A room imports from floors below its own.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("ablation",),
    ("__init__",),
    ("integrations",),
    ("saving",),
    ("optimizer",),
    ("optimizer_hooks", "resuming"),
    ("rebasing",),
    ("guards",),
    ("peft_layers", "options"),
    ("carry", "moments", "step_length"),
    ("fold", "scaling"),
    ("sharding",),
    ("plotting", "transformers_models"),
    ("arguments", "autocast", "device_option", "files", "storage", "warning"),
)
MIUB_FLOORS = (
    ("__main__",),
    ("cli",),
    ("__init__",),
    ("callback",),
    ("monitor",),
    ("forward_pass",),
    ("bounds", "layers", "measurement"),
    ("masks", "paths", "processes", "report"),
    ("estimators", "token_sample"),
)
# The rooms of scalora that miub may use.
USED_BY_MIUB = {"__init__", "saving", "peft_layers"} | {
    room for floor in FLOORS[-2:] for room in floor
}
# The rooms that may import a library. The mathematics (scaling, fold, carry, moments, step_length)
# knows none of them but Triton, in which kernels are written.
KNOWN_TO = {
    "accelerate": {"integrations", "sharding"},
    "bitsandbytes": set(),
    "peft": {"ablation", "cli", "peft_layers", "transformers_models"},
    "transformers": {"ablation", "callback", "cli", "integrations", "transformers_models"},
    "triton": {"fold", "scaling"},
}


@cache
def modules() -> dict[str, Path]:
    """Return the path of every module of both packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> frozenset[tuple[str, str]]:
    """Return every import as (importing module, imported module), within functions too."""
    return frozenset(
        (module, imported)
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for imported in imported_by(node)
    )


def imported_by(node: ast.AST) -> Iterator[str]:
    """Yield the modules that a statement imports; a name from a module counts as the module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are absolute"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            yield name if name in modules() else node.module


def package_of(module: str) -> str:
    """Return the top-level package of a module."""
    return module.partition(".")[0]


def room_of(module: str) -> str:
    """Return the room of a module: the second part of its name, or "__init__"."""
    return [*module.split("."), "__init__"][1]


def inside(package: str) -> set[tuple[str, str]]:
    """Return the imports from one room to another room of the same package."""
    return {
        (module, imported)
        for module, imported in imports()
        if package_of(module) == package == package_of(imported)
        and room_of(module) != room_of(imported)
    }


def floor_by_room(floors: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    """Return how deep below the highest floor each room lies."""
    return {room: depth for depth, floor in enumerate(floors) for room in floor}


def climbing(package: str, floors: tuple[tuple[str, ...], ...]) -> set[tuple[str, str]]:
    """Return the imports within a package that do not go to a floor below."""
    floor = floor_by_room(floors)
    return {
        (module, imported)
        for module, imported in inside(package)
        if floor[room_of(module)] >= floor[room_of(imported)]
    }


def trespasses(module: str, imported: str) -> bool:
    """Return whether a module imports what its room must not know of outside its package."""
    room, known = room_of(module), package_of(imported)
    if known == "examples":
        return True
    if (package_of(module), known) == ("miub", "scalora"):
        return room_of(imported) not in USED_BY_MIUB
    if (package_of(module), known) == ("scalora", "miub"):
        return room != "ablation" or imported != "miub"
    return known in KNOWN_TO and room not in KNOWN_TO[known]


def test_every_room_has_a_floor():
    assert len(modules()) > 100
    for package, floors in (("scalora", FLOORS), ("miub", MIUB_FLOORS)):
        rooms = {room_of(module) for module in modules() if package_of(module) == package}
        assert rooms <= set(floor_by_room(floors))


def test_imports_run_down_the_floors():
    wrong = climbing("scalora", FLOORS) | climbing("miub", MIUB_FLOORS)
    assert wrong == set()


def test_no_room_imports_what_it_must_not_know():
    wrong = {pair for pair in imports() if trespasses(*pair)}
    assert wrong == set()


def test_no_module_imports_itself_through_others():
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for module, imported in imports():
        if imported in graph and imported != module:
            graph[module].add(imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_ablation_is_imported_by_the_command_line_alone():
    importers = {
        room_of(module) for module, imported in inside("scalora") if room_of(imported) == "ablation"
    }
    assert importers == {"cli"}


def test_every_room_is_described():
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    for module in modules():
        room = room_of(module)
        if not room.startswith("__"):
            assert f"`{room}`" in page or f"`{room}.py`" in page, (
                f"{module} in docs/architecture.md"
            )


def held_by(path: Path) -> list[str]:
    """Return the test files that the docstring of a file names after "Held by"."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.findall(r"[\w/]*test_\w+\.py", doc.partition("Held by ")[2])


def own_tests(module: str) -> set[Path]:
    """Return where the test file of a module's own name would lie, in the mirrored folder."""
    package, *rooms, name = module.split(".")
    root = TESTS if package == "scalora" else TESTS / package
    return {root.joinpath(*rooms, f"test_{name}.py"), root / name / f"test_{name}.py"}


def test_every_module_has_a_test_or_says_which_test_holds_it():
    packages = {module for module, path in modules().items() if path.name == "__init__.py"}
    for module, path in modules().items():
        if module in packages or path.name == "__main__.py":
            continue
        package = module.rpartition(".")[0]
        said = held_by(path) or held_by(modules()[package])
        assert said or any(file.exists() for file in own_tests(module)), (
            f"{module}: say 'Held by tests/…' in its docstring"
        )


def test_every_test_that_a_docstring_names_exists():
    there = {file.name: file for file in TESTS.rglob("test_*.py")}
    for path in modules().values():
        for name in held_by(path):
            file = there.get(Path(name).name)
            assert file and file.as_posix().endswith(name), f"{path} names {name}"
