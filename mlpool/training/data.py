"""Training pairs from any common file or table: columns mapped, every row checked, negatives made even.

A pair is an anchor (the query), its positive and 0 or more hard negatives. Rows are read in batches, checked, and
written to an Arrow file that is memory-mapped, so that a set larger than the memory can be trained on.
"""

import logging
import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

try:
    import datasets
    import numpy as np
    import pyarrow as pa
    from tqdm.auto import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"training data needs {error.name}: pip install 'mlpool[train]'") from error

from ..corpus.rows import BATCH
from ..corpus.sources import open_source
from ..pooling.base import check_choice, check_positive
from ..show import aligned, progress, shorten
from .checking import STAGED, Checker, Source, refuse
from .columns import count, text_columns

logger = logging.getLogger("mlpool")
_SPEC = ("source", "columns", "split", "limit", "weight")


def load_pairs(
    source: Any,
    *,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    num_negatives: int | None = None,
    positives: str = "expand",
    on_error: str = "raise",
    scores: str | None = None,
    cache_dir: str | Path | None = None,
) -> datasets.Dataset:
    """Load, map and check training pairs.

    Args:
        source: one of, or a list of

            - a file: .jsonl, .ndjson, .json, .csv, .tsv (each also .gz; UTF-8, with or without byte-order mark) or
              .parquet. A .json file that is one array is held in memory as text; all else is streamed.
            - a folder of such files, or of `Dataset.save_to_disk`. Where files are named after splits (train.jsonl,
              dev.jsonl), those of `split` are taken.
            - a data set of the Hub, `owner/name` or `owner/name:config`;
            - a datasets.Dataset or DatasetDict, or a list of dicts;
            - a dict {"source": one of these, "weight": 2.0, "limit": …, "columns": …, "split": …}. `weight` is how
              often its pairs are in the result: 2 is twice, 0.5 a random half.
        columns: {"anchor": name, "positive": name or names, "negative": name, names or nothing}; by default found by
            their names (`columns.FORMS`), in each file by itself. A cell holds a text, a list of texts, or one or a
            list of passages {"title", "text"}, joined by a space. A file with labels (`score`) beside plain pairs is
            refused, since some of its rows are no positives.
        split: for folders, DatasetDicts and the Hub ("train[:10%]" works there).
        limit: at most so many pairs of each source, the first ones; reading and checking stop there.
        seed: of every random choice below.
        num_negatives: of every pair. Rows with more give a random choice of theirs, in their order; rows with fewer are
            errors; 0 leaves negatives out. By default the smallest number that any row has: all, where rows agree;
            where they do not, what is left out is counted in a warning; and where only some have none, an error.
        positives: rows with several: "expand" makes a pair of each, "sample" one pair with a random one.
        on_error: "raise": an error naming the first 5 bad rows and how many there are; "skip": they are left out,
            counted in a warning.
        scores: a column with a teacher's scores in each row, a list: of its positive, then of its negatives in their
            order. Such rows have one positive and a negative or more.
        cache_dir: where the Arrow file lies until the process ends; by default in the cache folder of datasets.

    Returns:
        Dataset of strings `anchor`, `positive`, `negative_1` … `negative_n`, and with `scores` a list of that name of
        1 + n numbers, source after source in the order read, not shuffled. What was mapped is logged
        (INFO), what was left out too (WARNING); all of it stands in `dataset.info.description`. Train with
        `BatchSamplers.NO_DUPLICATES`: pairs of one anchor in a batch would be each other's false negatives.

    Raises:
        ValueError: bad rows (broken line, missing field, no text, empty or blank text, a positive among the negatives,
            too few negatives, scores missing, not finite or too few), each with `file:line` (text, from 1; a CSV row by
            its first line) or `file[row]` (tables, from 0); columns that fit nothing; no row; a damaged file; another
            extension.
        FileNotFoundError: no such file, folder with data or Hub data set, with the nearest names.
    """
    check_choice("positives", positives, ("expand", "sample"))
    check_choice("on_error", on_error, ("raise", "skip"))
    if num_negatives == 0 and scores is not None:
        raise ValueError(f"scores={scores!r} compare a positive with negatives, and num_negatives=0 leaves them out")
    if num_negatives != 0 and num_negatives is not None:
        check_positive(num_negatives=num_negatives)
    sources = _sources(source, columns, split, limit)
    parts = [open_source(s.data, s.split) for s in sources]
    bad: list[str] = []
    place = _scratch(str(cache_dir or datasets.config.HF_DATASETS_CACHE)).name
    with tempfile.TemporaryDirectory(dir=place, prefix="checking-") as folder:
        staged = Path(folder) / "checked.arrow"
        sizes = [None if s.limit else p.size for s, some in zip(sources, parts, strict=True) for p in some]
        with (
            pa.OSFile(str(staged), "wb") as file,
            pa.ipc.new_stream(file, STAGED) as writer,
            _progress("checking pairs", "rows", None if None in sizes else sum(n or 0 for n in sizes)) as bar,
        ):
            checker = Checker(random.Random(seed), num_negatives, positives == "sample", bad, scores)
            for s, some in zip(sources, parts, strict=True):
                s.name = some[0].name if len(some) == 1 else f"{s.data} ({len(some)} files)"
                for batch in checker.check(s, some, bar):
                    writer.write_batch(batch)
        refuse(sources, bad, on_error)
        number, notes = _even(sources, num_negatives)
        total, generator = sum(s.written for s in sources), np.random.default_rng(seed)
        result = _write(staged, total, number, generator, place, scores is not None)
    if any(s.weight != 1 for s in sources):
        result = result.select(repeated([s.written for s in sources], [s.weight for s in sources], seed))
    if same := sum(s.same for s in sources):
        notes.append(f"{count(same, 'pair')} with one text as anchor and positive")
    summary = f"{count(len(result), 'pair')} with {count(number, 'negative')}"
    result.info.description = "\n".join([summary, *map(str, sources), *notes])
    for line in (summary, *(str(s) for s in sources if not s.dropped)):
        logger.info(line)
    for line in (*(str(s) for s in sources if s.dropped), *notes):
        logger.warning(line)
    return result


