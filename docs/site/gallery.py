"""docs/gallery.md: every CSV of benchmarks/results as plots, each with its command, device and day.

    python docs/site/gallery.py        # `make plots` does this too

Bars are written as SVG by hand, a few kilobytes each and the same bytes for the same rows, so that a test can hold them
to the files without drawing anything (tests/test_gallery.py). A file that stands in no section is an error.
"""

from __future__ import annotations

import csv
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import studies
from results import RESULTS, ROOT, Line, count, mebibytes, milliseconds, times

PAGE = ROOT / "docs" / "gallery.md"
FOLDER = ROOT / "docs" / "figures" / "gallery"
OURS, OTHER, INK = "#4263eb", "#a3a7b0", "#7d828c"  # on white and on black
# Pixels: of names at least, of bars, of what is written behind them; of a row.
NAMES, PANEL, WRITTEN, STEP = 180, 210, 115, 18
# Rows from before they carried their day: that of the commit which brought the file.
DAYS = {
    "attention-cpu-2cores-quick": "2026-11-22",
    "census": "2026-11-24",
    "contrast-nvidia-h200-full": "2026-11-27",
    "mining-cpu-2cores": "2026-11-28",
    "encode-nvidia-h200-full": "2026-11-27",
    "throughput-nvidia-h200-full": "2026-11-27",
    "train-step-cpu-2cores-quick": "2026-11-22",
    "tune-nvidia-h200": "2026-11-27",
}


class Bar(NamedTuple):
    """group: stands above its bars. note: behind the value. ours: in our colour."""

    group: str
    name: str
    value: float
    written: str
    note: str = ""
    ours: bool = False


class Plot(NamedTuple):
    """what: of what the bars are, as a caption. bars: from the rows of a file."""

    what: str
    bars: Callable[[Sequence[Line]], list[Bar]]


class Section(NamedTuple):
    """benchmark: how its files begin. commands: on a CPU, on a card (with `RESULTS=` for a folder of one's own)."""

    benchmark: str
    title: str
    said: str
    commands: Mapping[str, str]
    plots: Sequence[Plot]


# --- bars from rows ---------------------------------------------------------------------------------------------------


def _ours(provider: str) -> bool:
    return provider.startswith(("mlpool", "packed"))


def measured(column: str, written: Callable[[str], str], ratio: str = "", group: str = "case") -> Callable:
    """A bar for each right row that has this column; its ratio to the reference behind it.

    A batch that the case does not name stands beside it; of rows measured twice the last one counts.
    """

    def bars(rows: Sequence[Line]) -> list[Bar]:
        batches: dict[str, set[str]] = {}
        for row in rows:
            batches.setdefault(row[group], set()).add(row.get("batch", ""))
        found: dict[tuple[str, str], Bar] = {}
        for row in rows:
            if row["green"] != "True" or not row.get(column):
                continue
            case = row[group] + (f", batch {row['batch']}" if len(batches[row[group]]) > 1 else "")
            note = times(float(row[ratio])) if row.get(ratio) and float(row[ratio]) != 1 else ""
            who = row["provider"]
            found[case, who] = Bar(case, who, float(row[column]), written(row[column]), note, _ours(who))
        cases = list(dict.fromkeys(case for case, _ in found))
        return sorted(found.values(), key=lambda bar: cases.index(bar.group))

    return bars


def tuned(rows: Sequence[Line]) -> list[Bar]:
    """Of each kernel and size with a choice of tiles, the slowest tile and the fastest."""
    tiles: dict[str, list[Line]] = {}
    for row in rows:
        if row["green"] == "True" and row["tile"]:
            tiles.setdefault(row["case"], []).append(row)
    bars = []
    for case, tried in tiles.items():
        if len(tried) > 1:
            taken = sorted(float(row["median_us"]) / 1e3 for row in tried)
            slowest, fastest = taken[-1], taken[0]
            bars.append(Bar(case, f"slowest of {len(tried)}", slowest, milliseconds(str(slowest))))
            bars.append(Bar(case, "fastest", fastest, milliseconds(str(fastest)), times(slowest / fastest), True))
    return bars


def outcomes(rows: Sequence[Line]) -> list[Bar]:
    """How many families have each outcome on each backend."""
    counts = Counter((row["backend"], row["outcome"]) for row in rows)
    order = ("works", "encoder", "refused", "no model")
    names = ("made bidirectional", "bidirectional by itself", "refused, with a reason", "no model of that kind")
    return [
        Bar(backend, name, counts[backend, outcome], str(counts[backend, outcome]), "", outcome in order[:2])
        for backend in dict.fromkeys(row["backend"] for row in rows)
        for outcome, name in zip(order, names, strict=True)
        if counts[backend, outcome]
    ]


