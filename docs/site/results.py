"""The numbers that README and docs quote, from the committed CSV files: text between marks, never written by hand.

    python docs/site/results.py        # `make plots` does this and draws the figures

A mark is an HTML comment, `<!-- results NAME -->`, up to `<!-- /results -->`. tests/test_docs_numbers.py fails where
what stands between them is not what the CSV files give.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import studies

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CPU, GPU = "cpu-2cores", "nvidia-h200"
MARKED = re.compile(r"(<!-- results (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)
Line = dict[str, str]


class Shown(NamedTuple):
    """A case of `benchmarks/throughput.py` and what it is called."""

    name: str
    preset: str
    mode: str
    batch: int
    device: str

    @property
    def case(self) -> str:
        return f"{self.preset} B={self.batch} {self.mode}"


EVAL, TRAIN = "eval", "forward+backward"
SHOWN = (
    Shown("Qwen2-0.5B sizes", "qwen2-0.5b", EVAL, 256, GPU),
    Shown("same", "qwen2-0.5b", TRAIN, 256, GPU),
    Shown("Mistral-7B sizes", "mistral-7b", EVAL, 64, GPU),
    Shown("same", "mistral-7b", TRAIN, 64, GPU),
    Shown("MiniLM sizes", "minilm", EVAL, 64, GPU),
    Shown("default pool, Qwen2-0.5B", "default-pool", EVAL, 64, GPU),
    Shown("Qwen2-0.5B sizes", "qwen2-0.5b", EVAL, 2, CPU),
    Shown("same", "qwen2-0.5b", EVAL, 16, CPU),
    Shown("same", "qwen2-0.5b", TRAIN, 8, CPU),
    Shown("same", "qwen2-0.5b", TRAIN, 16, CPU),
    Shown("Mistral-7B sizes", "mistral-7b", EVAL, 2, CPU),
    Shown("default pool, Qwen2-0.5B", "default-pool", EVAL, 16, CPU),
    Shown("same", "default-pool", TRAIN, 16, CPU),
)
# The plan's own pick; where the case compares plans, the first of them is it.
OURS = ("mlpool", "mlpool save")


def lines(benchmark: str, device: str, folder: Path = RESULTS) -> list[Line]:
    """The rows of a benchmark on a device; the newest file's where a quick and a full one are there: the full one.

    Raises:
        FileNotFoundError: none has been measured.
    """
    found = [folder / f"{benchmark}-{device}{kind}.csv" for kind in ("-full", "", "-quick")]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(p.name for p in found)} in {folder}; measure it first, or drop it")
    with path.open(newline="", encoding="utf8") as file:
        return list(csv.DictReader(file))


def row(rows: Sequence[Line], case: str, *providers: str) -> Line | None:
    """The last measured row of a case that is right, of the first provider that has one."""
    for provider in providers:
        of = [line for line in rows if (line["case"], line["provider"]) == (case, provider) and line["green"] == "True"]
        if of:
            return of[-1]
    return None


def pair(shown: Shown) -> tuple[Line, Line] | None:
    """Eager's row and ours; None where one of them is missing."""
    rows = lines("throughput", shown.device)
    eager, ours = row(rows, shown.case, "eager"), row(rows, shown.case, *OURS)
    return (eager, ours) if eager and ours else None


# --- how numbers are written ------------------------------------------------------------------------------------------


def milliseconds(text: str) -> str:
    value = float(text)
    return f"{value / 1e3:.3g} s" if value >= 1e3 else f"{value:.3g} ms"


def mebibytes(text: str) -> str:
    value = float(text)
    return f"{value / 1024:.3g} GiB" if value >= 1000 else f"{value:.3g} MiB"


def count(text: str) -> str:
    value = float(text)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(value: float) -> str:
    return f"{value:.3g}×" if value < 100 else f"{value:.0f}×"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body)) + "\n"


# --- the tables -------------------------------------------------------------------------------------------------------


def pools(device: str) -> str:
    """The pools by themselves: eager, compiled, ours."""
    rows, body = lines("throughput", device), []
    for shown in (s for s in SHOWN if s.device == device):
        if (found := pair(shown)) is None:
            continue
        eager, ours = found
        compiled = row(rows, shown.case, "compiled")
        body.append([
            f"{shown.name}, {'embed' if shown.mode == EVAL else 'forward + backward'}, B={shown.batch}",
            milliseconds(eager["median_ms"]), milliseconds(compiled["median_ms"]) if compiled else "",
            milliseconds(ours["median_ms"]), f"**{times(float(ours['ratio_eager']))}**",
            f"{mebibytes(eager['extra_mib'])} → {mebibytes(ours['extra_mib'])}",
        ])  # fmt: skip
    return table(["", "eager", "torch.compile", "mlpool", "over eager", "extra memory"], body)


