"""Layer analysis: every number against scipy, numpy or a formula on hidden_states of the bare model, text by text."""

from typing import Any

import decoders
import numpy as np
import pytest
import torch

scipy_stats = pytest.importorskip("scipy.stats", reason="needs scipy: pip install 'mlpool[eval]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'mlpool[eval]'")

from decoders import SMALL, D, L, shaken, some_pairs, some_texts  # noqa: E402
from made import tiny_model  # noqa: E402

import mlpool  # noqa: E402
from mlpool.analysis.correlation import hsic, pearson_sum  # noqa: E402
from mlpool.analysis.inputs import load_model  # noqa: E402
from mlpool.analysis.layers import Pairs, analyse, layer_scores  # noqa: E402
from mlpool.analysis.profiles import pool_profile  # noqa: E402

pytest_plugins = ["evaluation_fixtures"]
decoder = decoders.decoder


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
    found = analyse(embedder, None, pairs, progress=False).scores
    own = np.sum(embedder.encode(pairs.first) * embedder.encode(pairs.second), 1)
    assert found.own[0] == pytest.approx(scipy_stats.spearmanr(pairs.scores, own).statistic, abs=1e-6)
    assert found.own[0] != pytest.approx(found.values["mean"][0, L], abs=1e-3)


# --- what the pool reads ----------------------------------------------------------------------------------------------


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
