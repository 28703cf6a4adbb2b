"""vLLM with the plugin, on its CPU build in float32: its embeddings are those of `encode`. By `make test-vllm`.

The engine runs in this process, where a tiny model starts in a second or two; one server is started for all that is
asked by HTTP. Every design on a real base, with what differs, by hand:

    MLPOOL_VLLM_BASE=bases/smollm2 .venv-vllm/bin/python -m pytest -s tests/served/test_vllm.py -k real
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

# Read when vLLM is imported, by the server too: the engine in this process, 1 GiB for its cache, no core of its own.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
import tiny
import vllm

from mlpool.embedder import DESIGNS, load
from mlpool.exchange.export import export_vllm
from mlpool.exchange.vllm import FAMILIES, SECTION

# Its attention on a CPU has heads of 32 at least.
SIZES = {**tiny.GATED, "hidden_size": 64, "intermediate_size": 96}
TEXTS = [*tiny.TEXTS, "how many layers " * 8, "word " * 15]
PROMPTS = {"query": "read: ", "document": ""}
BASE = os.environ.get("MLPOOL_VLLM_BASE")
START = 1200  # seconds that a server may take, on a machine that does much else


@pytest.fixture(scope="module", autouse=True)
def families():
    """tiny's models in sizes that vLLM runs, and the two families more."""
    kept = dict(tiny.CONFIGS)
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    more = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 32}}
    tiny.CONFIGS |= {family: (name, {**SIZES, **more.get(family, {})}) for family, name in names.items()}
    tiny.base.cache_clear()
    assert set(names) == set(FAMILIES)
    yield
    tiny.CONFIGS.clear()
    tiny.CONFIGS.update(kept)
    tiny.base.cache_clear()


def serve(folder: Path, **options):
    """vLLM's engine on a folder, in this process."""
    options = {"enforce_eager": True, "max_num_seqs": 8, "distributed_executor_backend": "uni", **options}
    return vllm.LLM(str(folder), dtype="float32", runner="pooling", disable_log_stats=True, **options)


@pytest.fixture
def engine():
    """`serve`, ended after the test."""
    from vllm.distributed import cleanup_dist_env_and_memory

    yield serve
    gc.collect()
    cleanup_dist_env_and_memory()


def embed(llm, texts, **options) -> np.ndarray:
    return np.array([output.outputs.embedding for output in llm.embed(list(texts), use_tqdm=False, **options)])


def cosine(ours, theirs) -> float:
    """The smallest, over texts."""
    ours, theirs = (np.asarray(x, dtype=np.float64) for x in (ours, theirs))
    return float(((ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)).min())


def same(ours, theirs) -> bool:
    return cosine(ours, theirs) >= 0.99999 and np.abs(np.asarray(ours) - np.asarray(theirs)).max() < 1e-5


# Every design in one family, and the most and the least that a pool reads in the others.
CASES = [("qwen2", design) for design in DESIGNS]
CASES += [(family, design) for family in FAMILIES if family != "qwen2" for design in
          ("multi-layer-bidirectional", "multi-layer-causal", "mean-causal")]  # fmt: skip


@pytest.mark.parametrize(("family", "design"), CASES)
def test_embeddings_are_those_of_encode(family, design, tmp_path, engine):
    made = tiny.embedder(design, family, frame="bos", prompts=PROMPTS)
    assert export_vllm(made, tmp_path / "out") < 1e-5
    llm = engine(tmp_path / "out")
    assert same(made.encode(TEXTS), embed(llm, TEXTS))
    assert same(made.encode(TEXTS[:1]), embed(llm, TEXTS[:1]))
    queries = [PROMPTS["query"] + text for text in TEXTS]
    assert same(made.encode(TEXTS, prompt_name="query"), embed(llm, queries))
    # A text in parts, or with a part from the cache, is not pooled as a whole; a causal model's last token is.
    config, last = llm.llm_engine.vllm_config, DESIGNS[design].token_pooling == "last"
    assert config.scheduler_config.enable_chunked_prefill == config.cache_config.enable_prefix_caching == last
    if last:  # the cache is warm now
        assert same(made.encode(TEXTS), embed(llm, TEXTS))


