"""Which columns of training pairs are taken, and how many negatives and positives of a row."""

import logging
from collections import Counter

import pytest

pytest.importorskip("datasets")

import datasets
import pair_files
from pair_files import PAIRS, lines, negatives, pair, ragged, write

from mlpool.training.data import load_pairs

cache = pair_files.cache  # a folder of its own for every test


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


# --- negatives and positives ---------------------------------------------------------------------------------------


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
