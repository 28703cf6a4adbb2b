"""ONNX folders: run by onnxruntime and tokenizers alone, and by the ONNX backend of sentence-transformers, in the last
versions that can be installed with it. In the environment of `make test-onnx`. Two designs on a real base, and what
they take, by hand:

    export OMP_NUM_THREADS=1 MLPOOL_ONNX_BASE=bases/smollm2
    .venv-onnx/bin/python -m pytest -s tests/exchange/test_onnx.py -k real
"""

import copy
import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from docs_blocks import ROOT, blocks
from test_export import PROMPTS, batches
from tiny import EOS, GATED, PAD, SMALL, TEXTS, D, embedder, passages, shake, tokenizer, transformers

from mlpool import cli
from mlpool.embedder import DESIGNS, add_lora, load
from mlpool.exchange import export
from mlpool.exchange import onnx as graphs

BASE = os.environ.get("MLPOOL_ONNX_BASE")
LIMIT = 40
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": ("Llama", {}), "qwen2": ("Qwen2", {}), "mistral": ("Mistral", {"sliding_window": 6}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, **WINDOW}),
}  # fmt: skip
# Every design once, every family under both directions of attention and with both kinds of pool.
CASES = [
    ("eos-causal", "llama"), ("multi-layer-bidirectional", "llama"), ("last-layer-causal", "qwen2"),
    ("mean-bidirectional", "qwen2"), ("mean-causal", "mistral"), ("last-layer-bidirectional", "mistral"),
    ("multi-layer-causal", "gemma3"), ("mean-bidirectional", "gemma3"), ("multi-layer-causal-mean", "qwen2"),
    ("layer-weights-bidirectional", "gemma3"),
]  # fmt: skip
PLAIN = [(design, family) for design, family in CASES if not DESIGNS[design].trainable]
LONG = "how many layers " * 20
# A process in which nothing but onnxruntime, tokenizers and numpy can be imported.
ALONE = """
import json, sys
for name in ("mlpool", "mlpool_kernels", "torch", "transformers", "sentence_transformers", "onnx"):
    sys.modules[name] = None  # importing it is an error
names = {}
for code in sys.argv[1:]:
    exec(code, names)
print(json.dumps(names["embeddings"].tolist()))
"""


def small(family: str, design: str, folder: Path, **options):
    """An embedder on a tiny model of the family, its pool off its start."""
    torch.manual_seed(0)
    prefix, changes = FAMILIES[family]
    sizes = {**GATED, "num_hidden_layers": 2, "pad_token_id": PAD, "eos_token_id": EOS, **changes}
    model = getattr(transformers, f"{prefix}Model")(getattr(transformers, f"{prefix}Config")(**sizes))
    shake(model, 0.1).save_pretrained(folder)
    tokenizer("bos" if family == "llama" else "bare").save_pretrained(folder)
    pooler = SMALL if DESIGNS[design].has_latents else "default"
    made = load(folder, design, pooler, device="cpu", prompts=PROMPTS, max_seq_length=LIMIT, **options)
    shake(made[1])
    return made


def run(*code: str) -> np.ndarray:
    done = subprocess.run([sys.executable, "-c", ALONE, *code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout))