def texts(device: str) -> str:
    """Texts to embeddings, a second, design 5."""
    rows = lines("encode", device)
    body = []
    for case in dict.fromkeys(line["case"] for line in rows):
        preset, design, pooler, length = case.rsplit(" ", 3)
        found = [row(rows, case, provider) for provider in ("eager", "sentence-transformers", "mlpool")]
        eager, st, ours = found
        if design != "multi-layer-bidirectional" or not (eager and st and ours):
            continue
        what = f"{preset}, {'released' if pooler == 'paper' else pooler} pool, "
        what += "mixed lengths" if length == "mixed" else f"{length} tokens"
        ratios = (float(ours["texts_per_s"]) / float(other["texts_per_s"]) for other in (eager, st))
        body.append([what, *(count(one["texts_per_s"]) for one in (eager, st, ours)), *map(times, ratios)])
    header = ["texts a second", "eager, the paper's pipeline", "sentence-transformers, mean", "mlpool"]
    return table([*header, "over eager", "over the mean"], body)


def steps(device: str) -> str:
    """A training step with LoRA: batch, speed, memory."""
    body = []
    for line in lines("train-step", device):
        if line["green"] == "True":
            pooler = "released" if line["pooler"] == "paper" else line["pooler"]
            what = [f"{pooler} pool, {line['batch']} queries", line["provider"]]
            body.append([*what, count(line["texts_per_s"]), mebibytes(line["extra_mib"])])
    return table(["", "", "texts a second", "memory"], body)


def peers(device: str) -> str:
    """Fine-tuning beside sentence-transformers: speed over its two losses, and memory."""
    rows = lines("train-peers", device)
    cases = list(dict.fromkeys(line["case"] for line in rows))
    names = {"smollm2": "SmolLM2-135M", "qwen2-0.5b": "Qwen2-0.5B’s size", "24": "24 tokens", "pairs": "real lengths"}
    header = ["over the plain loss / over the cached; memory"]
    header += [", ".join(names.get(part, part) for part in case.split(" ")) for case in cases]
    body = []
    for provider in dict.fromkeys(line["provider"] for line in rows):
        found = [one for case in cases if (one := row(rows, case, provider))]
        if len(found) == len(cases):
            ratios = [f"{times(float(f['ratio_plain']))} / {times(float(f['ratio_cached']))}" for f in found]
            cells = [f"{ratio}; {mebibytes(f['extra_mib'])}" for ratio, f in zip(ratios, found, strict=True)]
            body.append([provider, *cells])
    means = [(row(rows, case, "mlpool mean"), row(rows, case, "mlpool")) for case in cases]
    costs = [float(ours["median_ms"]) / float(mean["median_ms"]) - 1 for mean, ours in means if mean and ours]
    if len(costs) == len(cases):
        body.append(["what the default pool costs over mlpool mean", *(f"{cost:.1%}" for cost in costs)])
    return table(header, body)


def packed(device: str) -> str:
    """Packed decoders against padded ones."""
    rows, body = lines("attention", device), []
    for case in dict.fromkeys(line["case"] for line in rows):
        if found := row(rows, case, "packed"):
            speed, memory = float(found["ratio_sdpa"]), float(found["memory_share"])
            error = f"{float(found['error']):.0e}"
            body.append([case, times(speed), f"{memory:.2f}×", error])
    return table(["over padded sdpa", "speed", "memory", "largest relative difference"], body)


def versions(device: str) -> str:
    """What measured the newest rows of the pools."""
    last = lines("throughput", device)[-1]
    tools = ", ".join(f"{name} {last[name]}" for name in ("torch", "triton", "mlpool") if last[name] != "none")
    return f"{last['device']}, {last['dtype']}, {tools}.\n"


def gains(device: str) -> str:
    """The least and the most that was gained with the released pool."""
    found = [pair(shown) for shown in SHOWN if shown.device == device and not shown.preset.startswith("default")]
    ratios = sorted(float(ours["ratio_eager"]) for _, ours in filter(None, found))
    return f"{ratios[0]:.2g} to {ratios[-1]:.2g}"


def claim() -> str:
    """README's sentence under its figure."""
    return (
        f"The released pool, embedding and training: {gains(GPU)} times the speed of eager PyTorch on an H200, "
        f"{gains(CPU)} times on two CPU cores, equal to eager within its own rounding.\n"
    )


TABLES = {"pools": pools, "texts": texts, "steps": steps, "peers": peers, "packed": packed, "versions": versions}
TEXTS: dict[str, Callable[[], str]] = {"claim": claim} | {
    f"{name}-{device}": partial(make, device) for name, make in TABLES.items() for device in (CPU, GPU)
}
TEXTS |= {f"study-{name}": partial(studies.made, name) for name in studies.TABLES}


def written(text: str) -> str:
    """A page with what stands between its marks made anew.

    Raises:
        KeyError: an unknown name.
    """
    return MARKED.sub(lambda found: found[1] + TEXTS[found[2]]() + found[3], text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    for page in pages():
        before = page.read_text(encoding="utf8")
        if (after := written(before)) != before:
            page.write_text(after, encoding="utf8")
            print(f"{page.relative_to(ROOT)}: written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