def with_negatives(rows: Sequence[Line]) -> list[Bar]:
    """The test score of trainings with and without mined negatives, each at the learning rate that dev chooses."""
    bars = []
    for negatives in sorted({row["negatives"] for row in rows}, key=int):
        rates: dict[str, list[Line]] = {}
        for row in rows:
            if row["negatives"] == negatives:
                rates.setdefault(row["learning_rate"], []).append(row)
        chosen = max(rates.values(), key=lambda found: mean(float(row["dev"]) for row in found))
        scores = [float(row["test"]) for row in chosen]
        name = f"{negatives} mined a pair" if int(negatives) else "pairs alone"
        spread = f"± {stdev(scores):.4f}, {len(scores)} seeds"
        bars.append(Bar("MedQuAD, MiniLM", name, mean(scores), f"{mean(scores):.4f}", spread, bool(int(negatives))))
    return bars


def trained(rows: Sequence[Line]) -> list[Bar]:
    """The rows of docs/designs.md's tables by the mean of their tasks, best first."""
    bars = []
    for shown in studies.TABLES.values():
        count = len({task for tasks in shown.columns.values() for task in tasks})
        found = []
        for row, name in shown.rows.items():
            *_, score = studies.means(shown, row, rows)
            seeds = len(studies.scores(shown, row, rows))
            note = f"{seeds} seeds" if seeds > 1 else ""
            who = f"{name}, {studies.rate(row)}"
            found.append(Bar(f"{shown.base}, {count} sets", who, score, f"{score:.3f}", note, _is_ours(row)))
        bars += sorted(found, key=lambda bar: -bar.value)
    return bars


def of_designs(column: str) -> Callable[[Sequence[Line]], list[Bar]]:
    """A bar for each design, its ratio to the first behind it."""

    def bars(rows: Sequence[Line]) -> list[Bar]:
        first = float(rows[0][column])
        return [
            Bar(
                f"{row['base']}, {row['threads']} thread", row["design"], float(row[column]), count(row[column]),
                times(float(row[column]) / first), _is_ours(row["design"]),
            )
            for row in rows
        ]  # fmt: skip

    return bars


def _is_ours(design: str) -> bool:
    return "multi-layer" in design and "released" not in design


# --- what is where ----------------------------------------------------------------------------------------------------