def documented(folder: Path, texts: list[str], prompt: str) -> str:
    """The folder's own lines, on other texts and another prompt."""
    (code,) = blocks(folder / "README.md", "python")
    for pattern, value in ((r'(?<=folder = )"\w+"', str(folder)), (r'\["a text", "another"\]', texts)):
        code, count = re.subn(pattern, lambda _, value=value: repr(value), code)
        assert count == 1, pattern
    assert '.get("query")' in code
    return code.replace('.get("query")', f".get({prompt!r})")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder and the embedder of a case, made when they are first asked for."""
    root = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def export_case(design: str, family: str):
        folder = root / f"{design}-{family}".replace("-", "_")
        made = small(family, design, root / f"base-{design}-{family}")
        assert export.export(made, folder, "onnx") < 1e-5
        return folder, made

    return export_case


def test_every_design_is_here():
    assert {design for design, _ in CASES} == set(DESIGNS)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_graph_is_the_embedder(case, exported):
    """Batches and lengths other than what was traced, padding on either side, and texts by the folder's own lines."""
    import onnxruntime

    folder, made = exported(*case)
    session = onnxruntime.InferenceSession(folder / graphs.GRAPH, providers=["CPUExecutionProvider"])
    for name, (ids, mask) in batches().items():
        with torch.no_grad():
            ours = made({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
        (theirs,) = session.run(["sentence_embedding"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        assert np.abs(theirs - ours.numpy()).max() < 1e-5, name
    texts = [*TEXTS, LONG]
    assert np.abs(run(documented(folder, texts, "document")) - made.encode(texts)).max() < 1e-5
    assert np.abs(run(documented(folder, texts, "query")) - made.encode_query(texts)).max() < 1e-5


@pytest.mark.skipif(not BASE, reason="takes minutes: MLPOOL_ONNX_BASE=FOLDER")
@pytest.mark.parametrize("design", ["multi-layer-causal", "mean-bidirectional"])
def test_a_real_base(design, tmp_path):
    """Sizes, differences, and seconds of one core, which others that compute there do not change."""
    import onnxruntime
    from tokenizers import Tokenizer

    made = load(BASE, design, device="cpu", model_kwargs={"dtype": "float32"})
    shake(made[1], 0.02)
    start = time.process_time()
    export.export(made, tmp_path / "out", "onnx")
    seconds = time.process_time() - start
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "out" / graphs.GRAPH, options, providers=["CPUExecutionProvider"])
    tokens = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))

    def served(texts: list[str]) -> np.ndarray:  # neighbours in length, as `encode` does it
        found = []
        for i in range(0, len(texts), 4):
            rows = tokens.encode_batch(texts[i : i + 4])
            feed = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
            found += session.run(["sentence_embedding"], feed)
        return np.concatenate(found)

    def timed(encode) -> tuple[np.ndarray, float]:
        encode(passages()[:4])
        start = time.process_time()
        found = encode(passages())
        return found, len(passages()) / (time.process_time() - start)

    (ours, before), (theirs, speed) = timed(made.encode), timed(served)
    error = np.abs(ours - theirs).max()
    print(f"\n{design}: {seconds:.0f} s, {size / 1e6:.0f} MB, largest difference {error:.1e}")
    print(f"{speed:.2f} texts/s, of encode {before:.2f}")
    assert error < 1e-4  # a text of two words is far from float64 in float32, whoever computes it


def test_what_a_folder_holds(exported):
    """Dynamic axes by their names, no path of the machine that wrote it, and which files of sentence-transformers."""
    import onnx

    for design, family in CASES:
        folder, made = exported(design, family)
        graph = onnx.load(folder / graphs.GRAPH).graph
        axes = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.input}
        assert axes == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
        plain = not DESIGNS[design].trainable
        assert [o.name for o in graph.output] == ["sentence_embedding", *["last_hidden_state"] * plain]
        assert (folder / "modules.json").is_file() == plain
        content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        assert str(ROOT).encode() not in content
        assert str(folder.parent).encode() not in content
        settings = json.loads((folder / "embedder.json").read_text())
        assert (settings["design"], settings["dimension"], settings["prompts"]) == (design, D, made.prompts)


def test_weights_of_two_gigabytes_are_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "_INLINE", 10_000)
    made = small("qwen2", "eos-causal", tmp_path / "base")
    export.export(made, tmp_path / "out", "onnx")
    weights = sum(p.numel() * 4 for p in made.parameters())
    beside = (tmp_path / "out/onnx/model.onnx.data").stat().st_size
    assert beside > 0.9 * weights > 10_000  # norms stay in the graph
    assert np.abs(run(documented(tmp_path / "out", TEXTS, "query")) - made.encode_query(TEXTS)).max() < 1e-5


def test_tokens_that_are_not_pooled(tmp_path):
    """A third input, and the lines that make it."""
    made = small("llama", "mean-bidirectional", tmp_path / "base", include_prompt=False, include_bos=False)
    export.export(made, tmp_path / "out", "onnx")
    assert not (tmp_path / "out/modules.json").exists()  # sentence-transformers' backend has no such input
    for prompt, ours in (("query", made.encode_query(TEXTS)), ("document", made.encode(TEXTS))):
        assert np.abs(run(documented(tmp_path / "out", TEXTS, prompt)) - ours).max() < 1e-5
    made[0].include_prompt = True
    assert np.abs(made.encode_query(TEXTS) - run(documented(tmp_path / "out", TEXTS, "query"))).max() > 1e-3


READ = """
import json, sys
sys.modules["mlpool"] = None
from sentence_transformers import SentenceTransformer, __version__
worst = {}
for folder, (texts, ours, of_queries) in json.load(open(sys.argv[1])).items():
    model = SentenceTransformer(folder, backend="onnx", model_kwargs={"provider": "CPUExecutionProvider"})
    assert type(model[0].auto_model).__module__.startswith("optimum"), type(model[0].auto_model)
    for embeddings, prompt in ((ours, None), (of_queries, "query")):
        got = model.encode(texts, prompt_name=prompt)
        assert got.shape == (len(texts), len(ours[0]))
        worst[f"{folder} {prompt}"] = float(abs(got - embeddings).max())
print(json.dumps([__version__, worst]))
"""


