"""Folders of one's own as mteb tasks: nothing is downloaded, and the metrics are mteb's.

    DIR/sts/NAME/{test,dev}.jsonl                    {"sentence1", "sentence2", "score"}
    DIR/retrieval/NAME/                              BEIR: corpus.jsonl, queries.jsonl, qrels.tsv (the test split) or
                                                     qrels/{test,dev}.tsv
    DIR/classification/NAME/{train,test,dev}.jsonl   {"text", "label"}; the evaluated split also serves for clustering
    DIR/clustering/NAME/{test,dev}.jsonl             {"text", "label"}
    DIR/pair_classification/NAME/{test,dev}.jsonl    {"sentence1", "sentence2", "label"}, labels 0 and 1

A task is called by its folder, "sts/stsb". Other keys in the lines, other files and other folders are not read.
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..corpus.rows import BadRow, lines, read_rows
from ..files import not_unicode
from ..show import shorten

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

Row = dict[str, Any]
SPLITS = ("test", "dev")
_WHOLE = re.compile(r"-?[0-9]{1,9}")


def local_tasks(data: str | Path, names: Iterable[str] | None = None, split: str = "test") -> "list[AbsTask]":
    """The tasks found under `data`, read when they are evaluated. Needs mteb.

    Args:
        data: the folder DIR of the module's docstring.
        names: "sts/stsb", a whole kind ("sts", or mteb's word for it, "STS"), or a folder's name where only one
            folder has it ("stsb"). None: everything that has the split.
        split: "test" or "dev".

    Raises:
        FileNotFoundError: no such folder, no task in it, or a task asked for without that split.
        ValueError: another split, an unknown name (the nearest are given), a name that several folders have.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    data = Path(data)
    found = discover(data)
    wanted = dict.fromkeys(found, False) if names is None else _choose(found, names)
    tasks = []
    for name, by_name in wanted.items():
        kind, folder = found[name]
        if missing := [path for path in kind.files(folder, split) if not path.is_file()]:
            if not by_name:
                from ..pooling.base import log_once

                log_once(f"{name} is left out: there is no {missing[0]}")
                continue
            raise FileNotFoundError(
                f"{name} cannot be evaluated on its {split} split: there is no {missing[0]}; {folder} holds "
                f"{', '.join(sorted(path.name for path in folder.iterdir()))}"
            )
        tasks.append(_task(kind, name, folder, split))
    if not tasks:
        raise FileNotFoundError(f"no task under {data} has a {split} split; its tasks are {', '.join(found)}")
    return tasks


# --- reading -------------------------------------------------------------------------------------------------------


def read_jsonl(path: Path, check: Callable[[Row], str | None] = lambda row: None) -> Iterator[Row]:
    """The rows of a JSONL file; blank lines are skipped.

    Raises:
        ValueError: a line that is no JSON object, or in which `check` finds a fault; file and line are named.
    """
    for number, row in read_rows(path):
        if isinstance(row, BadRow):
            fault: str | None = row.detail
        else:
            fault = check(row) if isinstance(row, dict) else f"expected an object, got {type(row).__name__}"
        if fault:
            raise ValueError(f"{path}, line {number}: {fault}")
        yield row


def _text(row: Row, *keys: str) -> str | None:
    for key in keys:
        if not isinstance(row.get(key), str):
            return f'"{key}" must be a string, got {shorten(row.get(key))}' if key in row else _absent(key, row)
        if not_unicode(row[key]) is not None:
            return f'"{key}" holds half a surrogate pair, which is no text: {row[key][:40]!r}'
    return None


def _absent(key: str, row: Row) -> str:
    return f'"{key}" is missing; found {", ".join(map(shorten, list(row)[:20])) or "nothing"}'


def scored_fault(row: Row) -> str | None:
    if fault := _text(row, "sentence1", "sentence2"):
        return fault
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < 1e30:
        return f'"score" must be a number, got {shorten(score)}' if "score" in row else _absent("score", row)
    return None


def _pair_fault(row: Row) -> str | None:
    if fault := _text(row, "sentence1", "sentence2"):
        return fault
    return None if row.get("label") in (0, 1) else f'"label" must be 0 or 1, got {shorten(row.get("label"))}'


def _label_fault(row: Row) -> str | None:
    if fault := _text(row, "text"):
        return fault
    if "label" not in row:
        return _absent("label", row)
    label = row["label"]
    if not isinstance(label, str | int):
        return f'"label" must be a string or integer, got {shorten(label)}'
    return _text(row, "label") if isinstance(label, str) else None


def _columns(path: Path, check: Callable[[Row], str | None], *keys: str) -> dict[str, list]:
    rows = list(read_jsonl(path, check))
    if len(rows) < 2:
        raise ValueError(f"{path} holds {len(rows)} rows; at least 2 are needed")
    return {key: [row[key] for row in rows] for key in keys}


def _numbered(path: Path, labels: list) -> dict[Any, int]:
    known = {label: i for i, label in enumerate(sorted(set(labels), key=str))}
    if len(known) < 2:
        raise ValueError(f"{path} has a single label, {labels[0]!r}; at least two are needed")
    return known


def _read_sts(folder: Path, split: str) -> Any:
    path = folder / f"{split}.jsonl"
    columns = _columns(path, scored_fault, "sentence1", "sentence2", "score")
    columns["score"] = [float(score) for score in columns["score"]]
    if len(set(columns["score"])) == 1:
        raise ValueError(f"{path}: every score is {columns['score'][0]}, so no correlation is defined")
    return _splits({split: columns})


def _read_pairs(folder: Path, split: str) -> Any:
    path = folder / f"{split}.jsonl"
    columns = _columns(path, _pair_fault, "sentence1", "sentence2", "label")
    columns["labels"] = [int(label) for label in columns.pop("label")]
    if len(set(columns["labels"])) == 1:
        raise ValueError(f"{path}: every label is {columns['labels'][0]}; both 0 and 1 are needed")
    return _splits({split: columns})


def _read_classification(folder: Path, split: str) -> Any:
    path = folder / "train.jsonl"
    train = _columns(path, _label_fault, "text", "label")
    known = _numbered(path, train["label"])

    def fault(row: Row) -> str | None:
        if (wrong := _label_fault(row)) or row["label"] in known:
            return wrong
        return f"label {row['label']!r} does not occur in {path}"

    test = _columns(folder / f"{split}.jsonl", fault, "text", "label")
    for columns in (train, test):
        columns["label"] = [known[label] for label in columns["label"]]
    return _splits({"train": train, split: test})


def _read_clustering(folder: Path, split: str) -> Any:
    path = folder / f"{split}.jsonl"
    columns = _columns(path, _label_fault, "text", "label")
    known = _numbered(path, columns["label"])
    return _splits({split: {"sentences": columns["text"], "labels": [known[label] for label in columns["label"]]}})


def _read_retrieval(folder: Path, split: str) -> Any:
    from datasets import Dataset

    corpus = _read_entries(folder / "corpus.jsonl")
    queries = _read_entries(folder / "queries.jsonl")
    documents, asked = set(corpus["id"]), set(queries["id"])
    relevant: dict[str, dict[str, int]] = {}
    path = _qrels(folder, split)
    for number, (query, document, score) in _read_tsv(path):
        for kind, value, ids in (("query", query, asked), ("document", document, documents)):
            if value not in ids:
                name = "queries.jsonl" if kind == "query" else "corpus.jsonl"
                raise ValueError(f"{path}, line {number}: {kind} {value!r} is not in {folder / name}")
        relevant.setdefault(query, {})[document] = score
    if not any(score > 0 for scores in relevant.values() for score in scores.values()):
        raise ValueError(f"{path} names no relevant document")
    queries.pop("title")
    tables = {"corpus": Dataset.from_dict(corpus), "queries": Dataset.from_dict(queries)}
    return {"default": {split: {**tables, "relevant_docs": relevant, "top_ranked": None}}}


def _read_entries(path: Path) -> dict[str, list[str]]:
    """Ids, texts and titles; BEIR writes the id as `_id`, mteb as `id`."""
    seen: set[str] = set()

    def fault(row: Row) -> str | None:
        if wrong := _text(row, "_id" if "id" not in row else "id", "text", *(("title",) if row.get("title") else ())):
            return wrong
        entry = str(row.get("_id", row.get("id")))
        if entry in seen:
            return f"the id {entry!r} occurs twice"
        seen.add(entry)
        return None

    rows = list(read_jsonl(path, fault))
    if not rows:
        raise ValueError(f"{path} is empty")
    return {
        "id": [row.get("_id", row.get("id")) for row in rows],
        "text": [row["text"] for row in rows],
        "title": [row.get("title") or "" for row in rows],
    }


def _qrels(folder: Path, split: str) -> Path:
    single = folder / "qrels.tsv"
    return single if split == "test" and single.is_file() else folder / "qrels" / f"{split}.tsv"


def _read_tsv(path: Path) -> Iterator[tuple[int, tuple[str, str, int]]]:
    """Line numbers and (query, document, score); a first line whose score is no number is a header."""
    for number, line in enumerate(lines(path), 1):
        if (at := not_unicode(line)) is not None:
            raise ValueError(f"{path}, line {number}: character {at} is no UTF-8")
        fields = line.rstrip("\r\n").split("\t")
        if fields == [""] or (number == 1 and not _WHOLE.fullmatch(fields[-1])):
            continue
        if len(fields) != 3 or not _WHOLE.fullmatch(fields[2]):
            raise ValueError(
                f"{path}, line {number}: expected query, document and a whole number, separated by tabs; got "
                f"{shorten(line.rstrip())}"
            )
        yield number, (fields[0], fields[1], int(fields[2]))


def _splits(splits: dict[str, dict[str, list]]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items()})


