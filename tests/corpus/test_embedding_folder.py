"""A folder of embeddings read: damage, missing digests, manifests that do not fit."""

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
from many_texts import (  # noqa: E402
    Fake,
    data_of,
    encode,
    some_texts,
    write_jsonl,
)

from mlpool.corpus.embedding_folder import load_embeddings, load_ids  # noqa: E402

encoding = importlib.import_module("mlpool.corpus.encode")


def made(tmp_path: Path, format: str = "npy", **options) -> tuple[Path, Path, dict[str, bytes]]:
    path = write_jsonl(tmp_path / "in.jsonl", some_texts(35), key=[f"k{i}" for i in range(35)])
    encode(path, tmp_path / "out", format=format, id_column="key", **options)
    return path, tmp_path / "out", data_of(tmp_path / "out")


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def swap(folder: Path, format: str) -> None:
    one, other = folder / f"shard-00000.{format}", folder / f"shard-00001.{format}"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def drop_ids(folder: Path, count: int) -> None:
    ids = folder / "shard-00001.ids.json"
    ids.write_text(json.dumps(json.loads(ids.read_text())[:-count]))


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def strip_digests(folder: Path) -> None:
    def strip(content: dict) -> None:
        for shard in content["shards"]:
            del shard["sha256"], shard["ids_sha256"]

    edit(folder, strip)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


DAMAGES = {
    "a bit": (lambda folder, format: flip(folder / f"shard-00002.{format}"), "SHA-256"),
    "swapped": (swap, "SHA-256"),
    "cut": (lambda folder, format: cut(folder / f"shard-00001.{format}"), "SHA-256"),
    "lost": (lambda folder, format: (folder / f"shard-00001.{format}").unlink(), "is missing"),
    "less": (lambda folder, _: edit(folder, lambda content: content["shards"].pop(1)), "lacks shard 1"),
    "less at the end": (lambda folder, _: edit(folder, lambda content: content["shards"].pop()), "its totals say 4 of"),
}


@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_when_read_and_mended_by_verify(tmp_path, damage, format):
    """Bit flips, swapped shards and a manifest that lacks one were all read without a word."""
    path, out, before = made(tmp_path, format)
    act, message = DAMAGES[damage]
    act(out, format)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{message}.*; run the same `mlpool encode` with --ver"):
        load_embeddings(out)
    model = Fake()
    encode(path, out, model, format=format, id_column="key", verify=True)
    assert model._calls == ([10, 10] if damage == "swapped" else [5] if "end" in damage else [10])
    assert data_of(out) == before
    assert len(load_embeddings(out, concatenate=True)) == 35
    encode(path, out, model, format=format, id_column="key", verify=True)  # nothing is damaged
    assert len(model._calls) == 1 + (damage == "swapped")


def test_damaged_ids_are_found_and_mended(tmp_path):
    path, out, before = made(tmp_path)
    for act in (lambda: drop_ids(out, 3), lambda: flip(out / "shard-00001.ids.json"),
                lambda: (out / "shard-00001.ids.json").write_text("[1, 2"),
                lambda: (out / "shard-00001.ids.json").unlink()):  # fmt: skip
        act()
        with pytest.raises((ValueError, FileNotFoundError), match=r"00001\.ids\.json .*--verify"):
            load_ids(out)
        assert len(load_embeddings(out)) == 4  # which are not touched
        encode(path, out, id_column="key", verify=True)
        assert data_of(out) == before
        assert load_ids(out) == [f"k{i}" for i in range(35)]


def test_reading_without_digests(tmp_path, caplog):
    """What an older mlpool wrote is read, said once; what shapes and counts tell is checked all the same."""
    path, out, _ = made(tmp_path)
    strip_digests(out)
    for _ in range(2):
        assert len(load_embeddings(out, concatenate=True)) == len(load_ids(out)) == 35
    assert [r.message for r in caplog.records if "without digests" in r.message] == [
        f"{out} was written without digests: only the sizes of its files are checked"
    ]
    drop_ids(out, 3)
    with pytest.raises(ValueError, match=r"ids\.json has 7 ids, expected 10 strings or integers"):
        load_ids(out)
    cut(out / "shard-00001.npy")
    with pytest.raises(ValueError, match=r"shard-00001\.npy cannot be read, is it cut short\?"):
        load_embeddings(out)
    encode(path, out, id_column="key")
    assert len(load_ids(out)) == 35


def test_reading_unverified_reads_nothing(tmp_path):
    _, out, _ = made(tmp_path)
    flip(out / "shard-00001.npy")
    assert len(load_embeddings(out, verify=False)) == 4
    with pytest.raises(ValueError, match="SHA-256"):
        load_embeddings(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda m: m["shards"][1].update(file="../x.npy"), "names the file '../x.npy'"),
     (lambda m: m["shards"][1].update(file="/etc/passwd"), "names the file '/etc/passwd'"),
     (lambda m: m["shards"][1].update(ids="a.json"), "names 'a.json', expected a shard such as"),
     (lambda m: m["shards"][1].update(colour=1), "unknown key 'colour'.*written by a newer mlpool"),
     (lambda m: m["shards"][1].pop("rows"), "lacks rows of a shard"),
     (lambda m: m["shards"][1].update(rows="ten"), "rows is 'ten', expected an integer"),
     (lambda m: m.update(shards=[1]), "is 1, expected"),
     (lambda m: m.update(shards=None), "lacks its shards or totals"),
     (lambda m: m.pop("totals"), "lacks its shards or totals"),
     (lambda m: m.update(version=2), "is of version 2, and this mlpool reads 1: update mlpool")],
)  # fmt: skip
def test_manifests_that_do_not_fit(tmp_path, change, message):
    _, out, _ = made(tmp_path)
    edit(out, change)
    for read in (load_embeddings, load_ids):
        with pytest.raises(ValueError, match=message):
            read(out)


@pytest.mark.parametrize("content", ["[]", "null", "[" * 9999])
def test_manifests_of_another_kind(tmp_path, content):
    path, out, _ = made(tmp_path)
    (out / "manifest.json").write_text(content)
    for act in (lambda: load_embeddings(out), lambda: encode(path, out, id_column="key")):
        with pytest.raises(ValueError, match=r"manifest\.json (holds|is not valid JSON).*; delete the folder"):
            act()


def test_an_output_that_is_a_link(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "out").symlink_to("nothing")
    with pytest.raises(FileNotFoundError, match="out is a link to nothing, which is not there"):
        encode(path, tmp_path / "out")
    (tmp_path / "real").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "real/progress").symlink_to("../elsewhere")
    with pytest.raises(ValueError, match="names the file 'progress', which is a link out of it"):
        encode(path, tmp_path / "real")
    assert not os.listdir(tmp_path / "elsewhere")
