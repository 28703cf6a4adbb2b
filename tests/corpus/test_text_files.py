"""Files of texts read: every kind, ranges of rows, columns, and bad input named by its line."""

import gzip
import importlib
import random

import pytest

pa = pytest.importorskip("pyarrow")
from many_texts import (  # noqa: E402
    WRITERS,
    Fake,
    assert_whole,
    data_of,
    encode,
    some_texts,
    write_jsonl,
    write_lines,
    write_parquet,
)

from mlpool.corpus.text_files import check_files, find_columns, find_files, read_ranges  # noqa: E402

encoding = importlib.import_module("mlpool.corpus.encode")


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(tmp_path, name):
    texts = some_texts(37)
    path = WRITERS[name](tmp_path / name, texts)
    encode(path, tmp_path / "out")
    assert_whole(tmp_path / "out", texts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_ranges_of_rows(tmp_path, name):
    """Any ascending ranges over several files are what slicing gives, with the line that each row stands on."""
    texts = some_texts(60)
    paths = [WRITERS[name](tmp_path / f"{i}-{name}", texts[i * 20 : i * 20 + 20]) for i in range(3)]
    columns = find_columns(paths)
    files = check_files(paths, columns)
    assert [file.rows for file in files] == [20, 20, 20]
    chosen = random.Random(0)
    for _ in range(30):
        edges = sorted(chosen.sample(range(61), 6))
        ranges = list(zip(edges[::2], edges[1::2], strict=True))
        rows = list(read_ranges(files, columns, ranges))
        assert [row.text for row in rows] == [text for a, b in ranges for text in texts[a:b]]
        header = name == "a.csv"
        assert [row.line for row in rows] == [i % 20 + 1 + header for a, b in ranges for i in range(a, b)]


def test_several_files_patterns_and_line_ends(tmp_path):
    (tmp_path / "1.txt").write_bytes("\ufeffbom\r\ncrlf\r\nno end".encode())
    write_jsonl(tmp_path / "2.jsonl", ["json"])
    (tmp_path / "3.jsonl").write_text('\n{"text": "after a blank line"}\n\n  \n{"text": "two"}')
    (tmp_path / "4.csv").write_text('text,n\n"two\nlines",1\n\nlast,2\n')
    encode([tmp_path / "1.txt", str(tmp_path / "[2-9].*")], tmp_path / "out")
    texts = ["bom", "crlf", "no end", "json", "after a blank line", "two", "two\nlines", "last"]
    assert_whole(tmp_path / "out", texts)


def test_columns(tmp_path):
    """`text`, else the only string column that is not the id, else the named one."""
    one = write_lines(tmp_path / "one.jsonl", ['{"n": 1, "body": "b", "key": "k"}'])
    assert find_columns([one], id="key") == ("body", "key")
    assert find_columns([one], "key") == ("key", None)
    with pytest.raises(ValueError, match=r"2 other string columns.*'n', 'body', 'key'.*--text-column"):
        find_columns([one])
    with pytest.raises(ValueError, match=r"no column 'txt'; found: 'n', 'body', 'key'"):
        find_columns([one], "txt")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', r"a\.jsonl:2: expected a string as text, got int 3"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', r"a\.jsonl:2: expected a string as text, got NoneType"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": "b}\n',
            r"a\.jsonl:3: broken JSON: Unterminated string .* column 10",
        ),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"a\.jsonl:2: expected an object"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl:2 has no column 'text'; found: 'txt'"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n', r"a\.jsonl:2: half a surrogate pair at character 0"),
        ("a.jsonl", '{"n": 1}\n', r"no string column 'text', and 0 other .* found: 'n'"),
        ("a.txt", b"ok\n\xff\xfe\n", r"a\.txt:2 is not UTF-8: byte 0 of the text"),
        ("a.csv", "text,n\na,1\nb\n", r"a\.csv:3: 1 fields, but the header has 2"),
        ("a.csv", 'text,n\na,1\n"b,1\n', r"a\.csv:3: broken quotes or line end: unexpected end"),
        ("a.txt.gz", gzip.compress(b"some text\n" * 99, mtime=0)[:-9], r"a\.txt\.gz is a damaged gzip file, after"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz is a damaged gzip file, after line 0: Not a gzipped file"),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet is not a readable Parquet file"),
        ("a.txt", "", r"nothing to encode: no row in .*a\.txt"),
        ("a.jsonl", "\n \n", r"nothing to encode: no row in .*a\.jsonl"),
        ("a.csv", "text\n", r"nothing to encode: no row in .*a\.csv"),
        ("a.xlsx", "", r"a\.xlsx: cannot tell the kind of file .* \.txt, \.jsonl, \.csv .* \.parquet"),
        ("a.parquet.gz", b"", "cannot tell the kind"),
        ("text", "", "cannot tell the kind"),
        ("a.txt", "a\n\nb\n \t\n", r"empty texts, 2 in all: .*a\.txt:2, .*a\.txt:4\. .*--allow-empty"),
        ("a.txt", "a\n" + 9 * "\n", r"empty texts, 9 in all: .*a\.txt:6, …\."),
    ],
)
def test_bad_files_are_named_before_anything_is_encoded(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    model = Fake()
    with pytest.raises(ValueError, match=message):
        encode(tmp_path / name, tmp_path / "out", model)
    assert not model._calls
    assert not (tmp_path / "out").exists()


def test_bad_parquet_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a", None, "c"])
    with pytest.raises(ValueError, match=r"a\.parquet:2: expected a string as text, got NoneType"):
        encode(path, tmp_path / "out")
    with pytest.raises(ValueError, match="column 'other' holds int64, expected strings"):
        encode(path, tmp_path / "out", text_column="other")
    data = write_parquet(path, [f"{i} " * 50 for i in range(5000)], group=1000).read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(2000) + data[middle + 2000 :])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged after row \d000"):
        encode(path, tmp_path / "out")


