"""The house: a floor imports only floors below it, in types too, and no two files import each other in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"mlpool": ROOT / "mlpool", "mlpool_kernels": ROOT / "kernels/mlpool_kernels"}
LONGEST = 400  # lines
# From the ground up; what stands in one line is one floor.
FLOORS = [
    ("mlpool_kernels",),
    ("mlpool.version", "mlpool.files", "mlpool.options", "mlpool.quantized", "mlpool.remote", "mlpool.show"),
    ("mlpool.schema",),
    ("mlpool.pooling",),
    ("mlpool.trunk",),
    ("mlpool.taps",),
    ("mlpool.attention",),
    ("mlpool.doctor",),
    ("mlpool.embedder",),
    ("mlpool.corpus",),
    ("mlpool.training",),
    ("mlpool.fitting",),
    ("mlpool.exchange",),
    ("mlpool.evaluation",),
    ("mlpool.analysis",),
    ("mlpool.study",),
    ("mlpool.cli",),
]


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts])
            found[name.removesuffix(".__init__")] = path
    return found


def _imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Modules of ours that `path` imports, at its top, in functions and for types, each with its line."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                target = f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module
                if target in known:
                    yield target, node.lineno


def _floor(module: str) -> int | None:
    """None for the package's face, `mlpool` itself: it shows what stands behind it and nothing inside reads it."""
    for height, names in enumerate(FLOORS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return height
    return None


@pytest.fixture(scope="module")
def graph() -> dict[str, dict[str, int]]:
    """Module → the modules of ours that it imports → the line of the import."""
    known = _modules()
    return {name: dict(_imports(name, path, known)) for name, path in known.items()}


def test_files_are_read_in_a_sitting():
    lines = {name: path.read_text(encoding="utf8").count("\n") for name, path in _modules().items()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_every_module_stands_on_a_floor(graph):
    assert [name for name in graph if _floor(name) is None] == ["mlpool"]


def test_no_arrow_runs_up(graph):
    wrong = []
    for name, targets in graph.items():
        here = _floor(name)
        for target, line in targets.items():
            there = _floor(target)
            if here is not None and (there is None or there > here):
                wrong.append(f"{name}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_circle(graph):
    """Depth first: an import of a module whose own imports are still being followed closes a circle."""
    done: set[str] = set()
    circles: list[str] = []

    def follow(name: str, path: list[str]) -> None:
        if name in path:
            circles.append(" → ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in graph[name]:
                # A package's face imports its rooms; a room that imports a neighbour does not go through the face.
                follow(target, [*path, name])
            done.add(name)

    for name in graph:
        follow(name, [])
    assert not circles, "\n".join(circles)


def test_every_floor_is_there(graph, capsys):
    """And the whole house in a screen, from the ground up: `pytest -s tests/test_house.py`."""
    with capsys.disabled():
        print()
        for height, names in enumerate(FLOORS):
            below = {t for n, targets in graph.items() if _floor(n) == height for t in targets if _floor(t) != height}
            rooms = sorted({".".join(target.split(".")[:2]).removeprefix("mlpool.") for target in below})
            print(f"{', '.join(names):>45}  ←  {', '.join(rooms) or '-'}")
    assert not [name for names in FLOORS for name in names if name not in graph]
