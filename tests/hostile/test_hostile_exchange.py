"""Malformed input at every door of exchange, evaluation and analysis: an error of ours, or a result without NaN.

The inputs are drawn in given.py.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from given import cases, mangled, tried
from made import sentence, write_jsonl
from safetensors.torch import save_file

from mlpool import cli

# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    rng = random.Random(0)

    def lines(*rows: dict) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    pairs = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": i / 3, "label": i % 2} for i in range(6)]
    texts = [{"text": sentence(rng), "label": "ab"[i % 2]} for i in range(6)]
    documents = [{"_id": f"d{i}", "text": sentence(rng), "title": "t"} for i in range(4)]
    queries = [{"_id": f"q{i}", "text": sentence(rng)} for i in range(2)]
    return {
        "sts/x/test.jsonl": lines(*pairs), "pair_classification/x/test.jsonl": lines(*pairs),
        "classification/x/train.jsonl": lines(*texts), "classification/x/test.jsonl": lines(*texts),
        "clustering/x/test.jsonl": lines(*texts), "retrieval/x/corpus.jsonl": lines(*documents),
        "retrieval/x/queries.jsonl": lines(*queries),
        "retrieval/x/qrels.tsv": b"query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n",
    }  # fmt: skip


def test_local_tasks(files, tmp_path):
    """`mlpool eval --local`: what is read is whole, or an error names the file."""
    pytest.importorskip("mteb")
    from mlpool.evaluation.local import KINDS

    kinds = {kind.folder: kind for kind in KINDS}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    read = 0
    for rng in cases(400, 1):
        name = rng.choice(list(files))
        content = mangled(files[name], rng)
        (tmp_path / name).write_bytes(content)
        kind = kinds[name.partition("/")[0]]
        data = tried(lambda kind=kind, name=name: kind.read((tmp_path / name).parent, "test"), (name, content))
        (tmp_path / name).write_bytes(files[name])
        if data is not None and kind.folder == "sts":
            assert np.isfinite(data["test"]["score"]).all()
            read += 1
    assert read  # some faults are none


def test_pairs_and_texts_of_layers(files, tmp_path):
    from mlpool.analysis.inputs import read_pairs, read_texts
    from mlpool.analysis.layers import checked

    pairs, texts = files["sts/x/test.jsonl"], files["clustering/x/test.jsonl"]
    for rng in cases(400, 2):
        path, source, read = rng.choice([
            ("pairs.jsonl", pairs, lambda p: checked(read_pairs(p))), ("texts.jsonl", texts, read_texts),
            ("texts.csv", b"text,id\n" + b"some words,1\n" * 4, read_texts), ("texts.txt", b"a line\n" * 4, read_texts),
        ])  # fmt: skip
        content = mangled(source, rng)
        (tmp_path / path).write_bytes(content)
        found = tried(lambda read=read, path=path: read(tmp_path / path), (path, content))
        if isinstance(found, list):
            assert all(text.encode() for text in found)


def test_results_and_items_of_compare(tmp_path, capsys):
    from mlpool.evaluation import results

    rows = [
        results.Score(
            model=m, task=t, task_type="STS", score=0.5, n_items=8, split="test", metric="cosine_spearman",
            items=f"items/{t}.npz",
        )
        for m in "ab" for t in ("s", "t", "u")
    ]  # fmt: skip
    for task in "stu":
        results.write_items(tmp_path / f"items/{task}.npz", range(8), prediction=np.arange(8), gold=np.arange(8))
    results.write(tmp_path / "good.csv", rows)
    good, items = (tmp_path / "good.csv").read_bytes(), (tmp_path / "items/s.npz").read_bytes()
    for rng in cases(150, 3):
        table, array = (mangled(good, rng), items) if rng.random() < 0.7 else (good, mangled(items, rng))
        (tmp_path / "bad.csv").write_bytes(table)
        (tmp_path / "items/s.npz").write_bytes(array)
        code = tried(lambda: cli.main(["compare", str(tmp_path / "bad.csv"), "--permutations", "9"]), table)
        said = capsys.readouterr()
        assert code in (0, 2), (code, table)
        assert "nan" not in said.out.lower().split(), said.out
        assert code == 0 or said.err.startswith("mlpool: error: "), said.err


# --- folders and files of other programs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    import peft
    from tiny import D, L, shake, tokenizer, transformer

    from mlpool import MultiLayerPool

    root = tmp_path_factory.mktemp("released")
    base = transformer("llama")
    base.save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    shake(peft.get_peft_model(base, config), only="lora_B").save_pretrained(root / "good")
    pool = MultiLayerPool(D, L, num_latents=3, num_heads=2, head_dim=8, residual=False)
    torch.save(pool.released_state_dict(), root / "good/attn_pool.pt")
    return root


def test_folders_of_the_authors(released, tmp_path):
    """Bit flips, cuts and foreign values in every file: refused, or an embedder without NaN."""
    from mlpool.exchange.released import import_released

    names = ["adapter_config.json", "adapter_model.safetensors", "attn_pool.pt"]
    assert import_released(released / "good", released / "base", 5, 2, device="cpu") is not None
    for rng in cases(60, 4):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(released / "good", folder)
        name = rng.choice(names)
        content = mangled((folder / name).read_bytes(), rng)
        (folder / name).write_bytes(content)
        made = tried(
            lambda folder=folder: import_released(folder, released / "base", 5, 2, device="cpu"), (name, content[:300])
        )
        if made is not None:
            rows = tried(lambda made=made: made.encode(["a text"]), name)
            assert rows is None or np.isfinite(rows).all(), name


def test_tensors_of_the_authors(released, tmp_path):
    """Whole files with tensors of other shapes, types and values."""
    from mlpool.exchange.released import import_released

    state = torch.load(released / "good/attn_pool.pt")
    for rng in cases(40, 5):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(released / "good", folder)
        name = rng.choice(list(state))
        tensor = state[name]
        changed = rng.choice([
            tensor[..., None], tensor[:0], tensor[:1], tensor.flatten(), tensor.half(), tensor.long(), tensor.bool(),
            tensor * float("nan"), tensor * 1e38, tensor.cfloat(), torch.tensor(1.0), tensor.to_sparse(), "x", None,
        ])  # fmt: skip
        torch.save({**state, name: changed}, folder / "attn_pool.pt")
        if rng.random() < 0.2:
            save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
        made = tried(lambda folder=folder: import_released(folder, released / "base", 5, 2, device="cpu"), name)
        if made is not None:
            rows = tried(lambda made=made: made.encode(["a text"]), name)
            assert rows is None or np.isfinite(rows).all(), (name, changed)


def test_exported_files(tmp_path):
    """A .pt2 with flipped bits is refused, or runs; the settings and texts in it are checked too."""
    from tiny import embedder

    from mlpool.exchange.export import export_program, load_exported

    export_program(embedder("eos-causal", "qwen2", num_hidden_layers=1), tmp_path / "good.pt2")
    good = (tmp_path / "good.pt2").read_bytes()
    for rng in cases(25, 6):
        (tmp_path / "bad.pt2").write_bytes(mangled(good, rng))
        exported = tried(lambda: load_exported(tmp_path / "bad.pt2"), "bad.pt2")
        if exported is not None:
            tried(lambda exported=exported: exported(*exported.tokenize(["a text"])), "bad.pt2")
    exported = load_exported(tmp_path / "good.pt2")
    for texts in (["\ud83d"], [""], ["\0"], ["x" * 100_000], [None], [3], ["\u2028"]):
        rows = tried(lambda texts=texts: exported(*exported.tokenize(texts)), texts)
        assert rows is None or rows.isfinite().all()


# --- words ------------------------------------------------------------------------------------------------------------

WORDS = [
    "--help", "-o", "--output", "--device", "--dtype", "--design", "--prompts", "--tasks", "--local", "--pairs",
    "--texts", "--max-seq-length", "--format", "--base", "--num-heads", "--alpha", "--limit", "--window", "--seed",
    "--baseline",
    "cpu", "meta", "x", "", " ", "-1", "0", "1e9", "nan", "9" * 400, "a\0b", "ä" * 300, "..", "/", "./none",
    "none.jsonl", "text.txt", "float31", "paper-exact", "paper-exact=none", "mteb", "sts/x", "--=", "--", "-", "@x",
    "%s",
]  # fmt: skip


def test_words_of_the_command(tmp_path, monkeypatch, capsys):
    """Any words: an exit status, never a traceback, and nothing written beside the output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # "x" might be a name of the Hub
    write_jsonl(tmp_path / "text.txt", [{"text": "a"}])
    before = sorted(tmp_path.rglob("*"))
    for rng in cases(300, 7):
        command = rng.choice(["merge", "export", "import-released", "eval", "compare", "layers"])
        words = [command, *rng.choices(WORDS, k=rng.randint(0, 6))]
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\non {words!r}") from error
        assert code in (0, 2), words
        said = capsys.readouterr()
        assert code == 0 or "error: " in said.err, (words, said.err)
    assert sorted(tmp_path.rglob("*")) == before
