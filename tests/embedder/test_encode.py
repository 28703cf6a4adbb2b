"""encode: order, budgets, prompts, outputs, long and wrong texts, memory that runs out, worker processes."""

import logging
import random
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from tiny import TEXTS, D

from mlpool.embedder.embedder import _take

WORDS = ["how", "many", "layers", "does", "the", "pool", "read", "of", "them", "all"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.choice([0, 1, 2, 3, 5, 8, 20]))) for _ in range(150)]


@pytest.fixture(scope="module", params=["auto", "never"])
def embedder(request):
    return tiny.embedder(packing=request.param, prompts={"query": "Q: ", "document": "D: ", "other": "about "})


@pytest.fixture(scope="module")
def alone(embedder, texts) -> np.ndarray:
    """Every text by itself."""
    return np.stack([embedder.encode(text) for text in texts])


@pytest.fixture
def forwards(embedder, monkeypatch) -> list[list[int]]:
    """The lengths of the texts of every forward."""
    seen = []
    forward = embedder[0].forward

    def record(features, **options):
        if "cu_seqlens" in features:
            seen.append(features["cu_seqlens"].diff().tolist())
        else:
            seen.append(features["attention_mask"].sum(1).tolist())
            assert features["input_ids"].shape[1] == max(seen[-1])
        return forward(features, **options)

    monkeypatch.setattr(embedder[0], "forward", record)
    return seen


def cost(embedder, lengths: list[int]) -> int:
    return sum(lengths) if embedder[0].packed else max(lengths) * len(lengths)


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=atol, rtol=0)


# --- order and budget -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 17, 60, 400, 10**9, None])
def test_rows_keep_their_order_and_forwards_their_budget(embedder, texts, alone, forwards, budget):
    got = embedder.encode(texts, token_budget=budget)
    assert got.dtype == np.float32
    assert got.shape == (150, D)
    close(got, alone)
    whole = sorted(n for lengths in forwards for n in lengths)
    assert whole == sorted(embedder[0].token_ids(texts).lengths)
    budget = budget or (4096 if embedder[0].packed else 512)  # of a CPU
    assert all(cost(embedder, lengths) <= budget or len(lengths) == 1 for lengths in forwards)
    # No two neighbours would have fitted together: the budget is used.
    assert all(cost(embedder, a + b[:1]) > budget for a, b in pairwise(forwards))


def test_longest_first(embedder, texts, forwards):
    embedder.encode(texts, token_budget=50)
    lengths = [n for batch in forwards for n in batch]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("given", "largest"), [(4, 4), (1, 1), (33, 33), (32, 150), (None, 150)])
def test_batch_size(embedder, texts, alone, forwards, given, largest):
    close(embedder.encode(texts, batch_size=given, token_budget=10**9), alone)
    assert max(map(len, forwards)) == largest


def test_take():
    lengths = np.array([5, 3, 3, 1])
    waiting = [3, 2, 1, 0]
    assert _take(waiting, lengths, budget=8, batch_size=9, packed=True) == [0, 1]
    assert _take(waiting, lengths, budget=8, batch_size=9, packed=True) == [2, 3]
    assert waiting == []
    assert _take([3, 2, 1, 0], lengths, budget=15, batch_size=9, packed=False) == [0, 1, 2]
    assert _take([3, 2, 1, 0], lengths, budget=15, batch_size=2, packed=False) == [0, 1]
    assert _take([3, 2, 1, 0], lengths, budget=1, batch_size=9, packed=False) == [0]


@pytest.mark.parametrize("budget", [0, -5])
def test_impossible_budget(embedder, budget):
    with pytest.raises(ValueError, match=f"token_budget must be at least 1 token, got {budget}"):
        embedder.encode(TEXTS, token_budget=budget)


def test_more_texts_than_one_block(embedder):
    many = [f"{i % 7} a" for i in range(5000)]
    seven = embedder.encode(many[:7])
    close(embedder.encode(many), seven[np.arange(5000) % 7])


# --- what goes in -----------------------------------------------------------------------------------------------------