def describe(
    dataset: datasets.Dataset,
    lengths: Callable[[str, Sequence[str]], Sequence[int]] | None = None,
    max_length: int | None = None,
) -> str:
    """A table of the columns: rows, duplicates, and words (mean, 95 %, most).

    Args:
        dataset: of `load_pairs`.
        lengths: of a column's texts in tokens, before they are cut; then also tokens.
        max_length: tokens the embedder keeps; then also how many texts are truncated.

    Duplicates are rows whose text stood in the column before: of anchors, that many pairs cannot share a batch with
    another one without being its false negative.
    """
    words, names = ["mean", "95 %", "most"], text_columns(dataset)
    head = ["column", "rows", "duplicates", *(f"words {w}" for w in words)]
    if lengths is not None:
        head += [f"tokens {w}" for w in words] + (["truncated"] if max_length else [])
    table = [head]
    with _progress("describing", "texts", len(names) * len(dataset)) as bar:
        for name in names:
            hashes, words_of, tokens = array("q"), array("q"), array("q")  # 8 bytes a text, whatever its length
            for batch in dataset.select_columns(name).with_format(None).iter(BATCH):
                texts = batch[name]
                hashes.extend(map(hash, texts))
                words_of.extend(len(t.split()) for t in texts)
                if lengths is not None:
                    tokens.extend(lengths(name, texts))
                bar.update(len(texts))
            repeated = len(hashes) - len(np.unique(hashes))
            row = [name, f"{len(hashes):,}", f"{repeated:,}", *_spread(words_of)]
            if lengths is not None:
                row += _spread(tokens)
                row += [f"{sum(n > max_length for n in tokens):,}"] if max_length else []
            table.append(row)
    return aligned(table[0], table[1:])


def _progress(what: str, unit: str, total: int | None) -> tqdm:
    """A bar on stderr, once the work has taken a second."""
    return progress(what, unit, total, unit_scale=True, delay=1, leave=False)


def _spread(lengths: Sequence[int]) -> list[str]:
    if not lengths:
        return ["–"] * 3
    return [f"{np.mean(lengths):.1f}", f"{np.percentile(lengths, 95):.0f}", f"{max(lengths):,}"]


# --- what to load --------------------------------------------------------------------------------------------------


def _sources(source: Any, columns: Any, split: str, limit: int | None) -> list[Source]:
    """Every source with its options; `columns`, `split` and `limit` are for those that have none of their own."""
    entries = [source]
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("the list of sources or rows is empty")
        # A list that starts with a dict is rows, unless that dict names a source.
        if not isinstance(source[0], dict) or isinstance(source[0], datasets.DatasetDict) or _is_spec(source[0]):
            entries = list(source)
    result = []
    for entry in entries:
        spec = {"columns": columns, "split": split, "limit": limit, "weight": 1.0}
        if isinstance(entry, dict) and not isinstance(entry, datasets.DatasetDict):
            if not _is_spec(entry):
                raise ValueError(f"a source given as dict has 'source' and may have {_SPEC[1:]}, got {shorten(entry)}")
            spec |= entry
        else:
            spec["source"] = entry
        weight, most = spec["weight"], spec["limit"]
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(f"weight must be a number above 0, got {weight!r}")
        if most is not None:
            check_positive(limit=most)
        result.append(Source(spec["source"], spec["columns"], spec["split"], most, float(weight)))
    return result