TIME, MEMORY, RATE = (
    "median time: shorter is better",
    "peak extra memory: shorter is better",
    "texts a second: longer is better",
)
OVER_EAGER = Plot(TIME, measured("median_ms", milliseconds, "ratio_eager"))
EXTRA = Plot(MEMORY, measured("extra_mib", mebibytes, "memory_share"))
SECTIONS = (
    Section(
        "throughput",
        "Pools",
        "The pools alone, on states that are there; behind a bar the speed, or the memory, over eager's.",
        {"cpu": "make bench", "card": "make gpu-throughput"},
        [OVER_EAGER, EXTRA],
    ),
    Section(
        "choices",
        "Choices of the plan",
        "Every exact form of a pool against the one that the plan picks.",
        {"cpu": "python benchmarks/throughput.py --choices", "card": "make gpu-choices"},
        [OVER_EAGER, EXTRA],
    ),
    Section(
        "contrast",
        "InfoNCE as one operation",
        "The loss on embeddings, anchors × documents; “products” are its matrix products alone, the least that it can "
        "take.",
        {"cpu": "python benchmarks/contrast.py", "card": "make gpu-contrast"},
        [OVER_EAGER, EXTRA],
    ),
    Section(
        "tune",
        "Tiles",
        "Of every kernel and size the slowest and the fastest tile that was tried, and how far they are apart.",
        {"card": "make gpu-tune"},
        [Plot(TIME, tuned)],
    ),
    Section(
        "encode",
        "Texts to embeddings",
        "Backbone and pool; behind a bar the speed over eager, the paper's pipeline. sentence-transformers is mean "
        "pooling on the same backbone.",
        {"cpu": "python benchmarks/encode.py --quick", "card": "make gpu-encode"},
        [Plot(RATE, measured("texts_per_s", count, "ratio_eager")), EXTRA],
    ),
    Section(
        "attention",
        "Padding and packing",
        "Decoders on texts of real lengths, padded and packed; behind a bar the speed over padded sdpa.",
        {"cpu": "python benchmarks/attention.py", "card": "make gpu-attention"},
        [Plot(TIME, measured("median_ms", milliseconds, "ratio_sdpa")), EXTRA],
    ),
    Section(
        "train-step",
        "A training step",
        "One step with LoRA; “cached” embeds in mini-batches, so that memory does not grow with the batch.",
        {"cpu": "python benchmarks/train_step.py --quick", "card": "make gpu-train"},
        [Plot(RATE, measured("texts_per_s", count)), EXTRA],
    ),
    Section(
        "train-peers",
        "Fine-tuning beside sentence-transformers",
        "The same fine-tuning in both, with equal losses; behind a bar the speed over its plain loss.",
        {"cpu": "python benchmarks/train_peers.py --base bases/smollm2"},
        [Plot(RATE, measured("texts_per_s", count, "ratio_plain")), EXTRA],
    ),
    Section(
        "mining",
        "Mined negatives",
        "The same pairs in the same order, with and without the negatives that `mlpool mine` found; the learning rate "
        "is chosen on other questions than these.",
        {"cpu": "python benchmarks/mining.py"},
        [Plot("nDCG@10 of MedQuAD questions: longer is better", with_negatives)],
    ),
    Section(
        "designs",
        "Designs",
        "What short trainings make of real bases; each base has its data and steps ([designs](designs.md)), behind the "
        "name the learning rate.",
        {"cpu": "mlpool study configs/study/smollm2.yaml --base bases/smollm2 --data small --jobs 2"},
        [Plot("mean test score: longer is better", trained)],
    ),
    Section(
        "costs",
        "Designs beside mean pooling",
        "Embedding texts of up to 32 tokens, and training on them with LoRA; behind a bar the speed over mean pooling.",
        {"cpu": "python benchmarks/designs.py --base bases/smollm2 --name smollm2 --data small"},
        [
            Plot("texts a second, embedding: longer is better", of_designs("encode_texts_per_s")),
            Plot("texts a second, training: longer is better", of_designs("train_texts_per_s")),
        ],
    ),
    Section(
        "census",
        "Families",
        "All text families of transformers as tiny models: on how many each backend was made bidirectional and passed "
        "the tests. [Each of them](attention-families.md)",
        {"cpu": "make census"},
        [Plot("families of each outcome", outcomes)],
    ),
)
PLACES = {"card": "On a card", "cpu": "On a CPU"}


def place(path: Path) -> str:
    return "cpu" if "-cpu-" in path.name or path.stem in ("census", "designs") else "card"


def files(section: Section, where: str, folder: Path = RESULTS) -> list[Path]:
    return [p for p in sorted(folder.glob("*.csv")) if section_of(p) is section and place(p) == where]


def section_of(path: Path) -> Section:
    """Where a file is shown.

    Raises:
        LookupError: nowhere.
    """
    for section in SECTIONS:
        if path.stem == section.benchmark or path.stem.startswith(f"{section.benchmark}-"):
            return section
    raise LookupError(f"{path.name} stands in no section of the gallery: add one to SECTIONS in docs/site/gallery.py")


# --- the drawing ------------------------------------------------------------------------------------------------------


def scale(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    """The length in pixels for a value, and where a logarithmic axis has its lines; linear below a range of 30."""
    least, most = min(values), max(values)
    if least <= 0 or most / least < 30:
        return lambda value: PANEL * value / most, []
    first, last = math.floor(math.log10(least) - 0.05), math.log10(most)
    lines = [10.0**k for k in range(first, math.floor(last) + 1)]
    return lambda value: PANEL * (math.log10(value) - first) / (last - first), lines


def svg(panels: Mapping[str, Sequence[Bar]], alt: str) -> str:
    """Panels beside each other, what → bars; their rows are the same, under the names of their groups."""
    rows = list(dict.fromkeys((bar.group, bar.name) for bars in panels.values() for bar in bars))
    groups = list(dict.fromkeys(group for group, _ in rows))
    rows.sort(key=lambda row: groups.index(row[0]))
    body, places, y = [], {}, 14
    names = max(NAMES, 8 + 6 * max(len(name) for _, name in rows))
    for i, (group, name) in enumerate(rows):
        if i == 0 or rows[i - 1][0] != group:
            y += STEP + 4
            body.append(f'<text x="0" y="{y - 4}" font-weight="bold">{escape(group)}</text>')
        places[group, name] = y
        body.append(f'<text x="{names - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
        y += STEP
    for i, (what, bars) in enumerate(panels.items()):
        left = names + i * (PANEL + WRITTEN)
        length, lines = scale([bar.value for bar in bars])
        body.append(f'<text x="{left}" y="10">{escape(what)}</text>')
        for x in lines:
            at = left + length(x)
            body.append(f'<path d="M{at:.1f} 28V{y}" stroke="{INK}" stroke-opacity=".3"/>')
            body.append(f'<text x="{at + 3:.1f}" y="24" font-size="9">{x:g}</text>')
        body += [_drawn(bar, left, places[bar.group, bar.name], max(length(bar.value), 1)) for bar in bars]
    width = names + len(panels) * (PANEL + WRITTEN)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 6}" width="{width}" role="img" '
        f'font-family="system-ui,sans-serif" font-size="11" fill="{INK}"><title>{escape(alt)}</title>'
    )
    return "\n".join([head, *body, "</svg>"]) + "\n"