def dataset_column(texts):
    return pytest.importorskip("datasets", reason="needs datasets").Dataset.from_dict({"text": texts})["text"]


COLLECTIONS = {
    "tuple": tuple,
    "array": np.array,
    "array of objects": lambda texts: np.array(texts, dtype=object),
    "series": lambda texts: pd.Series(texts, index=range(len(texts), 0, -1)),
    "column": dataset_column,
    "generator": iter,
    "values": lambda texts: dict(enumerate(texts)).values(),
}


@pytest.mark.parametrize("kind", COLLECTIONS)
def test_collections_of_texts(embedder, kind):
    close(embedder.encode(COLLECTIONS[kind](TEXTS)), embedder.encode(TEXTS))


def test_single_string(embedder):
    one = embedder.encode(TEXTS[0])
    assert one.shape == (D,)
    close(one, embedder.encode([TEXTS[0]])[0])
    close(embedder.encode(sentences=TEXTS[0]), one)  # its older name


def test_nothing(embedder):
    assert len(embedder.encode([])) == len(embedder.encode([], convert_to_tensor=True)) == 0
    assert embedder.encode([], convert_to_numpy=False) == []


def test_empty_and_white_texts_are_texts(embedder):
    got = embedder.encode(["", " ", "\n\t", "a"])
    close(np.linalg.norm(got, axis=1), 1, 1e-5)
    assert abs(got[0] - got[1]).max() > 1e-3


def test_rows_that_are_no_strings(embedder):
    with pytest.raises(ValueError, match=r"1 of 3 are not: row 1 is NoneType \('None'\)"):
        embedder.encode(["a", None, "b"])
    with pytest.raises(ValueError, match=r"6 of 6 are not: row 0 is int \('0'\), .*row 4 is int \('4'\)$"):
        embedder.encode(list(range(6)))
    with pytest.raises(ValueError, match=r"row 0 is tuple \(\"\('a', 'b'\)\"\)"):
        embedder.encode([("a", "b")])
    with pytest.raises(ValueError, match=r"row 0 is int"):
        embedder.encode(b"ab")


@pytest.mark.parametrize("wrong", [None, 3, {"text": "a"}, {"a", "b"}, True])
def test_what_is_no_list(embedder, wrong):
    with pytest.raises(ValueError, match=rf"a string or a list of strings, got {type(wrong).__name__}"):
        embedder.encode(wrong)


def test_long_text_is_cut_counted_and_reported(embedder, caplog):
    long = "x " * 100_000
    embedder[0].reset_truncated()
    embedder._said_cut.clear()
    whole = len(embedder[0].texts([long]).ids[0])
    assert whole > 100_000
    with caplog.at_level(logging.WARNING, "mlpool"):
        got = embedder.encode(["a", long, "x " * 300])
    assert [r.getMessage() for r in caplog.records] == [
        f"2 of 3 texts were longer than 128 tokens and cut there (the longest had {whole}); raise max_seq_length to "
        "read more. Said once; model[0].truncated counts on"
    ]
    assert embedder[0].truncated.count == 2
    close(got[1], embedder.encode("x " * 300))  # the same first 127 tokens
    caplog.clear()
    embedder.encode(["a", long])  # counted, and not said at every call
    assert embedder[0].truncated.count == 4
    assert not caplog.records


def test_max_seq_length_can_be_set():
    embedder = tiny.embedder("mean-causal")
    embedder.max_seq_length = 5
    assert embedder.max_seq_length == embedder[0].max_seq_length == 5
    ids = embedder[0].token_ids([TEXTS[0]]).ids[0]
    assert len(ids) == 5
    with pytest.raises(ValueError, match="leave no room for a text"):
        embedder.encode("a", prompt="a long prompt: ")


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts(embedder):
    plain, query = embedder.encode(TEXTS), embedder.encode(["Q: " + text for text in TEXTS])
    assert abs(plain - query).max() > 1e-2
    close(embedder.encode(TEXTS, prompt="Q: "), query)
    close(embedder.encode(TEXTS, prompt_name="query"), query)
    close(embedder.encode(TEXTS, "query"), query)
    close(embedder.encode_query(TEXTS), query)
    close(embedder.encode_query(TEXTS, token_budget=30), query)
    close(embedder.encode_document(TEXTS), embedder.encode(["D: " + text for text in TEXTS]))
    close(embedder.encode_query(TEXTS, prompt_name="other"), embedder.encode(["about " + text for text in TEXTS]))
    with pytest.raises(ValueError, match="Prompt name 'quarry' not found"):
        embedder.encode(TEXTS, prompt_name="quarry")


