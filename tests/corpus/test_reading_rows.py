"""One reader: whoever reads a file gets the same rows, and is told of the same fault at the same line."""

import gzip
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("datasets")
import pyarrow as pa
import pyarrow.parquet as pq

from mlpool.analysis.inputs import read_texts
from mlpool.corpus.rows import BadRow, column_types, kind_of, read_rows
from mlpool.corpus.sources import open_source
from mlpool.corpus.text_files import Columns, find_columns, read_file
from mlpool.evaluation.local import read_jsonl
from mlpool.training.data import load_pairs

ROWS = [{"text": f"text {i}, “ü”", "positive": f"p{i}"} for i in range(9)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "\n".join(["text,positive", *(f'"{row["text"]}",{row["positive"]}' for row in ROWS)]) + "\n"
FILES = {
    "a.jsonl": LINES, "a.ndjson": LINES, "a.json": json.dumps(ROWS), "a.csv": TABLE,
    "a.tsv": TABLE.replace('",', "\t").replace('"', "").replace("text,", "text\t"), "a.parquet": "",
}  # fmt: skip


def write(folder: Path, name: str, packed: bool = False) -> Path:
    path = folder / (f"{name}.gz" if packed else name)
    content = FILES[name].encode()
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=4)
    else:
        path.write_bytes(gzip.compress(content) if packed else content)
    return path


@pytest.mark.parametrize(
    ("name", "packed"),
    [(name, packed) for name in FILES for packed in (False, True) if name != "a.parquet" or not packed],
)
def test_everybody_gets_the_same_rows(tmp_path, name, packed):
    path = write(tmp_path, name, packed)
    texts = [row["text"] for row in ROWS]
    assert [row for _, row in read_rows(path)] == ROWS
    assert [row for _, row in read_rows(path, ranges=[(1, 3), (3, 4), (7, 9)])] == ROWS[1:4] + ROWS[7:]
    assert column_types(path) == {"text": "string", "positive": "string"}
    assert [row.text for row in read_file(path, find_columns([path]))] == read_texts(path) == texts
    assert load_pairs(path)["anchor"][:] == texts
    assert [row for part in open_source(path, "train") for _, row in part.read(None)] == ROWS


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "a"', "broken JSON: Expecting ',' delimiter at column 13"),
        ("[" * 100_000, "broken JSON: it is nested too deep"),
        ("\u2028", "broken JSON: Expecting value at column 1"),
    ],
    ids=["cut", "deep", "space"],
)  # fmt: skip
def test_everybody_names_the_same_fault(tmp_path, line, fault):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n\n{line}\n{json.dumps(ROWS[1])}\n", encoding="utf8")
    assert [(n, row.detail) for n, row in read_rows(path) if isinstance(row, BadRow)] == [(3, fault)]
    for read in (lambda: list(read_file(path, Columns("text", None))), lambda: load_pairs(path)):
        with pytest.raises(ValueError, match=re.escape(f"{path}:3: {fault}")):
            read()
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {fault}")):
        list(read_jsonl(path))
    assert len(load_pairs(path, on_error="skip")) == 2


@pytest.mark.parametrize(
    ("name", "kind"), [("a.JSONL.GZ", ".jsonl"), ("b.c.txt", ".txt"), ("a.parquet.gz", ""), ("a.gz", ""), ("a", "")]
)
def test_kinds_by_name(name, kind):
    assert kind_of(Path(name)) == kind