def test_sentence_transformers_reads_it(exported, tmp_path):
    """By its ONNX backend, where the design has no trainable pool."""
    backend = os.environ["MLPOOL_ONNX_BACKEND"]  # a folder of packages, see Makefile
    texts = [text for text in [*TEXTS, LONG] if text.strip()]
    plain = {
        str(folder): (texts, made.encode(texts).tolist(), made.encode_query(texts).tolist())
        for folder, made in (exported(*case) for case in PLAIN)
    }  # fmt: skip
    (tmp_path / "expected.json").write_text(json.dumps(plain))
    done = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "expected.json"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": backend, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version, worst = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith("5.")
    assert len(worst) == 2 * len(plain) == 8
    assert {name: error for name, error in worst.items() if not error < 1e-5} == {}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_refused_by_name(tmp_path, monkeypatch):
    def refused(error, match, made, name="out"):
        with pytest.raises(error, match=match):
            export.export(made, tmp_path / name, "onnx")
        assert not list(tmp_path.iterdir())

    refused(ValueError, r"the ONNX folder holds full weights.*call merge\(embedder\) first", add_lora(embedder()))
    refused(ValueError, "is written as a folder.*named like a file", embedder(), "out.onnx")
    half = embedder("eos-causal", base_dtype=torch.bfloat16)
    refused(ValueError, r"has weights in torch.bfloat16; load it with .*--dtype float32", half)
    eager = embedder()
    eager[0].attn_implementation = "flash_attention_2"
    refused(ValueError, "attention by flash_attention_2 cannot be traced", eager)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "find_spec", lambda name: None)
        refused(ModuleNotFoundError, r"onnx, onnxscript, onnxruntime: pip install 'mlpool\[onnx\]'", embedder())


def test_family_that_onnx_cannot_hold(tmp_path):
    """An operation without an ONNX form, in a model that torch.export traces."""
    made = embedder("mean-causal", num_hidden_layers=2)

    class Odd(torch.nn.Module):
        def forward(self, states):
            return states + torch.special.bessel_j0(states)

    made[0].model.norm = Odd()
    with pytest.raises(RuntimeError, match=r"qwen2 \(Qwen2Model\) cannot be written as ONNX: .*bessel_j0.*--to torch"):
        export.export(made, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_folder_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    class Flipped(graphs._Graph):
        def forward(self, input_ids, attention_mask):
            embedding, states = super().forward(input_ids, attention_mask)
            return embedding.flip(1), states

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "self_contained", lambda backbone: copy.deepcopy(backbone.tokenizer))  # puts no EOS
        with pytest.raises(RuntimeError, match="the saved tokenizer gives other tokens for"):
            export.export(embedder("mean-causal", num_hidden_layers=2), tmp_path / "out", "onnx")
    monkeypatch.setattr(graphs, "_Graph", Flipped)
    with pytest.raises(RuntimeError, match="not exported: run by onnxruntime, embeddings with the prompt '' differ by"):
        export.export(embedder("mean-causal", num_hidden_layers=2), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


# --- as it is typed ---------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    """A folder with an adapter, in bfloat16: merged, and written in float32."""
    made = add_lora(embedder("mean-bidirectional", base_dtype=torch.bfloat16, num_hidden_layers=2))
    shake(made[0].model, only="lora_B")
    made.save(tmp_path / "saved", verify=False)
    words = ["export", tmp_path / "saved", "-o", tmp_path / "out", "--to", "onnx", "--device", "cpu"]
    assert cli.main([*map(str, words)]) == 0
    said = capsys.readouterr().out
    assert "mean-bidirectional, loaded again; embeddings agree to" in said
    assert "out/README.md holds the lines that run it" in said
    wide = load(tmp_path / "saved", device="cpu", dtype="float32")
    assert np.abs(run(documented(tmp_path / "out", TEXTS, "query")) - wide.encode(TEXTS)).max() < 1e-5


def test_lines_of_the_docs(exported, tmp_path):
    """docs/serving.md's own lines, in a folder where there is a my-onnx."""
    folder, made = exported("multi-layer-bidirectional", "llama")
    (code,) = [block for block in blocks(ROOT / "docs/serving.md", "py") if "onnxruntime" in block]
    assert len(code.strip().splitlines()) <= 10
    (tmp_path / "my-onnx").symlink_to(folder)
    got = run(f"import os; os.chdir({str(tmp_path)!r})", code)
    assert np.abs(got - made.encode_query(["a text", "another"])).max() < 1e-5