def test_default_prompt(embedder):
    query = embedder.encode_query(TEXTS)
    embedder.default_prompt_name = "query"
    try:
        close(embedder.encode(TEXTS), query)
        close(embedder.encode(TEXTS, prompt=""), embedder.encode(TEXTS, prompt_name=None, prompt=""))
    finally:
        embedder.default_prompt_name = None


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_tensors(embedder):
    plain = embedder.encode(TEXTS)
    tensor = embedder.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.requires_grad
    close(tensor, plain)
    rows = embedder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(rows, list)
    close(torch.stack(rows), plain)


def test_fewer_dimensions(embedder):
    plain = embedder.encode(TEXTS)
    short = embedder.encode(TEXTS, truncate_dim=8)
    close(short, plain[:, :8])
    normal = plain[:, :8] / np.linalg.norm(plain[:, :8], axis=1, keepdims=True)
    close(embedder.encode(TEXTS, truncate_dim=8, normalize_embeddings=True), normal)
    with embedder.truncate_embeddings(8):
        close(embedder.encode(TEXTS), short)
        assert embedder.get_embedding_dimension() == 8
    assert embedder.get_embedding_dimension() == D


def test_int8(embedder, texts, alone):
    small = embedder.encode(texts, precision="int8")
    assert small.dtype == np.int8
    spread = alone.max(0) - alone.min(0)
    close((small.astype(np.float32) + 128) / 255 * spread + alone.min(0), alone, 2e-2)
    assert embedder.encode(texts, precision="ubinary").shape == (150, D // 8)


def test_token_embeddings(embedder):
    tokens = embedder.encode(TEXTS, output_value="token_embeddings")
    lengths = embedder[0].token_ids(TEXTS).lengths
    assert [tuple(t.shape) for t in tokens] == [(n, D) for n in lengths]
    everything = embedder.encode(TEXTS, output_value=None)
    close(torch.stack([row["sentence_embedding"] for row in everything]), embedder.encode(TEXTS))
    close(everything[1]["token_embeddings"][: lengths[1]], tokens[1], 1e-4)


def test_unknown_argument(embedder):
    with pytest.raises(ValueError, match="token_budge"):
        embedder.encode(TEXTS, token_budge=3)


def test_mode_gradients_and_modes_of_torch(embedder, texts, alone):
    embedder.train()
    close(embedder.encode(texts), alone)
    assert not any(module.training for module in embedder.modules())
    with torch.no_grad():
        close(embedder.encode(texts), alone)
    with torch.enable_grad():
        assert not embedder.encode(TEXTS, convert_to_tensor=True).requires_grad
    features = embedder.preprocess(TEXTS)
    assert embedder(features)["sentence_embedding"].requires_grad


def test_progress_is_on_stderr(embedder, capsys):
    embedder.encode(TEXTS, show_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Encoding" in err
    assert f"{len(TEXTS)}/{len(TEXTS)}" in err
    embedder.encode(TEXTS, show_progress_bar=False)
    assert capsys.readouterr() == ("", "")


def test_similarity(embedder):
    a, b = embedder.encode(TEXTS), embedder.encode(TEXTS[:3])
    close(embedder.similarity(a, b), a @ b.T)
    close(embedder.similarity_pairwise(a[:3], b), (a[:3] * b).sum(1))


# --- memory that runs out ---------------------------------------------------------------------------------------------


def run_out(embedder, monkeypatch, room: int, error: Exception) -> list[int]:
    """Forwards above `room` tokens fail; returns the tokens of each that was tried."""
    tried = []
    forward = embedder[0].forward

    def limited(features, **options):
        tried.append(features["input_ids"].numel())
        if tried[-1] > room:
            raise error
        return forward(features, **options)

    monkeypatch.setattr(embedder[0], "forward", limited)
    return tried


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
    ],
    ids=["cuda", "cpu", "mps"],
)
def test_out_of_memory_halves_the_batch(embedder, texts, alone, monkeypatch, caplog, error):
    tried = run_out(embedder, monkeypatch, 130, error)
    with caplog.at_level(logging.WARNING, "mlpool"):
        got = embedder.encode(texts, token_budget=1000)
    close(got, alone)
    failed = [n for n in tried if n > 130]
    assert 1 <= len(failed) <= 4
    assert tried[0] == failed[0]  # the longest come first
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(failed)
    assert all(line.startswith("out of memory at ") and line.endswith(" tokens a forward") for line in said)