# --- kinds ---------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """One shape of folder: which of mteb's tasks it becomes, which files it needs and how they are read."""

    folder: str
    task_type: str
    main_score: str
    read: Callable[[Path, str], Any]
    needs: tuple[str, ...] = ("{split}.jsonl",)

    def files(self, folder: Path, split: str) -> list[Path]:
        if self.task_type == "Retrieval":
            return [folder / "corpus.jsonl", folder / "queries.jsonl", _qrels(folder, split)]
        return [folder / name.format(split=split) for name in self.needs]

    def base(self) -> tuple[type, dict[str, Any]]:
        """mteb's class, and what differs from its defaults."""
        from mteb import abstasks

        if self.task_type == "Clustering":
            # mteb's default embeds 4 % of the texts, made for sets of hundreds of thousands.
            return abstasks.AbsTaskClustering, {"max_fraction_of_documents_to_embed": None}
        return getattr(abstasks, f"AbsTask{self.task_type}"), {}


KINDS = (
    _Kind("sts", "STS", "cosine_spearman", _read_sts),
    _Kind("retrieval", "Retrieval", "ndcg_at_10", _read_retrieval),
    _Kind("classification", "Classification", "accuracy", _read_classification, ("train.jsonl", "{split}.jsonl")),
    _Kind("clustering", "Clustering", "v_measure", _read_clustering),
    _Kind("pair_classification", "PairClassification", "max_ap", _read_pairs),
)


