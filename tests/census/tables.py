"""The census as tables: all families in docs/attention-families.md, the common ones in docs/attention.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MATRIX, PAGE = ROOT / "docs" / "attention.md", ROOT / "docs" / "attention-families.md"
START, END = "<!-- attention-matrix -->", "<!-- /attention-matrix -->"
COLUMNS = {"eager": "eager", "sdpa": "sdpa", "flex_attention": "flex", "packed": "packed"}
COMMON = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2", "gemma3_text", "gemma4_text",
    "olmo2", "granite", "gpt_neox", "gpt_oss", "stablelm", "opt", "gpt2", "falcon", "llama4_text", "bert",
    "xlm-roberta", "modernbert",
)  # fmt: skip
CELLS = {"works": "ok", "encoder": "by itself", "no model": "–"}


def write_tables(rows: Sequence[Any], matrix: Path = MATRIX, page: Path = PAGE) -> None:
    """Both files from the rows of the CSV.

    Raises:
        ValueError: no rows; a page without its marks.
    """
    if not rows:
        raise ValueError("the census is empty: run `make census` first")
    families: dict[str, dict[str, Any]] = {}
    for row in rows:
        families.setdefault(row.family, {})[row.backend] = row
    _between_marks(matrix, _table(families, [name for name in COMMON if name in families]))
    version = rows[-1].transformers
    page.write_text(
        f"# Attention, family by family\n\n{len(families)} text families of transformers {version} as tiny random "
        "models, by `make census`: `bidirectional` on each backend, `pack`, `Taps` against `hidden_states[1:]`, and "
        "`causal` after save, reload and `bidirectional`. *ok*: both ways in every layer, by a probe that is not the "
        "package's own. *by itself*: an encoder. *refused*: with the reason. –: the library has no such backend, or no "
        f"such model can be built here.\n\n{_table(families, list(families), reasons=True)}\n",
        encoding="utf8",
    )


def _table(families: dict[str, dict[str, Any]], names: Sequence[str], reasons: bool = False) -> str:
    header = ["family", *COLUMNS.values(), "taps", "causal after reload", *(["reason"] if reasons else [])]
    lines = [header, ["---"] * len(header)]
    for name in names:
        of = families[name]
        eager = of.get("eager")
        line = [name, *(_cell(of.get(backend)) for backend in COLUMNS)]
        line += [_short(eager.taps) if eager else "–", _short(eager.reload) if eager else "–"]
        lines.append(line + ([_reason(of)] if reasons else []))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Any) -> str:
    return "–" if row is None else CELLS.get(row.outcome, row.outcome)


def _short(said: str) -> str:
    """ "ok" with what it stands for, or the first words of what happened."""
    return (said if said.startswith("ok") else said.partition(":")[0]) or "–"


def _reason(of: dict[str, Any]) -> str:
    """Why the first backend that refuses does so."""
    said = next((row.reason for row in of.values() if row.outcome == "refused"), "")
    said = said or next((row.reason for row in of.values() if row.outcome != "no model"), "")
    said = said.partition(": ")[2].replace("|", "/")
    return said if len(said) < 160 else f"{said[:157]}…"


def _between_marks(path: Path, table: str) -> None:
    text = path.read_text(encoding="utf8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{path.name} must hold {START} and {END} once each")
    before, after = text.split(START)[0], text.split(END)[1]
    path.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf8")