def test_out_of_memory_for_one_text(embedder, monkeypatch):
    run_out(embedder, monkeypatch, 40, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError, match=r"memory ran out for one text alone \(row 2, 61 tokens\); lower max_seq"):
        embedder.encode(["a", "b", "x" * 60, "c"])


def test_other_errors_are_not_swallowed(embedder, texts, monkeypatch):
    tried = run_out(embedder, monkeypatch, 10, RuntimeError("expected scalar type Half but found Float"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        embedder.encode(texts)
    assert len(tried) == 1
    monkeypatch.undo()
    assert embedder.encode(TEXTS).shape == (len(TEXTS), D)  # and the model is left usable


# --- worker processes -------------------------------------------------------------------------------------------------


def test_worker_processes(texts):
    embedder = tiny.embedder(prompts={"query": "Q: "})
    expected = embedder.encode(texts, prompt_name="query")
    assert embedder[0].packed
    pool = embedder.start_multi_process_pool(["cpu"])  # that chunks come back in order is sentence-transformers' part
    try:
        got = embedder.encode(texts, prompt_name="query", pool=pool, chunk_size=40, token_budget=100)
        close(got, expected)
        assert embedder.encode([], pool=pool).shape == (0,)
        with pytest.raises(ValueError, match="row 1 is int"):
            embedder.encode(["a", 1], pool=pool)
        with pytest.raises(ValueError, match="leave no room for a text"):  # raised in a worker
            embedder.encode(["a"], pool=pool, prompt="x" * 200)
    finally:
        embedder.stop_multi_process_pool(pool)


# --- numbers that are none --------------------------------------------------------------------------------------------


def test_nan_names_the_row_and_what_to_look_at():
    """It was returned as an embedding."""
    embedder = tiny.embedder("mean-causal")
    with torch.no_grad():
        embedder[0].model.embed_tokens.weight[embedder.tokenizer("é")["input_ids"][0]] = torch.nan
    with pytest.raises(
        ValueError, match=r"^row 2: .* is NaN or infinite \(rows \[2\], 1 in all\); the weight .*embed_tok"
    ):
        embedder.encode(["one", "two two two", "é", "four"])
    with torch.no_grad():
        embedder[0].model.embed_tokens.weight.nan_to_num_(0)
        embedder[0].model.norm.weight.fill_(3e38)
        embedder[0].model.norm.weight[::2] = -3e38
    with pytest.raises(
        ValueError, match=r"^row 0: .*4 in all\); all weights are finite, so numbers left the range of to"
    ):
        embedder.encode(["one", "two two two", "é", "four"])


def test_states_beyond_layer_norms_name_the_text():
    embedder = tiny.embedder("multi-layer-causal")
    with torch.no_grad():
        embedder[0].model.layers[0].mlp.down_proj.weight *= 1e22
    with pytest.raises(ValueError, match=r"^row 1: its hidden states reach \d\.\de\+2\d, and of more than 1e\+17"):
        embedder.encode(["one", "two two two two two"])
    for design in ("eos-causal", "mean-causal"):
        plain = tiny.embedder(design)
        expected = plain.encode(TEXTS)
        with torch.no_grad():
            plain[0].model.norm.weight *= 1e20
        np.testing.assert_allclose(plain.encode(TEXTS), expected, atol=1e-6)
