"""The code of README and docs: Python blocks as they stand, commands by the parser of what they call."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("mlpool", "make", "python", "pip", "torchrun", "accelerate")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^\n|\A)((?: {4,}[^\n]*\n)+)", re.MULTILINE)
INLINE = re.compile(r"`((?:mlpool|make) [^`]*)`")


class Command(NamedTuple):
    page: str
    words: tuple[str, ...]  # variables before it left out


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf8")) if language in languages]


def shell_lines(page: Path) -> Iterator[str]:
    """Lines of fenced and indented shell code, and the commands that a table explains."""
    text = page.read_text(encoding="utf8")
    for block in blocks(page, "sh", "bash", "shell", "console"):
        yield from block.splitlines()
    prose = FENCE.sub("", text)
    for block in INDENTED.findall(prose):
        yield from block.splitlines()
    for line in prose.splitlines():
        if line.startswith("|"):
            yield from INLINE.findall(line)


def commands(page: Path) -> Iterator[Command]:
    for line in shell_lines(page):
        for part in line.partition("#")[0].split(";"):
            words = shlex.split(part)
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words.pop(0)
            if words and words[0] in PROGRAMS and "…" not in part:
                yield Command(page.name, tuple(words))