@pytest.mark.skipif(not BASE, reason="takes minutes: MLPOOL_VLLM_BASE=FOLDER")
@pytest.mark.parametrize("design", DESIGNS)
def test_a_real_base(design, tmp_path, engine):
    """With a prompt, texts of one word to 233; a pool that is trained has left its start."""
    texts = tiny.passages()
    made = load(BASE, design, device="cpu", prompts=PROMPTS, model_kwargs={"dtype": "float32"})
    start = made.encode(texts[:4])
    tiny.shake(made[1], 0.02)
    assert (cosine(start, made.encode(texts[:4])) < 0.999) == DESIGNS[design].trainable
    export_vllm(made, tmp_path / "out")
    ours = made.encode(texts, prompt_name="query")
    theirs = embed(engine(tmp_path / "out", max_num_seqs=32), [PROMPTS["query"] + text for text in texts])
    error = np.abs(ours - theirs).max()
    print(f"\n{design}: smallest cosine {cosine(ours, theirs):.8f}, largest difference {error:.1e}")
    assert same(ours, theirs)


# A pipeline is compiled, as by default, though not by Inductor, which takes long: in eager mode the CPU worker of a
# later stage has no buffer for the states of the first, and ends in vLLM's own AssertionError.
PARALLEL = {
    "tensor": ("mistral", {"tensor_parallel_size": 2}),
    "pipeline": (
        "qwen2",
        {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}},
    ),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_two_processes(name, tmp_path, engine):
    family, options = PARALLEL[name]
    made = tiny.embedder("multi-layer-bidirectional", family, frame="bos")
    export_vllm(made, tmp_path / "out")
    llm = engine(tmp_path / "out", distributed_executor_backend="mp", **options)
    try:
        assert same(made.encode(TEXTS), embed(llm, TEXTS))
    finally:
        llm.llm_engine.engine_core.shutdown()  # else its processes live as long as this one


