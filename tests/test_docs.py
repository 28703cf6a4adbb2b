"""What README and docs say can be done: every block runs, every command parses, every link and name is there."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from docs_blocks import PAGES, ROOT, Command, blocks, commands, shell_lines

pytest.importorskip("datasets")

import mlpool
from mlpool.cli import COMMANDS

ON_THE_HUB = re.compile(r'"((?:sentence-transformers|[A-Z][\w-]*)/[\w.-]+)"')
LAYERS = {"depth.md": 28, "serving.md": 1}  # of the model that a page speaks of; two elsewhere
ALL = {command for page in PAGES for command in commands(page)}
NAMES = [page.name for page in PAGES]


@pytest.fixture
def place(tmp_path: Path, page: Path) -> Path:
    """A user's folder: tiny models under the names of the Hub, and the files that the pages speak of."""
    import tiny
    from made import sentence, write_jsonl

    for name in set(ON_THE_HUB.findall("\n".join(blocks(page, "python")))):
        family = "bert" if "MiniLM" in name else "qwen2"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny.base(family, num_hidden_layers=LAYERS.get(page.name, 2)))
    generator = random.Random(0)
    texts = [sentence(generator) + f" {i}" for i in range(16)]
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": text, "positive": text.upper()} for text in texts])
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page, place, monkeypatch):
    """The blocks of a page, one after the other, as a reader types them."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.chdir(place)
    monkeypatch.setattr("mlpool.embedder.designs.DESIGNS", dict(mlpool.DESIGNS))
    names: dict[str, object] = {"__name__": "page", "mlpool": mlpool}  # its import is not repeated on every page
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_configs_and_rows_are_what_they_are_called(page):
    from mlpool.training.config import read_config

    for block in blocks(page, "yaml"):
        if "model" in (values := yaml.safe_load(block)):
            read_config(values)
    for block in blocks(page, "json"):
        json.loads(block)


# --- commands ---------------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Raised in the place of what a script would do with its arguments; no `except` of a script takes it."""


def check_mlpool(words: tuple[str, ...]) -> None:
    name, *given = words
    assert name in COMMANDS, f"there is no command {name}"
    if not given:  # a command that is spoken of
        return
    module, _, attribute = COMMANDS[name][0].partition(":")
    target = importlib.import_module(module)
    target = getattr(target, attribute) if attribute else target
    parser = argparse.ArgumentParser(prog=f"mlpool {name}")
    target.add_arguments(parser)
    arguments = parser.parse_args(given)
    config = getattr(arguments, "config", None)
    if name == "train" and Path(config).is_file():
        from mlpool.training.config import read_config

        flags = ("--dry-run", "--resume")
        read_config(config, [word for word in arguments.overrides if word not in flags])


def check_make(words: tuple[str, ...]) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w/-]+):", text, re.MULTILINE))
    for word in words:
        assert "=" in word or word in targets or re.fullmatch(r"[\w-]+-%", word), f"there is no target {word}"


def check_python(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[:2] in (("-m", "pytest"), ("-m", "mlpool.cli")):
        for word in words[2:] if words[1] == "pytest" else ():
            assert (ROOT / word).exists(), word
        return
    script = ROOT / words[0]
    if "ArgumentParser" not in script.read_text(encoding="utf8"):
        assert words[1:] == (), f"{script.name} takes no arguments"
        return

    def parsed(self, args=None, namespace=None):
        self.parse_known_args = argparse.ArgumentParser.parse_known_args.__get__(self)
        _, rest = self.parse_known_args(list(words[1:]) if args is None else args, namespace)
        assert not rest, f"{script.name} does not know {rest}"
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def check_pip(words: tuple[str, ...]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if named := re.search(r"\[([\w,]+)\]", word):
            assert set(named[1].split(",")) <= set(extras), word


def behind(words: tuple[str, ...]) -> tuple[str, ...]:
    """What a launcher starts: the command behind `-m mlpool.cli`."""
    config = words.index("--config_file") + 1 if "--config_file" in words else 0
    assert not config or (ROOT / words[config]).is_file(), words[config]
    return words[words.index("mlpool.cli") + 1 :]


@pytest.mark.parametrize("command", sorted(ALL), ids=lambda c: " ".join(c.words)[:60])
def test_commands_parse(command: Command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    program, *rest = command.words
    words = tuple(rest)
    if program in ("torchrun", "accelerate"):
        program, words = "mlpool", behind(words)
    try:
        if program == "python":
            check_python(words, monkeypatch)
        else:
            {"mlpool": check_mlpool, "make": check_make, "pip": check_pip}[program](words)
    except SystemExit as error:
        if error.code:
            pytest.fail(f"{command.page}: {' '.join(command.words)}: {capsys.readouterr().err}")


def test_the_pages_have_commands_and_a_wrong_one_fails(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {"mlpool", "make", "python", "pip", "torchrun", "accelerate"} <= {command.words[0] for command in ALL}
    assert any("--dry-run" in line for page in PAGES for line in shell_lines(page))
    with pytest.raises(SystemExit):
        check_mlpool(("encode", "texts.jsonl", "--outptu", "out"))
    with pytest.raises(ValueError, match="unknown config key"):
        check_mlpool(("train", "configs/quick.yaml", "--modle", "x"))
    with pytest.raises(AssertionError, match="no target"):
        check_make(("benhc",))


# --- links, names, messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_every_public_name_has_its_place():
    places = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(encoding="utf8"), re.MULTILINE)
    assert len(places) == len(set(places))
    assert {f"mlpool.{name}" for name in mlpool.__all__} <= set(places)
    for place in places:
        module, _, name = place.rpartition(".")
        assert hasattr(importlib.import_module(module), name), place


def test_every_design_and_command_is_named():
    readme, page = ((ROOT / name).read_text(encoding="utf8") for name in ("README.md", "docs/commands.md"))
    assert [name for name in mlpool.DESIGNS if f"| `{name}`" not in readme] == []
    assert [name for name in COMMANDS if f"| `mlpool {name}" not in page] == []


def test_every_variable_of_ours_is_named():
    page = (ROOT / "docs/commands.md").read_text(encoding="utf8")
    sources = [*(ROOT / "mlpool").rglob("*.py"), *(ROOT / "kernels/mlpool_kernels").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"MLPOOL_[A-Z_]+", path.read_text(encoding="utf8"))}
    assert "MLPOOL_TILES" in read
    assert [name for name in sorted(read) if f"`{name}`" not in page] == []


def messages() -> str:
    """Every text of the sources, "…" where something is filled in."""
    found = []
    for path in [*(ROOT / "mlpool").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%\w", "…", node.value))
    return "\n".join(found)


def test_messages_of_the_page_on_errors_are_ours():
    said = messages()
    text = (ROOT / "docs/errors.md").read_text(encoding="utf8")
    first = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    quoted = [message for cell in first for message in re.findall("`([^`]+)`", cell)]
    assert len(quoted) > 15
    for message in quoted:
        pattern = ".*".join(map(re.escape, filter(None, re.split(r"\s*(?:…|\b\d\S*)\s*", message))))
        assert pattern, f"{message!r} says nothing"
        assert re.search(pattern, said), f"no message of ours is {message!r}"


def test_readme_stays_short():
    lines = (ROOT / "README.md").read_text(encoding="utf8").splitlines()
    assert len(lines) <= 90  # a screen and a half
