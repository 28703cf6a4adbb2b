"""The client examples, in the environment of `make test-onnx`: 10,000 texts indexed and searched as a user would."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from made import sentence, write_jsonl
from tiny import embedder

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS, BEST = 10_000, 5
PROMPT = "read: "


@pytest.fixture(scope="module")
def model():
    return embedder("mean-bidirectional", prompts={"query": PROMPT, "document": ""}, num_hidden_layers=2)


@pytest.fixture(scope="module")
def place(model, tmp_path_factory) -> Path:
    """A folder of a user's: a model, and the same texts as lines and as JSON."""
    root, generator = tmp_path_factory.mktemp("clients"), random.Random(0)
    texts = [f"{sentence(generator)} {i}" for i in range(ROWS)]
    model.save(root / "model", verify=False)
    (root / "texts.txt").write_text("\n".join(texts))
    write_jsonl(root / "texts.jsonl", [{"text": text} for text in texts])
    return root


@pytest.fixture(scope="module")
def expected(model, place) -> list[tuple[float, str]]:
    """The five nearest to the first text, by numpy."""
    texts = (place / "texts.txt").read_text().splitlines()
    scores = model.encode_document(texts) @ model.encode_query(texts[0])
    return [(float(scores[i]), texts[i]) for i in np.argsort(-scores)[:BEST]]


class Handler(BaseHTTPRequestHandler):
    """What the client asks of an OpenAI server, as it is on the wire: models; embeddings in base64, or as numbers."""

    model = None  # set by the fixture
    asked: list[dict] = []  # noqa: RUF012

    def do_GET(self) -> None:
        assert self.path == "/v1/models", self.path
        self._answer({"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "test"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/embeddings", self.path
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(asked)
        texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
        rows = self.model.encode(texts, prompt="").astype("<f4")
        binary = asked.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": base64.b64encode(row).decode() if binary else row.tolist()}
            for i, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        self._answer({"object": "list", "model": asked["model"], "data": data, "usage": usage})

    def _answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the test's output."""


@pytest.fixture
def server(model) -> Iterator[str]:
    handler = type("Bound", (Handler,), {"model": model, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()
    assert all(asked["encoding_format"] == "base64" for asked in handler.asked)
    assert sum(len(asked["input"]) for asked in handler.asked) in (0, ROWS + 1)


def run(script: str, *words: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, words)], capture_output=True, text=True, check=False, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def check(said: str, expected: list[tuple[float, str]]) -> None:
    found = re.findall(r"^(\d\.\d{3})  (.+)$", said, re.MULTILINE)
    assert [text for _, text in found] == [text for _, text in expected]
    for (score, _), (wanted, _) in zip(found, expected, strict=True):
        assert abs(float(score) - wanted) < 1e-3


@pytest.mark.parametrize("name", ["openai", "langchain", "lancedb"])
def test_short(name):
    assert len((EXAMPLES / f"{name}_search.py").read_text().splitlines()) < 40


def test_openai(place, expected, server):
    query = (place / "texts.txt").read_text().splitlines()[0]
    code, said, wrong = run("openai_search.py", place / "texts.txt", query, "--base-url", server, "--prompt", PROMPT)
    assert code == 0, wrong
    assert said.startswith("10,000 texts, tiny\n")
    check(said, expected)


def test_langchain(place, expected):
    query = (place / "texts.txt").read_text().splitlines()[0]
    code, said, wrong = run("langchain_search.py", place / "texts.txt", query, "--model", place / "model")
    assert code == 0, wrong
    check(said, expected)


def test_lancedb(place, expected, tmp_path):
    query = (place / "texts.txt").read_text().splitlines()[0]
    words = (place / "texts.jsonl", query, "--model", place / "model", "-o", tmp_path / "index")
    code, said, wrong = run("lancedb_search.py", *words)
    assert code == 0, wrong
    assert said.startswith("10,000 texts in ")
    check(said, expected)


def test_what_is_wrong_is_said(place, tmp_path):
    """A missing file, a model that is none, no server: one line each, no traceback."""
    for script, words, match in (
        ("openai_search.py", (place / "texts.txt", "a", "--base-url", "http://127.0.0.1:9/v1"), "is a server running"),
        ("openai_search.py", (tmp_path / "none.txt", "a"), "No such file"),
        ("langchain_search.py", (place / "texts.txt", "a", "--model", tmp_path / "none"), "no folder"),
        ("lancedb_search.py", (tmp_path / "none.jsonl", "a", "--model", place / "model", "-o", tmp_path / "i"), "none"),
    ):
        code, _, wrong = run(script, *words)
        assert code == 1, wrong
        assert wrong.startswith("no search"), wrong
        assert match in wrong
        assert "Traceback" not in wrong
