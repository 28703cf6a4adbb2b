"""`mlpool mine`: training pairs in, the same pairs with hard negatives out, as a file that `load_pairs` reads.

OUT.jsonl          a pair a line: anchor, positive, negative_1 … negative_k, scores [positive, negative_1, …]
OUT.jsonl.meta     JSON: by which model and options, counts, scores; its name keeps it from being read as pairs
.OUT.jsonl.mining  until then: the plan, what was mined so far, and the embeddings if no other place is named
"""

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..corpus.encode import describe_model
from ..corpus.negatives import Blocks, Choice, Pairs, mine
from ..corpus.rows import BATCH
from ..corpus.text_files import find_columns, find_files, read_file
from ..corpus.text_store import TextStore
from ..embedder.identity import identity
from ..files import check_link, read_json, replacing, sha256, write_json
from ..pooling.base import check_choice
from ..show import aligned, progress, shorten
from ..version import versions
from .columns import count
from .data import load_pairs

TOO_FEW = ("drop", "refuse")
PLAN = "plan.json"
# What a model may store for documents, the first that it has; for anchors it is "query".
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


def mine_pairs(
    source: Any, model: Any, output: str | Path, choice: Choice | None = None, *,
    columns: Mapping[str, Any] | None = None, limit: int | None = None, corpus: Sequence[str | Path] = (),
    cross_encoder: Any = None, too_few: str = "drop", query_prompt: str | None = None,
    document_prompt: str | None = None, embeddings: str | Path | None = None, search: str = "auto",
    token_budget: int | None = None, batch_size: int | None = None, overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Mine hard negatives for pairs and write them; called again after an interruption, it goes on.

    The documents that may be negatives are all positives and the texts of `corpus`, duplicates left out
    (`corpus/text_store.py` says what one is). Never a negative: a positive of the same anchor in any row, a duplicate
    of it, or of the anchor. Memory: a block of `corpus/negatives.py`, and about 100 bytes a pair and a document.

    Args:
        source, columns, limit: as of `load_pairs`; negatives that the pairs have are left out.
        model: a SentenceTransformer, whose embeddings find the negatives.
        output: a .jsonl file.
        choice: how many negatives, and which.
        corpus: files of texts as `encode_files` takes them.
        cross_encoder: a CrossEncoder; its scores decide among what the embeddings find, by the margins or bounds of
            `choice`, one of which it needs.
        too_few: pairs for which fewer negatives are found: "drop" or "refuse".
        query_prompt, document_prompt: before anchors and documents; by default those stored in the model.
        embeddings: a folder for the embeddings, which stay; they are used again for the same texts and model.
        search: of `nearest`. token_budget, batch_size: of `encode_files`.
        overwrite: replace the output, and what another run left.

    Returns: what OUT.jsonl.meta holds.

    Raises:
        ValueError: no pair with enough negatives, or with `too_few="refuse"` any without; what is there is of another
            model, other texts or other options (named); errors of `load_pairs` and `encode_files`.
        FileExistsError: a file of something else is at `output`.
    """
    choice, output = choice or Choice(), Path(output)
    check_choice("too_few", too_few, TOO_FEW)
    if output.suffix != ".jsonl":
        raise ValueError(f"the output is {output.name}, expected a name that ends in .jsonl")
    check_link(output)
    if cross_encoder is not None and not choice.judges:
        raise ValueError("a cross-encoder judges by a margin or a bound, and none is given: say relative_margin=0.05")
    work = output.with_name(f".{output.name}.mining")
    pairs = load_pairs(source, columns=columns, limit=limit, num_negatives=0)
    place = work / "embeddings" if embeddings is None else Path(embeddings)
    anchors, documents = TextStore(place, "anchors"), TextStore(place, "documents")
    anchor_of = anchors.fill(_Column(pairs, "anchor"), overwrite)
    document_of = documents.fill(_Documents(_Column(pairs, "positive"), corpus), overwrite)[: len(pairs)]
    prompts = [_prompt(model, query_prompt, ("query",)), _prompt(model, document_prompt, DOCUMENT_PROMPTS)]
    digest = hashlib.sha256(anchor_of.tobytes() + document_of.tobytes())
    plan = {
        "pairs": str(source), "corpus": list(map(str, corpus)),
        "texts": [sha256(anchors.path), sha256(documents.path), digest.hexdigest()],
        "model": describe_model(model), "prompts": prompts,
        "cross_encoder": None if cross_encoder is None else identity(cross_encoder),
        "options": {**asdict(choice), "too_few": too_few},
    }  # fmt: skip
    if done := _finished(output, plan, overwrite):
        return done
    _resume(work, plan, overwrite)
    for store, prompt in zip((anchors, documents), prompts, strict=True):
        store.embed(model, prompt, token_budget=token_budget, batch_size=batch_size, overwrite=overwrite)
    table, row_of = Pairs.of(anchor_of, document_of, documents.find(anchors))
    mine(table, anchors, documents, choice, work / "blocks", judge=cross_encoder, batch_size=batch_size or 32,
         device=getattr(model, "device", "cpu"), search=search)  # fmt: skip
    rows = _Rows(pairs, anchor_of, row_of, Blocks(work / "blocks", table), documents, choice.num_negatives)
    found = rows.count()
    try:
        _check_enough(found, rows, choice, too_few)
    except ValueError:
        shutil.rmtree(work / "blocks")  # of use to no other options; the embeddings are
        (work / PLAN).unlink()
        raise
    with replacing(output) as new:
        scores = rows.write(new)
        counts = {
            "pairs": found.total(), "written": found[choice.num_negatives],
            "dropped": found.total() - found[choice.num_negatives],
            "found": {str(n): found[n] for n in sorted(found)}, "anchors": len(anchors), "documents": len(documents),
        }  # fmt: skip
        summary = {
            **plan, "counts": counts, "scores": scores, "sha256": sha256(new),
            "versions": versions("mlpool", "sentence-transformers", "torch", "faiss-cpu"),
        }  # fmt: skip
        write_json(_meta(output), summary)
    shutil.rmtree(work)
    return summary


# --- what is there ---------------------------------------------------------------------------------------------------


def _meta(output: Path) -> Path:
    return output.with_name(f"{output.name}.meta")


def _finished(output: Path, plan: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The summary of a run that was this one and came to its end."""
    if overwrite or not output.exists():
        return None
    try:
        before = read_json(_meta(output))
    except FileNotFoundError:
        raise FileExistsError(
            f"{output} is there and no `mlpool mine` wrote it; name another file, or replace it (--overwrite)"
        ) from None
    _check_same(output, before, plan)
    if before.get("sha256") != sha256(output):
        raise ValueError(f"{output} is not as it was written; mine it anew (--overwrite)")
    return before


def _resume(work: Path, plan: Mapping[str, Any], overwrite: bool) -> None:
    if overwrite:
        shutil.rmtree(work / "blocks", ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            _check_same(work, read_json(work / PLAN), plan)
    write_json(work / PLAN, plan)


def _check_same(place: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError where what is there is of another run; all that differs is named."""
    differs = []
    for name, value in now.items():
        old, new = before.get(name), value
        if name == "model":
            old, new = (old or {}).get("identity"), new["identity"]
        if name == "options":
            differs += [f"{n} was {(old or {}).get(n)!r}, now {v!r}" for n, v in new.items() if (old or {}).get(n) != v]
        elif old != new and name not in ("pairs", "corpus"):  # paths: their texts are compared
            differs.append(f"{name} was {shorten(old)}, now {shorten(new)}")
    if differs:
        raise ValueError(
            f"{place} is of another run: {'; '.join(differs)}. Name another output, or replace it (--overwrite)"
        )


# --- texts -----------------------------------------------------------------------------------------------------------


class _Column:
    """A column's texts, gone through as often as one likes, a batch in memory."""

    def __init__(self, pairs: datasets.Dataset, name: str) -> None:
        self._pairs, self._name = pairs.select_columns(name).with_format(None), name

    def __iter__(self) -> Iterator[str]:
        for batch in self._pairs.iter(BATCH):
            yield from batch[self._name]


class _Documents:
    """The positives, and then the texts of files."""

    def __init__(self, positives: _Column, files: Sequence[str | Path]) -> None:
        self._positives = positives
        self._files = find_files(files) if files else []
        self._columns = find_columns(self._files) if files else None

    def __iter__(self) -> Iterator[str]:
        yield from self._positives
        for path in self._files:
            assert self._columns is not None
            yield from (row.text for row in read_file(path, self._columns) if row.text and not row.text.isspace())


def _prompt(model: Any, given: str | None, names: Sequence[str]) -> str | None:
    stored = getattr(model, "prompts", None) or {}
    return given if given is not None else next((stored[name] for name in names if name in stored), None)


# --- what comes out --------------------------------------------------------------------------------------------------


class _Rows:
    """The pairs in their order, each with the documents that were found for its anchor."""

    def __init__(
        self, pairs: datasets.Dataset, anchor_of: np.ndarray, row_of: np.ndarray, blocks: Blocks, documents: TextStore,
        most: int,
    ) -> None:  # fmt: skip
        self._texts = [_Column(pairs, name) for name in ("anchor", "positive")]
        self._anchor_of, self._row_of, self._blocks, self._documents = anchor_of, row_of, blocks, documents
        self.most = most

    def _found(self) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        for anchor, row in zip(self._anchor_of, self._row_of, strict=True):
            yield self._blocks.of(int(anchor), int(row))

    def count(self) -> Counter[int]:
        """How many pairs have how many negatives."""
        return Counter(len(documents) for documents, *_ in self._found())

    def first_short(self) -> str:
        i, found = next((i, len(d)) for i, (d, *_) in enumerate(self._found()) if len(d) < self.most)
        anchor = next(text for j, text in enumerate(self._texts[0]) if j == i)
        return f"pair {i + 1}, {shorten(anchor)}, has {found}"

    def write(self, path: Path) -> dict[str, dict[str, float]]:
        """Write those with all negatives; returns mean, least and most of their scores."""
        seen = {"positives": _Spread(), "negatives": _Spread(), "positive - negative": _Spread()}
        with path.open("w", encoding="utf8") as file, progress("writing", "pairs", len(self._anchor_of)) as bar:
            for anchor, text, (found, scores, score) in zip(*self._texts, self._found(), strict=True):
                bar.update()
                if len(found) < self.most:
                    continue
                for name, values in zip(seen, (np.array([score]), scores, score - scores), strict=True):
                    seen[name].add(values)
                negatives = {f"negative_{i + 1}": self._documents[int(n)] for i, n in enumerate(found)}
                row = {"anchor": anchor, "positive": text, **negatives,
                       "scores": [round(float(s), 6) for s in (score, *scores)]}  # fmt: skip
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return {name: spread.summary() for name, spread in seen.items()}


class _Spread:
    """Mean, least and most of numbers that come bit by bit."""

    def __init__(self) -> None:
        self.count, self.total, self.least, self.most = 0, 0.0, np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        self.count, self.total = self.count + len(values), self.total + float(values.sum(dtype=np.float64))
        self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))

    def summary(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.total / self.count, "least": self.least, "most": self.most}


def _check_enough(found: Counter[int], rows: _Rows, choice: Choice, too_few: str) -> None:
    short = found.total() - found[choice.num_negatives]
    judged = {n: v for n, v in asdict(choice).items() if v is not None and ("margin" in n or "score" in n)}
    by = ", ".join(f"{name}={value}" for name, value in judged.items()) or "the ranges"
    wanted = count(choice.num_negatives, "negative")
    if short == found.total():
        fewer = ", ".join(f"{found[n]:,} found {n}" for n in sorted(found) if n < choice.num_negatives)
        raise ValueError(
            f"not one of {count(found.total(), 'pair')} has {wanted} by {by}; {fewer}. Loosen these, "
            "raise range_max, lower num_negatives, or add texts (--corpus)"
        )
    if short and too_few == "refuse":
        raise ValueError(
            f"{short:,} of {count(found.total(), 'pair')} have fewer than {wanted} by {by} (first: "
            f"{rows.first_short()}); loosen these, raise range_max, or leave such pairs out (--too-few drop)"
        )


def describe(summary: Mapping[str, Any]) -> str:
    """What OUT.jsonl.meta holds, for people: a table of scores, and what was dropped."""
    counts, most = summary["counts"], summary["options"]["num_negatives"]
    lines = [
        [name, f"{s['count']:,}", *(f"{s[key]:.4f}" for key in ("mean", "least", "most"))]
        for name, s in summary["scores"].items()
    ]
    fewer = ", ".join(f"{n:,} with {k}" for k, n in counts["found"].items() if int(k) < most)
    return "\n".join(
        [
            aligned(["score", "count", "mean", "least", "most"], lines),
            f"{counts['written']:,} of {counts['pairs']:,} pairs written, {counts['dropped']:,} dropped"
            + (f" (negatives found: {fewer}; {most} wanted)" if fewer else ""),
            f"{counts['anchors']:,} distinct anchors, {counts['documents']:,} distinct documents",
        ]
    )
