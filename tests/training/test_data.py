"""Training pairs: every common form mapped, every bad row named by its place, nothing lost without a word."""

import csv
import gzip
import importlib
import json
import logging
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datasets")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from mlpool.training import data as data_module
from mlpool.training.data import describe, load_pairs

PAIRS = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(4)]
WANT = {"anchor": [p["query"] for p in PAIRS], "positive": [p["positive"] for p in PAIRS]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """The default cache, in this test's own folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def write(path: Path, rows, **options) -> Path:
    """`rows` in the form that the path's extension says."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", newline="") as file:
        if kind in ("jsonl", "ndjson"):
            file.writelines(json.dumps(row, **options) + "\n" for row in rows)
        elif kind == "json":
            json.dump(rows, file, indent=1)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",", **options)
            writer.writeheader()
            writer.writerows(rows)
    return path


def lines(path: Path, *texts: str) -> Path:
    path.write_bytes("\n".join(texts).encode() + b"\n")
    return path


def pair(query="q", positive="p", **more) -> str:
    return json.dumps({"query": query, "positive": positive, **more})


# --- sources -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz"]
)
def test_file(tmp_path, name):
    path = write(tmp_path / name, PAIRS)
    for source in (path, str(path)):
        assert load_pairs(source).to_dict() == WANT


def test_json_lines_named_json(tmp_path):
    assert load_pairs(lines(tmp_path / "a.json", *map(json.dumps, PAIRS))).to_dict() == WANT


def test_memory():
    table = datasets.Dataset.from_list(PAIRS)
    assert load_pairs(PAIRS).to_dict() == WANT
    assert load_pairs(table).to_dict() == WANT
    assert load_pairs(table.with_format("numpy")).to_dict() == WANT
    splits = datasets.DatasetDict({"train": table, "test": table.select([0])})
    assert load_pairs(splits).to_dict() == WANT
    assert len(load_pairs(splits, split="test")) == 1
    with pytest.raises(ValueError, match="no split 'dev'; found: train, test"):
        load_pairs(splits, split="dev")
    assert load_pairs(splits)[0] == load_pairs(PAIRS)[0]


def test_saved_dataset(tmp_path):
    table = datasets.Dataset.from_list(PAIRS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        assert load_pairs(tmp_path / name).to_dict() == WANT


def test_folder_takes_the_split(tmp_path):
    """A test file beside a training file is not trained on."""
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "train-00000-of-00001.parquet", PAIRS[2:])
    write(tmp_path / "a_train.jsonl", PAIRS[:2])
    write(tmp_path / "test.jsonl", PAIRS)
    write(tmp_path / "dev.csv", PAIRS[:1])
    write(tmp_path / ".hidden.jsonl", PAIRS)
    (tmp_path / "README.md").write_text("text")
    assert load_pairs(tmp_path).to_dict() == WANT
    assert len(load_pairs(tmp_path, split="validation")) == 1
    (tmp_path / "dev.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file for the split 'validation'.*a_train.jsonl"):
        load_pairs(tmp_path, split="validation")


def test_folder_without_splits(tmp_path):
    write(tmp_path / "b.jsonl", PAIRS[2:])
    write(tmp_path / "a.csv", PAIRS[:2])
    assert load_pairs(tmp_path).to_dict() == WANT


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(FileNotFoundError, match=r"holds no data: looked for .jsonl.* found notes.txt"):
        load_pairs(tmp_path)


def test_hub(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_pairs("owner/name").to_dict() == WANT
    assert load_pairs("owner/name:pair", split="train[:10%]").to_dict() == WANT
    assert calls == [("owner/name", None, "train"), ("owner/name", "pair", "train[:10%]")]


def test_hub_unreachable(monkeypatch, tmp_path):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-pairs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'my-pair' is neither a path here \(near it: my-pairs\) nor .*no r"):
        load_pairs("my-pair")


def test_missing_file(tmp_path):
    write(tmp_path / "train.jsonl", PAIRS)
    with pytest.raises(FileNotFoundError, match=r"no file .*trian.jsonl \(near it: train.jsonl\)"):
        load_pairs(str(tmp_path / "trian.jsonl"))
    with pytest.raises(FileNotFoundError, match="nor a folder"):
        load_pairs(tmp_path / "nowhere" / "a.jsonl")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "a source is a path.*got int"),
        ([], ValueError, "list of sources or rows is empty"),
        ({"path": "a.jsonl"}, ValueError, "a source given as dict has 'source'"),
        ({"source": PAIRS, "weight": 0}, ValueError, "weight must be a number above 0, got 0"),
        ({"source": PAIRS, "limit": -1}, ValueError, "limit must be an integer of at least 1, got -1"),
        (datasets.Dataset.from_list([]), ValueError, "no known columns. Found: none"),
        (datasets.Dataset.from_list(PAIRS).select([]), ValueError, "dataset is empty: it has no rows"),
    ],
)
def test_wrong_source(source, error, message):
    with pytest.raises(error, match=message):
        load_pairs(source)


