"""Rows of training pairs that are not as they should be: each named by its place, nothing lost without a word."""

import csv
import gzip

import pytest

pytest.importorskip("datasets")

import datasets
import pair_files
import pyarrow as pa
import pyarrow.parquet as pq
from pair_files import PAIRS, lines, pair, write

from mlpool.training.data import load_pairs

cache = pair_files.cache  # a folder of its own for every test


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