def test_bad_ids(tmp_path):
    for ids, message in (
        ([1, "b"], r":2: id 'b' is no int"),
        ([1, None], r":2: .* as id, got null"),
        ([1, 2.5], r":2: .* as id, got float 2\.5"),
        ([True, True], r":1: .* as id, got bool"),
    ):
        path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"], key=ids)
        with pytest.raises(ValueError, match=message):
            encode(path, tmp_path / "out", id_column="key")
    with pytest.raises(ValueError, match=r"\.txt file has no columns .*id='key'"):
        encode(write_lines(tmp_path / "a.txt", ["a"]), tmp_path / "out", id_column="key")


def test_missing_files(tmp_path):
    write_lines(tmp_path / "corpus.txt", ["a"])
    with pytest.raises(FileNotFoundError, match=r"corpsu\.txt does not exist \(near it: corpus\.txt\)"):
        find_files(tmp_path / "corpsu.txt")
    with pytest.raises(FileNotFoundError, match="nor a folder"):
        find_files(tmp_path / "no/corpus.txt")
    with pytest.raises(FileNotFoundError, match=r"no file fits the pattern .*\*\.jsonl"):
        find_files(str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match=r"is a folder; name its files, say '.*\*\.jsonl'"):
        find_files(tmp_path)
    with pytest.raises(ValueError, match=r"corpus\.txt is named twice"):
        find_files([tmp_path / "corpus.txt", str(tmp_path / "*.txt")])
    with pytest.raises(ValueError, match="no input files"):
        find_files([])


def test_empty_texts_allowed(tmp_path):
    path = write_lines(tmp_path / "a.txt", ["a", "", " \t "])
    encode(path, tmp_path / "out", allow_empty=True)
    assert_whole(tmp_path / "out", ["a", "", ""])


def test_a_file_that_changes_while_another_is_read(tmp_path):
    one, two = (write_jsonl(tmp_path / name, some_texts(30)) for name in ("a.jsonl", "b.jsonl"))

    class Changing(Fake):
        def encode(self, texts, **options):
            write_jsonl(two, some_texts(29))
            return super().encode(texts, **options)

    with pytest.raises(ValueError, match=r"b\.jsonl has changed since it was checked"):
        encode([one, two], tmp_path / "out", Changing(), shard_size=20)
    assert list(data_of(tmp_path / "out")) == ["shard-00000.npy"]


def test_a_file_with_fewer_rows_than_checked(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(30))
    files = [file._replace(rows=31) for file in check_files([path], find_columns([path]))]
    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read: 31 rows before, fewer now"):
        list(read_ranges(files, find_columns([path]), [(0, 5), (20, 31)]))


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": ' + "[" * 9999 + "}", r":2: broken JSON: it is nested too deep"),
     ('{"text": "a", "key": ' + "1" * 5000 + "}", r":2: broken JSON: Exceeds the limit"),
     ('{"text": "a", "key": ' + "1" * 30 + "}", r":2: the id 1{20}… has more than 64 bits; give it as a string"),
     ('{"text": "a", "key": "\\ud83d"}', r":2: half a surrogate pair at character 0 of the id"),
     ("\u2028", r":2: broken JSON: Expecting value")],
)  # fmt: skip
def test_json_that_python_stumbles_over(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a", "key": 1}\n' + line + "\n", encoding="utf8")
    with pytest.raises(ValueError, match=message):
        encode(path, tmp_path / "out", id_column="key")