OPTIONS = {
    "layers": {"layers": [0, 2], "depth": 4},
    "cut": {"layers": [0, 1]},  # the layers above are cut off, and the top one is read raw
    "skip_tokens": {"pooler": {**tiny.SMALL, "skip_tokens": 2}},
    "include_bos": {"include_bos": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_an_embedder_leaves_out(name, tmp_path, engine):
    made = tiny.embedder("multi-layer-bidirectional", "llama", frame="bos", **OPTIONS[name])
    export_vllm(made, tmp_path / "out")
    texts = TEXTS if name != "skip_tokens" else [text for text in TEXTS if len(text) > 3]
    assert same(made.encode(texts), embed(engine(tmp_path / "out"), texts))


def test_compiled(tmp_path, engine):
    """As vLLM runs by default: what keeps the rows is one operation of a compiled model."""
    made = tiny.embedder("multi-layer-bidirectional", "qwen2")
    export_vllm(made, tmp_path / "out")
    assert same(made.encode(TEXTS), embed(engine(tmp_path / "out", enforce_eager=False), TEXTS))


def test_dimensions(tmp_path, engine):
    made = tiny.embedder("multi-layer-bidirectional", "qwen2")
    export_vllm(made, tmp_path / "out")
    llm = engine(tmp_path / "out")
    cut = embed(llm, TEXTS, pooling_params=vllm.PoolingParams(dimensions=8))
    assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    assert same(made.encode(TEXTS, truncate_dim=8, normalize_embeddings=True), cut)


def test_unit_means_and_a_mean_of_one_layer(tmp_path, engine):
    from mlpool import LayerWeightsPool, register_design

    register_design("unit-means", "causal", LayerWeightsPool, "unit_mean")
    made = load(tiny.base("mistral"), "unit-means", device="cpu")
    tiny.shake(made[1])
    export_vllm(made, tmp_path / "out")
    assert same(made.encode(TEXTS), embed(engine(tmp_path / "out"), TEXTS))


def test_what_is_not_served(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    export_vllm(tiny.embedder("multi-layer-bidirectional", "qwen2"), folder)

    def refused(match, **options):
        with pytest.raises(Exception, match=match):
            serve(folder, **options)

    refused("needs all tokens of a text in one forward, and --enable-prefix-caching", enable_prefix_caching=True)
    refused("needs all tokens of a text in one forward, and --enable-chunked-prefill", enable_chunked_prefill=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, SECTION: {**config[SECTION], "format": 99}}))
    refused("of format 1, got 99")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    refused("serves llama, mistral, qwen2, qwen3, got a gpt2")
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    refused("this is vLLM 0.99.0, and mlpool's plugin knows 0.32")


# --- by HTTP ----------------------------------------------------------------------------------------------------------


class Server:
    """vLLM's server on a folder; not compiled, as in `test_compiled`, since that takes longer than all else."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log, self.url = folder, log, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        # `vllm serve FOLDER` but for the first words: that command of vllm-cpu 0.32 looks for a package called vllm.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        command += ["--runner", "pooling", "--dtype", "float32", "--served-model-name", "ours"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + START
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"the server does not answer: {self.log.read_text()[-3000:]}")
            time.sleep(0.5)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def made(families):
    return tiny.embedder("multi-layer-bidirectional", "qwen2", frame="bos", prompts=PROMPTS)


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    export_vllm(made, root / "out")
    server = Server(root / "out", root / "log")
    yield server
    server.kill()


def post(server: Server, body: bytes | dict, path: str = "/v1/embeddings") -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def ask(server: Server, texts: list[str], clients: int = 32, patient: bool = False) -> np.ndarray:
    """One request a text, `clients` at once; rows in the order of the texts. patient: until the server answers."""

    def one(text: str) -> list[float]:
        while True:
            try:
                status, reply = post(server, {"model": "ours", "input": text})
            except OSError:
                if not patient:
                    raise
                time.sleep(0.5)
                continue
            assert status == 200, reply
            return reply["data"][0]["embedding"]

    with ThreadPoolExecutor(clients) as pool:
        return np.array(list(pool.map(one, texts)))


def texts_of(count: int) -> list[str]:
    """Of 1 to about 40 tokens, each another."""
    return [" ".join(["read", "layers", "pool"][i % 3 :] * (1 + i * 7 % 5)) + f" {i}" for i in range(count)]


def test_many_clients(server, made):
    texts = texts_of(2000)
    assert same(made.encode(texts), ask(server, texts))


def test_several_texts_and_prompts(server, made):
    status, reply = post(server, {"model": "ours", "input": TEXTS})
    assert status == 200
    assert [row["index"] for row in reply["data"]] == list(range(len(TEXTS)))
    assert same(made.encode(TEXTS), [row["embedding"] for row in reply["data"]])
    status, reply = post(server, {"model": "ours", "texts": TEXTS[:2], "input_type": "query"}, "/v2/embed")
    assert status == 200
    assert same(made.encode(TEXTS[:2], prompt_name="query"), reply["embeddings"]["float"])
    status, reply = post(server, {"model": "ours", "input": TEXTS[:1], "dimensions": 8})
    assert (status, len(reply["data"][0]["embedding"])) == (200, 8)


BAD = {
    "too long": ({"input": "word " * 300}, "128"),
    "100 MB": ({"input": "a" * 10**8}, "128"),
    "no text": ({"input": []}, ""),
    "no string": ({"input": [{"a": 1}]}, "input"),
    "no such token": ({"input": [[10**6]]}, "vocab"),
    "too many dimensions": ({"input": "a", "dimensions": 65}, "64"),
    "no dimensions": ({"input": "a", "dimensions": 0}, "64"),
    "another model": ({"input": "a", "model": "theirs"}, "theirs"),
    "no JSON": (b'{"input": ', ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(name, server, made):
    body, reason = BAD[name]
    status, reply = post(server, body if isinstance(body, bytes) else {"model": "ours", **body})
    assert 400 <= status < 500, (status, reply)
    assert reason in reply["error"]["message"]
    assert reply["error"]["message"].strip()
    assert same(made.encode(["alive"]), ask(server, ["alive"]))


def test_restart_under_load(server, made):
    """The server is killed while 32 clients ask it, and started again; who waits gets what it asked for."""
    texts = texts_of(600)
    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(ask, server, texts, patient=True)
        time.sleep(0.5)
        server.kill()
        assert not asked.done()
        server.start()
        assert same(made.encode(texts), asked.result(timeout=240))