def _is_spec(entry: Any) -> bool:
    return isinstance(entry, dict) and "source" in entry and set(entry) <= set(_SPEC)


@lru_cache
def _scratch(parent: str) -> tempfile.TemporaryDirectory:
    """A folder that is removed when the process ends."""
    Path(parent).mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=parent, prefix="mlpool-", ignore_cleanup_errors=True)


# --- the final columns ---------------------------------------------------------------------------------------------


def _even(sources: Sequence[Source], num_negatives: int | None) -> tuple[int, list[str]]:
    """How many negatives each pair shall have, and what there is to say about it."""
    counts = sum((s.negatives for s in sources), Counter())
    least, most = min(counts), max(counts)
    if num_negatives is None and least == 0 < most:
        where = next(s.fewest[1] for s in sources if s.fewest and s.fewest[0] == 0)
        raise ValueError(
            f"{counts[0]:,} of {counts.total():,} pairs have no negatives (first {where}), others up to {most}; pass "
            f"num_negatives=0 to train without negatives, or num_negatives=1 (to {most}) with on_error='skip' to leave "
            "those rows out"
        )
    number = least if num_negatives is None else num_negatives
    have = sum(n * pairs for n, pairs in counts.items())
    left = have - number * counts.total()
    if not left:
        return number, []
    more = "" if number == most else f"; num_negatives={number + 1} to {most} keeps more, of the rows that have as many"
    return number, [
        f"{left:,} of {have:,} negatives left out: pairs have {least} to {most}, {number} kept of each{more}"
    ]


def _write(
    staged: Path, total: int, number: int, generator: np.random.Generator, folder: str, scored: bool,
) -> datasets.Dataset:  # fmt: skip
    """The checked pairs with `number` columns of negatives, and scores of these, as a memory-mapped Dataset."""
    names = ["anchor", "positive", *(f"negative_{i + 1}" for i in range(number))]
    schema = pa.schema(dict.fromkeys(names, pa.string()) | ({"scores": pa.list_(pa.float32())} if scored else {}))
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix="pairs-", suffix=".arrow", delete=False) as file,
        pa.ipc.new_stream(file, schema) as writer,
        pa.memory_map(str(staged)) as source,
        _progress("writing pairs", "rows", total) as bar,
    ):
        for batch in pa.ipc.open_stream(source):
            negatives = batch["negatives"]
            chosen = _choose(negatives.value_lengths().to_numpy(), number, generator)
            texts = [*batch.columns[:2], *(negatives.flatten().take(pa.array(c)) for c in chosen.T)]
            columns = [t.cast(pa.string()) for t in texts]
            if scored:
                columns.append(_scores_of(batch["scores"], chosen))
            writer.write_batch(pa.record_batch(columns, schema=schema))
            bar.update(len(batch))
    return datasets.Dataset.from_file(file.name)


def _choose(lengths: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """For lists of `lengths` [rows], laid end to end, the places of `number` random elements of each, in order."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    shuffled = np.lexsort((generator.random(len(row)), row))  # within each row
    starts = np.cumsum(lengths) - lengths
    return np.sort(shuffled[starts[:, None] + np.arange(number)], axis=1)


def _scores_of(scores: Any, chosen: np.ndarray) -> pa.Array:
    """Of lists of the positive's score and those of all negatives the first, and those at the places of `_choose`."""
    rows, number = chosen.shape
    first = scores.offsets.to_numpy()[:-1] - scores.offsets[0].as_py()
    # Before a row's negatives lie, beside those of the rows above, the positives' scores of these and its own.
    places = np.concatenate([first[:, None], chosen + 1 + np.arange(rows)[:, None]], axis=1)
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * (number + 1))
    return pa.ListArray.from_arrays(offsets, scores.flatten().take(pa.array(places.reshape(-1))))


def repeated(sizes: Sequence[int], times: Sequence[float], seed: int) -> np.ndarray:
    """Rows of sources laid end to end, each source's as often as `times` says: whole times, then a random part."""
    generator = np.random.default_rng(seed)
    rows, start = [], 0
    for size, often in zip(sizes, times, strict=True):
        whole, rest = divmod(max(1, round(often * size)), size)
        part = np.sort(generator.choice(size, rest, replace=False))
        rows += [start + np.tile(np.arange(size), whole), start + part]
        start += size
    return np.concatenate(rows)