@pytest.mark.parametrize(
    "options", [{"positives": "all"}, {"on_error": "ignore"}, {"num_negatives": -1}, {"num_negatives": 1.5}]
)
def test_wrong_option(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load_pairs(PAIRS, **options)


# --- columns -------------------------------------------------------------------------------------------------------

PASSAGES = {
    "query_id": "7",
    "query": "a",
    "positive_passages": [{"docid": "1", "title": "T", "text": "b"}],
    "negative_passages": [{"docid": "2", "title": "", "text": "c"}, {"docid": "3", "text": "d"}],
}


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"anchor": "a", "positive": "b"}, "ab"),
        ({"positive": "b", "anchor": "a"}, "ab"),
        ({"anchor": "a", "positive": "b", "negative": "c"}, "abc"),
        ({"anchor": "a", "positive": "b", "negative_2": "d", "negative_1": "c", "negative_10": "e"}, "abcde"),
        ({"query": "a", "positive": "b", "negative1": "c", "negative2": "d"}, "abcd"),
        ({"Query": "a", "Positive": "b", "Negative": "c"}, "abc"),
        ({"query": "a", "pos": ["b"], "neg": ["c", "d"], "pos_scores": [1.0], "prompt": "x"}, "abcd"),
        (PASSAGES, ("a", "T b", "c", "d")),
        ({"question": "a", "answers": ["x"], "positive_ctxs": [{"title": "T", "text": "b"}],
          "negative_ctxs": [{"title": "N", "text": "n"}], "hard_negative_ctxs": [{"title": "H", "text": "h"}]},
         ("a", "T b", "H h")),
        ({"query": "a", "positive_passages": {"title": ["T", ""], "text": ["b", "c"]}}, None),
        ({"sentence1": "a", "sentence2": "b"}, "ab"),
        ({"sentence_A": "a", "sentence_B": "b"}, "ab"),
        ({"question": "a", "answer": "b"}, "ab"),
        ({"query": "a", "answer": "b", "id": 3}, "ab"),
        ({"query": "a", "response": "b"}, "ab"),
        ({"query": "a", "passage": "b", "label": 1, "negative": "c"}, "abc"),
        ({"queries": "a", "passage": "b"}, "ab"),
        ({"text": "a", "positive": "b"}, "ab"),
        ({"premise": "a", "entailment": "b", "contradiction": "c"}, "abc"),
        ({"premise": "a", "entailment": "b", "label": 1}, "ab"),
        ({"sent0": "a", "sent1": "b", "hard_neg": "c"}, "abc"),
        ({"title": "a", "abstract": "b"}, "ab"),
        ({"prompt": "a", "completion": "b"}, "ab"),
    ],
)  # fmt: skip
def test_forms(tmp_path, row, want):
    """Every form, from memory, JSON Lines and Parquet; CSV where a row is flat."""
    sources = [[row], write(tmp_path / "a.jsonl", [row]), write(tmp_path / "a.parquet", [row])]
    if all(isinstance(v, str) for v in row.values()):
        sources.append(write(tmp_path / "a.csv", [row]))
    for source in sources:
        pairs = load_pairs(source)
        negatives = [f"negative_{i + 1}" for i in range(len(pairs.column_names) - 2)]
        assert pairs.column_names == ["anchor", "positive", *negatives]
        assert all(kind == datasets.Value("string") for kind in pairs.features.values())
        if want is None:  # passages as a dict of lists
            assert pairs.to_dict() == {"anchor": ["a", "a"], "positive": ["T b", "c"]}
        else:
            assert tuple(pairs[0].values()) == tuple(want)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_named_columns(tmp_path, name):
    rows = [{"q": "a", "yes": "b", "n1": "c", "n2": "d", "score": "1"}]
    path = write(tmp_path / name, rows)
    columns = {"anchor": "q", "positive": "yes", "negative": ["n2", "n1"]}
    assert load_pairs(path, columns=columns).to_dict() == {
        "anchor": ["a"], "positive": ["b"], "negative_1": ["d"], "negative_2": ["c"],
    }  # fmt: skip
    assert load_pairs(path, columns={"anchor": "q", "positive": ["yes", "n1"]})["positive"][:] == ["b", "c"]
    # One text as both: two passes of dropout make the pair.
    assert load_pairs(path, columns={"anchor": "q", "positive": "q"})[0] == {"anchor": "a", "positive": "a"}
    with pytest.raises(ValueError, match=rf"{name} has no column 'yess'. Found: 'q', .*did you mean 'yes'"):
        load_pairs(path, columns={"anchor": "q", "positive": "yess"})
    with pytest.raises(ValueError, match="no column 'n3'"):
        load_pairs(path, columns={"anchor": "q", "positive": "yes", "negative": ["n1", "n3"]})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"anchor": "query"}, "columns must map 'anchor', 'positive'"),
        ({"query": "query", "positive": "positive"}, "columns must map"),
        ({"anchor": ["query", "positive"], "positive": "positive"}, "one anchor and at least one positive"),
        ({"anchor": "query", "positive": []}, "one anchor and at least one positive"),
        ("query", "columns must map"),
    ],
)
def test_wrong_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(PAIRS, columns=columns)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"foo": "a", "bar": "b"}, "no known columns. Found: 'foo', 'bar'. Known by name: anchor/q.*columns={'anch"),
        ({"query": "a", "question": "b", "answer": "c"}, "'query', 'question' could each be the anchor"),
        ({"question": "a", "context": "b", "answer": "c"}, "'context', 'answer' could each be the positive"),
        ({"query": "a", "pos": "b", "neg": "c", "negative_1": "d"}, "'neg', 'negative_1' could each be the negatives"),
        ({"sentence1": "a", "sentence2": "b", "score": 0.2}, "with a column 'score' some rows may be no positives"),
        ({"query": "a", "passage": "b", "Label": 0}, "with a column 'Label' some"),
    ],
)  # fmt: skip
def test_columns_that_fit_nothing(tmp_path, row, message):
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            load_pairs(write(tmp_path / name, [row]))


