"""Every design in full, some as adapter and merged: saved here, loaded in another process, the same embeddings."""

import subprocess
import sys

import numpy as np
import pytest
from tiny import TEXTS, embedder, shake

from mlpool.embedder import DESIGNS, add_lora, merge

FORMS = ("full", "adapter", "merged")
# What an adapter leaves of a base is one for all pools: of both attentions, with a trained pool and without.
ADAPTED = ("eos-causal", "mean-bidirectional", "multi-layer-causal", "multi-layer-bidirectional")
FOLDERS = [f"{design}.{form}" for design in DESIGNS for form in (FORMS if design in ADAPTED else FORMS[:1])]
LOADS = """
import sys
from pathlib import Path
import numpy as np
root, texts = Path(sys.argv[1]), Path(sys.argv[1], "texts.txt").read_text().split("|")
folders = sorted(path for path in root.iterdir() if path.is_dir())
from sentence_transformers import SentenceTransformer  # first: mlpool has not been imported by hand then
def plain(path):
    return SentenceTransformer(str(path), device="cpu", trust_remote_code=True)
of = [[path for path in folders if path.stem == design] for design in sorted({path.stem for path in folders})]
some = [paths[2 * i % len(paths)] for i, paths in enumerate(of)]
np.savez(root / "sentence-transformers.npz", **{path.name: plain(path).encode(texts) for path in some})
import mlpool
np.savez(root / "mlpool.npz", **{path.name: mlpool.load(path, device="cpu").encode(texts) for path in folders})
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders, and what the embedders gave before they were saved."""
    root = tmp_path_factory.mktemp("saved")
    (root / "texts.txt").write_text("|".join(TEXTS))
    expected = {}
    for design in DESIGNS:
        made = embedder(design)
        for form in (name.rpartition(".")[2] for name in FOLDERS if name.startswith(f"{design}.")):
            if form == "adapter":
                shake(add_lora(made)[0].model, only="lora_B")
            elif form == "merged":
                merge(made)
            expected[f"{design}.{form}"] = made.encode(TEXTS)
            made.save(root / f"{design}.{form}", create_model_card=False, verify=False)
    return root, expected


def test_same_embeddings_in_a_fresh_process(saved):
    """All by `mlpool.load`, and each design in one of its forms by sentence-transformers."""
    root, expected = saved
    done = subprocess.run([sys.executable, "-c", LOADS, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = np.load(root / "mlpool.npz"), np.load(root / "sentence-transformers.npz")
    assert sorted(ours.files) == sorted(FOLDERS)
    assert len({name.partition(".")[0] for name in theirs.files}) == len(DESIGNS)
    wrong = {name: np.abs(got[name] - expected[name]).max() for got in (ours, theirs) for name in got.files}
    assert {name: error for name, error in wrong.items() if not error < 1e-6} == {}


def test_the_forms_are_not_all_the_same(saved):
    """The adapter changes what the model gives, and merging it does not."""
    root, expected = saved
    for design in ADAPTED:
        full, adapter, merged = (expected[f"{design}.{form}"] for form in FORMS)
        assert np.abs(full - adapter).max() > 1e-3
        assert np.abs(adapter - merged).max() < 1e-5
        assert (root / f"{design}.adapter/adapter_model.safetensors").is_file()
        assert not (root / f"{design}.adapter/model.safetensors").exists()
        assert not (root / f"{design}.merged/adapter_model.safetensors").exists()
