"""What mkdocs does not do by itself: pages that may be there or not, notebooks, mathematics without a script.

Formulas are written as LaTeX between dollars, which GitHub shows too; here they become MathML when the site is built,
so that a reader's browser loads nothing for them.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

sys.path.append(str(Path(__file__).parent))
import notebooks

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """The navigation without what is not there, and with what nobody listed."""
    there = {path.name for path in Path(config.docs_dir).glob("*.md")}
    there |= {f"notebooks/{path.stem}.md" for path in Path(config.docs_dir).glob("notebooks/*.ipynb")}
    listed = set(_pages(config.nav))
    config.nav = _present(config.nav, there)
    if others := sorted(there - listed):
        config.nav.append({"More": others})
    return config


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(entry)]


def _present(nav: Any, there: set[str]) -> Any:
    if isinstance(nav, dict):
        return {name: _present(entry, there) for name, entry in nav.items()}
    if isinstance(nav, list):
        return [_present(entry, there) for entry in nav if not isinstance(entry, str) or entry in there]
    return nav


def on_files(files: Any, config: Any) -> Any:
    """A page for each notebook, its plots beside it; the notebook itself is there to be downloaded."""
    for path in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        markdown, pictures = notebooks.page(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=markdown))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to what the site does not hold become their texts, those to notebooks lead to the pages."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    markdown = re.sub(rf"\[([^\]]+)\]\({re.escape(up)}[^)]*\)", r"\1", markdown)
    return re.sub(r"(\]\([\w/-]+)\.ipynb\)", r"\1.md)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    return FORMULA.sub(lambda found: _mathml(found[3], "block" if found[2] == "[" else "inline"), content)


def _mathml(latex: str, display: str) -> str:
    made = convert(html.unescape(latex), display=display)
    return f'<div class="formula">{made}</div>' if display == "block" else made