def test_what_was_mapped_is_told(caplog):
    rows = [{"id": "1", "query": "a", "pos": ["b", "c"], "neg": ["d"]}, {"id": "2", "query": " ", "pos": ["b"]}]
    with caplog.at_level(logging.INFO, "mlpool"):
        pairs = load_pairs(rows, on_error="skip")
    told = (
        "rows: 2 pairs of 2 rows (anchor = query, positive = pos, negative = neg; ignored: id); "
        "left out 1 row: 1 empty text (first rows[1])"
    )
    assert pairs.info.description == f"2 pairs with 1 negative\n{told}"
    assert pairs.select([0]).info.description == pairs.info.description
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "2 pairs with 1 negative"),
        ("WARNING", told),
    ]


# --- bad rows ------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000
BAD_LINES = [
    ('{"query": "q", "positive": "p"', "broken JSON: Expecting ',' delimiter at column 31"),
    ("not json", "broken JSON: Expecting value at column 1"),
    (DEEP, "broken JSON"),
    ('["q", "p"]', r"the row is list \['q', 'p'\], expected fields"),
    ("null", "the row is NoneType None"),
    ('{"query": "q"}', "no field 'positive', only 'query'"),
    (pair(positive=3), "positive is int 3, expected text"),
    (pair(positive={"a": "b" * 99}), r"positive is dict \{'a': 'b{32}…, expected text"),
    (pair(query=None), r"query is empty \(null\)"),
    (pair(query=""), "query is empty"),
    (pair(positive=" \t　"), "positive is only whitespace"),
    (pair(query=["q", "r"]), "query holds 2 texts, expected one"),
    (pair(positive=[]), "positive: an empty list"),
    (pair(positive=["p", ""]), r"positive\[1\] is empty"),
    (pair(positive={"title": "t", "text": " "}), r"positive.text is only whitespace"),
    (pair(positive={"title": ["t"], "text": ["a", "b"]}), "positive has 1 titles for 2 texts"),
    (pair(negative=["n", 2.5]), r"negative\[1\] is float 2.5, expected text"),
    (pair(negative=""), "negative is empty"),
    (pair(negative=["n", " p "]), "negative 2 is the positive: ' p '"),
    (pair(positive=["a", "b"], negative=["n", "b"]), "negative 2 is the positive: 'b'"),
    (pair(negative_1="n", negative_2="p"), "negative 2 is the positive: 'p'"),
    ('{"query": "q", "positive": "\\ud800x"}', "positive is not UTF-8 at character 1"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line(tmp_path, line, message):
    """Its number counts blank lines; the file name and the total stand in the error; skipping leaves the rest."""
    path = lines(tmp_path / "a.jsonl", pair(), "", line, pair("r", "s"))
    with pytest.raises(ValueError, match=rf"1 of 3 rows cannot be used.*\n  {path}:3: {message}"):
        load_pairs(path, num_negatives=None)
    pairs = load_pairs(path, on_error="skip")
    assert pairs.to_dict() == {"anchor": ["q", "r"], "positive": ["p", "s"]}
    assert "left out 1 row: 1 " in pairs.info.description
    assert f"(first {path}:3)" in pairs.info.description


def test_bad_bytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(pair().encode() + b'\n{"query": "caf\xe9", "positive": "p"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: query is not UTF-8 at character 4"):
        load_pairs(path)
    path.write_bytes(b"query,positive\nq,p\nq,caf\xe9\n")
    with pytest.raises(ValueError, match=r"a.csv:3: positive is not UTF-8 at character 4"):
        load_pairs(path.rename(tmp_path / "a.csv"))
    path.write_text(pair(), encoding="utf-16")
    with pytest.raises(ValueError, match=r"a.jsonl is UTF-16; save it as UTF-8"):
        load_pairs(path)


def test_bad_bytes_in_a_column_name(tmp_path, caplog):
    """What is told of the column is text that can be written anywhere."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"query,positive,caf\xe9,prix \xc3\xa9lev\xc3\xa9\nq,p,,\n,p,,\n")
    told = load_pairs(path, on_error="skip").info.description
    assert r"ignored: 'caf\udce9', prix élevé); left out 1 row" in told
    assert told.encode()
    assert caplog.text.encode()
    path.write_bytes(b"query,positive,caf\xe9,caf\xe9\nq,p,,\n")
    with pytest.raises(ValueError, match=r"a.csv:1: the header names a column twice: query, positive, 'caf\\udce9', '"):
        load_pairs(path)


def test_only_the_first_bad_rows_are_listed(tmp_path):
    path = lines(tmp_path / "a.jsonl", *([pair()] * 2500), *["broken", pair(query=1)] * 4)
    with pytest.raises(ValueError, match="8 of 2,508 rows") as caught:
        load_pairs(path)
    listed = [line.strip().split(": ")[0] for line in str(caught.value).splitlines()[1:]]
    assert listed == [*(f"{path}:{n}" for n in range(2501, 2506)), "…"]
    told = load_pairs(path, on_error="skip").info.description
    assert f"left out 8 rows: 4 broken JSON (first {path}:2501), 4 not text (first {path}:2502)" in told


def test_nothing_left(tmp_path):
    path = lines(tmp_path / "a.jsonl", "broken", "broken")
    for on_error, message in (("raise", "2 of 2 rows cannot be used"), ("skip", "no row is left, 2 of 2")):
        with pytest.raises(ValueError, match=message):
            load_pairs(path, on_error=on_error)


@pytest.mark.parametrize("content", ["", "\n\n", "query,positive\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_empty_file(tmp_path, name, content):
    if name != "a.csv":
        content = content.removeprefix("query,positive")  # only CSV has a header
    with gzip.open(tmp_path / name, "wt") if name.endswith("gz") else (tmp_path / name).open("w") as file:
        file.write(content)
    with pytest.raises(ValueError, match=f"{name} is empty: it has no rows"):
        load_pairs([{"source": PAIRS}, tmp_path / name])


def test_damaged_files(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", PAIRS * 1000)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a.jsonl.gz is a damaged gzip file"):
        load_pairs(path, on_error="skip")
    (tmp_path / "b.jsonl.gz").write_text(pair())
    with pytest.raises(ValueError, match=r"b.jsonl.gz is a damaged gzip file"):
        load_pairs(tmp_path / "b.jsonl.gz")
    path = write(tmp_path / "a.parquet", PAIRS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a.parquet is not a readable Parquet file"):
        load_pairs(path)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz", "a.parquet.gz", "a.jsonl.zip"])
def test_wrong_extension(tmp_path, name):
    (tmp_path / name).write_text(pair())
    with pytest.raises(ValueError, match=rf"{name}: unknown extension .* read are .jsonl, .*\.parquet"):
        load_pairs(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"query": "a", "positive": "b"},\n{"query": "a" "positive": "b"}\n]', ":3: broken JSON: Expecting ','"),
        ('[\n{"query": "a", "positive": "b"}\n{"query": "a"}]', ":3: broken JSON: expected ',' or ']' after a row"),
        ('[{"query": "a", "positive": "b"}', ":1: broken JSON: expected ',' or ']'"),
        ('[{"query": "a", "positive": "b"},\n', ":2: broken JSON: Expecting value"),
        ('[{"query": "a", "positive": "b"}]\n\n[]', ":3: broken JSON: text after the array"),
        ('[\n\n {"query": "a",\n "positive": "b"},\n\n {"query": 1,\n "positive": "b"}, 5]', ":6: query is int 1"),
        ('{"query": {"a":\n 1}}', ":1: broken JSON"),
    ],
)
def test_json_array(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json{message}"):
        load_pairs(tmp_path / "a.json")


@pytest.mark.parametrize("kind", ["parquet", "dataset", "rows"])
def test_bad_row_of_a_table(tmp_path, kind):
    """Rows of tables are counted from 0, over batches and row groups."""
    rows = [{"id": 1, "query": "q", "positive": "p"} for _ in range(2100)]
    rows[2050]["positive"] = " "
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    source = {"parquet": path, "dataset": datasets.Dataset.from_list(rows), "rows": rows}[kind]
    with pytest.raises(ValueError, match=r"(a.parquet|dataset|rows)\[2050\]: positive is only whitespace"):
        load_pairs(source)
    assert len(load_pairs(source, on_error="skip")) == 2099


def test_bad_rows_in_memory():
    with pytest.raises(
        ValueError, match=r"2 of 3 .*\n  rows\[1\]: the row is str 'oops'.*\n  rows\[2\]: fields must be"
    ):
        load_pairs([PAIRS[0], "oops", {1: "a"}])


# --- CSV -----------------------------------------------------------------------------------------------------------


def test_csv_lines_of_quoted_fields(tmp_path):
    """A row is named by its first line, whatever line ends its fields hold."""
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbf"query", positive \r\n"two\r\nlines","say ""hi"", twice"\r\n\r\nq,"a\nb\nc"\r\n'
        b'q,\r\nq,"p\n"\r\nq,p,r\r\nq,"p" x\r\nlast,p'
    )
    with pytest.raises(ValueError, match="3 of 7 rows") as caught:
        load_pairs(path)
    assert str(caught.value).splitlines()[1:] == [
        f"  {path}:8: positive is empty (null)",
        f"  {path}:11: 3 fields, but the header has 2",
        f"  {path}:12: broken quotes or line end: ',' expected after '\"'",
    ]
    assert load_pairs(path, on_error="skip").to_dict() == {
        "anchor": ["two\r\nlines", "q", "q", "last"],
        "positive": ['say "hi", twice', "a\nb\nc", "p\n", "p"],
    }


def test_csv_open_quote(tmp_path):
    """It swallows the lines to the file's end: they are named."""
    path = lines(tmp_path / "a.csv", "query,positive", "q,p", 'q,"open', "q,p", "q,p")
    with pytest.raises(ValueError, match=r"a.csv:3: broken quotes.*unexpected end of data, lines 3 to 5"):
        load_pairs(path)


def test_csv_header(tmp_path):
    with pytest.raises(ValueError, match=r"a.csv:1: the header names a column twice: query, query"):
        load_pairs(lines(tmp_path / "a.csv", "query,query", "a,b"))
    with pytest.raises(ValueError, match=r"no known columns. Found: 'query;positive'"):
        load_pairs(lines(tmp_path / "a.csv", "query;positive", "a;b"))


def test_csv_long_field(tmp_path):
    """Longer than the csv module's own limit, which is as before afterwards."""
    limit = csv.field_size_limit()
    text = "word " * 100_000
    path = write(tmp_path / "a.csv", [{"query": "q", "positive": text}])
    assert load_pairs(path)["positive"][0] == text
    assert csv.field_size_limit() == limit < len(text)


def test_csv_empty_field_is_no_negative(tmp_path):
    path = lines(tmp_path / "a.csv", "query,positive,negative_1,negative_2", "a,b,c,", "a,b,,d")
    assert load_pairs(path).to_dict() == {"anchor": ["a", "a"], "positive": ["b", "b"], "negative_1": ["c", "d"]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json"])
def test_unicode(tmp_path, name):
    """Texts arrive as they are: no stripping, no normalising, no line ends inside them changed."""
    texts = [
        "naïve café",
        "नमस्ते",
        "日本語　テキスト",
        "👩‍👩‍👧 emoji",
        "a\u2028b\x85c",
        " padded ",
        "e\u0301 / é",
        "NUL\x00",
    ]
    path = write(tmp_path / name, [{"query": t, "positive": t + "!"} for t in texts])
    assert load_pairs(path)["anchor"][:] == texts
    if name != "a.parquet":  # byte-order mark and CRLF
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
        assert load_pairs(path)["anchor"][:] == texts


# --- negatives and positives ---------------------------------------------------------------------------------------


def ragged(*counts: int) -> list[dict]:
    return [{"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{i}.{k}" for k in range(n)]} for i, n in enumerate(counts)]


def negatives(pairs) -> list[list[str]]:
    return [[v for k, v in row.items() if k.startswith("negative")] for row in pairs]


def test_equal_negatives_are_kept_in_order():
    rows = ragged(*[5] * 2500)
    assert negatives(load_pairs(rows)) == [row["neg"] for row in rows]


def test_ragged_negatives(caplog):
    """The smallest number of each, a random choice of the row's own in its order, and the rest counted."""
    rows = ragged(*[3, 7, 2, 30] * 500)
    pairs = load_pairs(rows, seed=1)
    chosen = negatives(pairs)
    for row, got in zip(rows, chosen, strict=True):
        assert len(set(got)) == 2
        assert got == [n for n in row["neg"] if n in got]
    left = sum(len(row["neg"]) for row in rows) - 2 * 2000
    told = (
        f"{left:,} of 21,000 negatives left out: pairs have 2 to 30, 2 kept of each; num_negatives=3 to 30 keeps more"
    )
    assert told in caplog.text
    assert told in pairs.info.description
    # Each of three is as likely: 2/3 of 500, give or take four standard deviations.
    places = Counter(n.split(".")[1] for got in chosen[::4] for n in got)
    assert all(abs(places[k] - 1000 / 3) < 4 * (500 * 2 / 9) ** 0.5 for k in "012"), places
    assert negatives(load_pairs(rows, seed=1)) == chosen
    assert negatives(load_pairs(rows, seed=2)) != chosen


def test_num_negatives():
    rows = ragged(3, 1, 2)
    with pytest.raises(ValueError, match=r"1 of 3 rows.*\n  rows\[1\]: 1 negative, but num_negatives=2"):
        load_pairs(rows, num_negatives=2)
    pairs = load_pairs(rows, num_negatives=2, on_error="skip")
    assert pairs["anchor"][:] == ["q0", "q2"]
    assert "1 too few negatives (first rows[1])" in pairs.info.description
    assert load_pairs(rows, num_negatives=0).column_names == ["anchor", "positive"]
    assert "ignored: neg" in load_pairs(rows, num_negatives=0).info.description


def test_some_rows_without_negatives():
    rows = ragged(3, 1, 0, 2)
    with pytest.raises(
        ValueError, match=r"1 of 4 pairs have no negatives \(first rows\[2\]\), others up to 3; pass num_n"
    ):
        load_pairs(rows)
    assert len(load_pairs(rows, num_negatives=0)) == 4
    assert len(load_pairs(rows, num_negatives=1, on_error="skip")) == 3


def test_negatives_that_come_late(tmp_path):
    """A column that the first rows lack is not lost."""
    path = lines(tmp_path / "a.jsonl", *[pair(negative_1="n")] * 1500, pair(negative_1="n", negative_2="m", extra=1))
    told = load_pairs(path).info.description
    assert "1 of 1,502 negatives left out: pairs have 1 to 2" in told
    assert "negative = negative_1 + negative_2; ignored: extra" in told
    named = {"anchor": "query", "positive": "positive", "negative": ["negative_1", "negative_2"]}
    assert load_pairs(path, columns=named, num_negatives=2, on_error="skip").num_rows == 1


def test_null_negatives_are_none(tmp_path):
    rows = [{"query": "q", "positive": "p", "negative_1": "a", "negative_2": None},
            {"query": "q", "positive": "p", "negative_1": None, "negative_2": "b"}]  # fmt: skip
    for name in ("a.jsonl", "a.parquet"):
        assert negatives(load_pairs(write(tmp_path / name, rows))) == [["a"], ["b"]]


def test_several_positives():
    rows = [{"query": "q", "pos": ["a", "b", "c"], "neg": ["n"]}, {"query": "r", "pos": ["d"], "neg": ["m"]}]
    assert load_pairs(rows).to_dict() == {
        "anchor": ["q", "q", "q", "r"],
        "positive": ["a", "b", "c", "d"],
        "negative_1": ["n", "n", "n", "m"],
    }
    drawn = {load_pairs(rows, positives="sample", seed=s)["positive"][0] for s in range(20)}
    assert drawn == {"a", "b", "c"}
    assert (
        load_pairs(rows, positives="sample", seed=3).to_dict() == load_pairs(rows, positives="sample", seed=3).to_dict()
    )


def test_anchor_as_positive_is_counted(caplog):
    rows = [*PAIRS, {"query": "same", "positive": "same "}]
    assert len(load_pairs(rows)) == 5
    assert "1 pair with one text as anchor and positive" in caplog.text


# --- several sources, limits, weights ------------------------------------------------------------------------------


def test_mixed_sources(tmp_path):
    """Each by its own columns; the common number of negatives; in their order."""
    bge = write(tmp_path / "bge.jsonl", ragged(2, 3))
    table = datasets.Dataset.from_list([{"anchor": "a", "positive": "b", "negative": "c"}])
    pairs = load_pairs([bge, table, {"source": str(bge), "limit": 1}])
    assert pairs["anchor"][:] == ["q0", "q1", "a", "q0"]
    assert [len(n) for n in negatives(pairs)] == [1] * 4
    assert pairs.info.description.splitlines()[1:4] == [
        f"{bge}: 2 pairs of 2 rows (anchor = query, positive = pos, negative = neg)",
        "dataset: 1 pair of 1 row (anchor = anchor, positive = positive, negative = negative)",
        f"{bge}: 1 pair of 1 row (anchor = query, positive = pos, negative = neg)",
    ]
    with pytest.raises(ValueError, match=r"4 of 6 pairs have no negatives \(first rows\[0\]\), others up to 3"):
        load_pairs([bge, {"source": PAIRS}])
    assert len(load_pairs([bge, {"source": PAIRS}], num_negatives=0)) == 6


def test_options_of_a_source(tmp_path):
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.jsonl", PAIRS)
    write(tmp_path / "d" / "test.jsonl", PAIRS[:1])
    own = [{"source": [{"x": "a", "y": "b"}], "columns": {"anchor": "x", "positive": "y"}},
           {"source": str(tmp_path / "d"), "split": "test"}, tmp_path / "d"]  # fmt: skip
    assert load_pairs(own, limit=3)["anchor"][:] == ["a", "question 0", "question 0", "question 1", "question 2"]


def test_limit_stops_reading(tmp_path):
    path = lines(tmp_path / "a.jsonl", *[pair(f"q{i}", ["a", "b", "c"]) for i in range(10)], "broken")
    assert load_pairs(path, limit=4)["anchor"][:] == ["q0", "q0", "q0", "q1"]
    assert load_pairs(path, limit=30).num_rows == 30
    with pytest.raises(ValueError, match=r"a.jsonl:11"):
        load_pairs(path, limit=31)
    write(tmp_path / "b.jsonl", PAIRS)
    assert load_pairs(tmp_path, limit=30).num_rows == 30


@pytest.mark.parametrize(("weight", "rows"), [(2, 200), (0.5, 50), (1.25, 125), (1e-9, 1), (1, 100)])
def test_weight(weight, rows):
    table = [{"query": f"q{i}", "positive": "p"} for i in range(100)]
    pairs = load_pairs([{"source": PAIRS}, {"source": table, "weight": weight}, {"source": PAIRS}])
    assert pairs["anchor"][:4] == pairs["anchor"][-4:] == WANT["anchor"]
    counts = Counter(pairs["anchor"][4:-4])
    assert counts.total() == rows
    assert all(int(weight) <= n <= int(weight) + 1 for n in counts.values())
    if weight == 0.5:
        got = [int(q[1:]) for q in pairs["anchor"][4:-4]]
        assert got == sorted(got) != list(range(50))


# --- size ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_file(tmp_path):
    """40 MiB of text: what Python holds at a time is a batch, and Arrow's file is mapped, not read."""
    row = pair("q" * 20, "p" * 4000) + "\n"
    (tmp_path / "a.jsonl").write_text(row * 10_000)
    held = pa.total_allocated_bytes()
    tracemalloc.start()
    pairs = load_pairs(tmp_path / "a.jsonl", cache_dir=tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pairs.num_rows == 10_000
    assert peak < 16 * 2**20, f"{peak / 2**20:.0f} MiB"
    assert pa.total_allocated_bytes() - held < 2**20
    assert pairs.cache_files[0]["filename"].startswith(str(tmp_path))


def test_files_go_when_the_process_ends(tmp_path):
    code = (
        "import sys; from mlpool.training.data import load_pairs\n"
        "pairs = load_pairs([{'query': 'a', 'positive': 'b'}], cache_dir=sys.argv[1])\n"
        "print(pairs.cache_files[0]['filename'])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, data_module.__name__)
    with pytest.raises(ModuleNotFoundError, match=r"training data needs datasets: pip install 'mlpool\[train\]'"):
        importlib.import_module(data_module.__name__)


# --- real data and what trains on it -------------------------------------------------------------------------------


def test_real_pairs(data_dir):
    """All three sets, against json and str.split."""
    files = sorted((data_dir / "pairs").glob("*/train.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    pairs = load_pairs(data_dir / "pairs")
    assert pairs["anchor"][:] == [row["query"] for row in rows]
    assert pairs["positive"][:] == [row["positive"] for row in rows]
    table = [line.split() for line in describe(pairs).splitlines()]
    for line, name in zip(table[1:], ("query", "positive"), strict=True):
        texts = [row[name] for row in rows]
        words = np.array([len(t.split()) for t in texts])
        want = [len(texts), len(texts) - len(set(texts)), words.mean(), np.percentile(words, 95), words.max()]
        np.testing.assert_allclose([float(c.replace(",", "")) for c in line[1:]], want, atol=0.5)


def test_real_scores_are_no_positives(data_dir):
    with pytest.raises(ValueError, match="with a column 'score' some rows may be no positives"):
        load_pairs(data_dir / "sts" / "stsb" / "train_strict.jsonl")


def test_describe_tokens():
    rows = [{"query": "a b", "positive": "p" * n} for n in (1, 5, 9)]
    letters = lambda _, texts: [len(text) for text in texts]  # noqa: E731
    table = describe(load_pairs(rows), letters, max_length=4).splitlines()
    assert table[0].split("  ")[-1] == "truncated"
    assert table[1].split() == ["anchor", "3", "2", "2.0", "2", "2", "3.0", "3", "3", "0"]
    assert table[2].split() == ["positive", "3", "0", "1.0", "1", "1", "5.0", "9", "9", "2"]
    assert len({len(line) for line in table}) == 1


def test_no_duplicates_sampler():
    """sentence-transformers' sampler reads the columns: pairs of one anchor never share a batch."""
    samplers = pytest.importorskip("sentence_transformers.base.sampler")
    rows = [{"query": f"q{i}", "pos": [f"p{i}.{k}" for k in range(3)], "neg": [f"n{i}"]} for i in range(20)]
    pairs = load_pairs(rows)
    batches = list(samplers.NoDuplicatesBatchSampler(pairs, batch_size=8, drop_last=False, valid_label_columns=[]))
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    for batch in batches:
        assert len({pairs[i]["anchor"] for i in batch}) == len(batch)