def discover(data: Path) -> dict[str, tuple[_Kind, Path]]:
    """By name, the kind and folder of every task under `data`; FileNotFoundError where there is none."""
    if not data.is_dir():
        raise FileNotFoundError(f"there is no folder {data}")
    found: dict[str, tuple[_Kind, Path]] = {}
    for kind in KINDS:
        # Classification sets serve for clustering too; a clustering folder of the same name is preferred.
        for source in ("classification", "clustering") if kind.folder == "clustering" else (kind.folder,):
            for folder in sorted((data / source).glob("*/")):
                found[f"{kind.folder}/{folder.name}"] = (kind, folder)
    if not found:
        raise FileNotFoundError(
            f"{data} holds none of the folders {', '.join(kind.folder + '/NAME' for kind in KINDS)}; "
            "`mlpool eval --help` shows what they contain"
        )
    return found


def _choose(found: dict[str, tuple[_Kind, Path]], names: Iterable[str]) -> dict[str, bool]:
    """The tasks that are meant, and whether each was named itself, not with its whole kind."""
    chosen: dict[str, bool] = {}
    for name in names:
        of_kind = [task for task, (kind, _) in found.items() if name in (kind.folder, kind.task_type)]
        own = [name] if name in found else [task for task in found if task.split("/")[1] == name]
        if not of_kind and len(own) > 1:
            raise ValueError(f"{name!r} is the name of several tasks: {', '.join(own)}; give the whole name")
        if not of_kind and not own:
            known = [*found, *(task.split("/")[1] for task in found)]
            near = difflib.get_close_matches(name, known, cutoff=0.5) or list(found)
            raise ValueError(f"no task {name!r} among the local ones; nearest: {', '.join(dict.fromkeys(near))}")
        for task in of_kind or own:
            chosen[task] = chosen.get(task, False) or not of_kind
    return chosen


def _task(kind: _Kind, name: str, folder: Path, split: str) -> "AbsTask":
    from mteb.abstasks.task_metadata import TaskMetadata

    base, options = kind.base()
    metadata = TaskMetadata(
        name=name.replace("/", "-"),  # the name of mteb's result file
        description=f"Local data {name}",
        # The hash of all splits is the revision: results of data that has changed since are not taken for these.
        dataset={"path": name, "revision": _revision({path for s in SPLITS for path in kind.files(folder, s)})},
        type=kind.task_type,  # type: ignore[arg-type]
        category="t2c" if kind.task_type in ("Classification", "Clustering") else "t2t",
        eval_splits=[split],
        eval_langs=["eng-Latn"],
        main_score=kind.main_score,
    )

    def load_data(self: Any, *args: Any, **kwargs: Any) -> None:
        if not self.data_loaded:
            self.dataset, self.data_loaded = kind.read(folder, split), True
            if kind.task_type == "Clustering":  # bootstrap samples as large as the set, where it is smaller than mteb's
                self.max_documents_per_cluster = min(self.max_documents_per_cluster, len(self.dataset[split]))

    size = sum(path.stat().st_size for path in kind.files(folder, split))
    attributes = {"metadata": metadata, "load_data": load_data, "folder": name, "size": size, **options}
    return type("LocalTask", (base,), attributes)()


def _revision(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