def _drawn(bar: Bar, left: int, y: int, length: float) -> str:
    color, strong = (OURS, f' fill="{OURS}" font-weight="bold"') if bar.ours else (OTHER, "")
    said = escape(" · ".join(filter(None, (bar.written, bar.note))))
    return (
        f'<rect x="{left}" y="{y + 1}" width="{length:.1f}" height="13" fill="{color}"/>'
        f'<text x="{left + length + 5:.1f}" y="{y + 11}"{strong}>{said}</text>'
    )


# --- the page ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Line]:
    with path.open(newline="", encoding="utf8") as file:
        return list(csv.DictReader(file))


def measured_by(path: Path, rows: Sequence[Line]) -> str:
    """Device, day and versions of the newest row."""
    last = rows[-1]
    tools = [f"{name} {last[name]}" for name in ("torch", "triton", "transformers", "mlpool") if last.get(name)]
    day = last.get("date") or DAYS.get(path.stem) or f"commit {last.get('commit', 'unknown')}"
    wrong = sum(row.get("green") == "False" for row in rows)
    left = f"; {wrong} wrong or failed rows are not shown" if wrong else ""
    found = [last.get("device"), last.get("dtype"), day, *(tool for tool in tools if not tool.endswith(" none"))]
    return ", ".join(filter(None, found)) + f". {len(rows)} rows{left}."


def made(folder: Path = RESULTS) -> dict[Path, str]:
    """The page and its figures: path → text.

    Raises:
        LookupError: a file stands in no section. ValueError: a file has nothing to show.
    """
    for path in folder.glob("*.csv"):
        section_of(path)
    page = [
        "# Gallery",
        "",
        "Every CSV file of `benchmarks/results` as plots, made by `make plots`. Blue is mlpool, grey what it is",
        "compared with; rows whose numbers are out of bounds are not shown. Axes with lines are logarithmic. What it",
        "means is said in [measured](measured.md).",
    ]
    texts = {}
    for where, title in PLACES.items():
        page += ["", f"## {title}"]
        for section in SECTIONS:
            for i, path in enumerate(files(section, where, folder)):
                page += ["", f"### {section.title}", "", section.said] if i == 0 else []
                rows = read(path)
                page += ["", f"`{path.name}`: {measured_by(path, rows)}", "", f"    {section.commands[where]}"]
                panels = {plot.what: bars for plot in section.plots if (bars := plot.bars(rows))}
                if not panels:
                    raise ValueError(f"{path.name} has no row to show")
                alt = f"{section.title}, {_spoken(panels)}"
                texts[FOLDER / f"{path.stem}.svg"] = svg(panels, alt)
                page += ["", f"![{alt}](figures/gallery/{path.stem}.svg)"]
    return {PAGE: "\n".join(page) + "\n", **texts}


def _spoken(panels: Mapping[str, Sequence[Bar]]) -> str:
    """The bars of the first group: an alternative text is no table."""
    what, bars = next(iter(panels.items()))
    first = ", ".join(f"{bar.name} {bar.written}" for bar in bars if bar.group == bars[0].group)
    return f"{what}. {bars[0].group}: {first}"


def main() -> int:
    texts = made()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in set(FOLDER.glob("*.svg")) - set(texts):
        old.unlink()
        print(f"{old.relative_to(ROOT)}: removed", file=sys.stderr)
    for path, text in texts.items():
        if not path.is_file() or path.read_text(encoding="utf8") != text:
            path.write_text(text, encoding="utf8")
            print(f"{path.relative_to(ROOT)}: written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
