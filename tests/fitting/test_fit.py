"""`mlpool fit`: kept states, candidates, resume, and everything that must be refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from tiny import D, L, base, embedder

pytest.importorskip("datasets")

import mlpool
from mlpool.cli import main
from mlpool.embedder.identity import identity
from mlpool.fitting import states as kept
from mlpool.fitting.config import Candidate, read_fit_config
from mlpool.fitting.fit import Found, fit
from mlpool.fitting.states import packed, take_states, unpacked
from mlpool.fitting.trials import PoolOnStates, Trial, batches, dev_score
from mlpool.quantized import is_quantized
from mlpool.show import progress

WORDS = ["how", "many", "layers", "does", "the", "pool", "read", "all", "of", "them", "and", "last", "one", "twice"]
TEXTS = [("", text) for text in tiny.TEXTS] + [("query: ", "all of them")]
CONFIGS = Path(__file__).resolve().parents[2] / "configs/fit"
SMALL = {"num_latents": 4, "num_heads": 2, "head_dim": 8}


def words(generator: np.random.Generator) -> str:
    return " ".join(generator.choice(WORDS, 5))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """40 pairs that share words, and twice 60 scored pairs."""
    folder, generator = tmp_path_factory.mktemp("fit"), np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(40):
            text = words(generator)
            file.write(json.dumps({"query": f"{text} {i}", "positive": f"{text[::-1]} {i}"}) + "\n")
    for name in ("dev", "test"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(60):
                row = {"sentence1": words(generator), "sentence2": words(generator), "score": i % 5}
                file.write(json.dumps(row) + "\n")
    return folder


def config_of(data: Path, output: Path, **changes) -> dict:
    return {
        "model": str(base()),
        "design": "multi-layer-bidirectional",
        "data": str(data / "pairs.jsonl"),
        "dev": str(data / "dev.jsonl"),
        "test": [str(data / "test.jsonl")],
        "output_dir": str(output),
        "candidates": [
            {"name": "small", "pooler": SMALL, "learning_rate": [1e-3, 0.1]},
            {"pool": "LayerWeightsPool", "learning_rate": 1e-2},
        ],
        "seeds": 2,
        "batch_size": 8,
        "max_steps": 3,
        "warmup_steps": 1,
        "device": "cpu",
        **changes,
    }


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("fitted") / "out"
    fit(config_of(data, output))
    return output


# --- kept states ------------------------------------------------------------------------------------------------------


def test_states_are_what_the_pool_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "PART", 3)
    model = embedder()
    states = take_states(model, TEXTS, tmp_path / "states")
    assert states.shape == (len(TEXTS), L, D)
    for row in (5, 0, 7):
        prompt, text = TEXTS[row]
        with torch.no_grad():
            one = model[0](model[0].preprocess([text], prompt=prompt or None))["layer_states"]
        torch.testing.assert_close(states.rows([row]), one, rtol=1e-3, atol=1e-3)
    order = [6, 1, 6]
    assert torch.equal(states.rows(order), torch.cat([states.rows([row]) for row in order]))


def test_massive_and_tiny_states_keep_eleven_bits():
    rows = torch.randn(3, 2, 64) * torch.tensor([1e9, 1e-9]).view(1, 2, 1)
    rows[2] = 0
    again = torch.from_numpy(unpacked(packed(rows)))
    torch.testing.assert_close(again, rows, rtol=2**-11, atol=0)


def test_a_killed_run_takes_only_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "PART", 3)
    model, folder = embedder(), tmp_path / "states"
    before = take_states(model, TEXTS, folder).rows(range(len(TEXTS)))
    (folder / "part-00001.sha256").unlink()  # as after a kill
    damaged = folder / "part-00002.npy"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"??")
    taken = []
    real = kept._take
    monkeypatch.setattr(kept, "_take", lambda taker, texts, *rest: taken.append(texts) or real(taker, texts, *rest))
    after = take_states(model, TEXTS, folder).rows(range(len(TEXTS)))
    assert taken == [TEXTS[3:6], TEXTS[6:]]
    assert torch.equal(before, after)


def test_states_of_another_model_or_text_are_refused(tmp_path):
    take_states(embedder(), TEXTS, tmp_path)
    with pytest.raises(ValueError, match="texts was 8, is 7, texts_sha256 was"):
        take_states(embedder(), TEXTS[:-1], tmp_path)
    other = embedder()
    tiny.shake(other[0].model)
    with pytest.raises(ValueError, match="another model or of other texts: model was"):
        take_states(other, TEXTS, tmp_path)
    with pytest.raises(ValueError, match="layers was 4, is 2"):
        take_states(embedder(layers=[0, 1]), TEXTS, tmp_path)
    (tmp_path / kept.PLAN).unlink()
    with pytest.raises(ValueError, match=r"holds no states\.json"):
        take_states(embedder(), TEXTS, tmp_path)


def test_a_full_disk_is_said_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(OSError, match=r"needs 0\.00 GB.* larger disk"):
        take_states(embedder(), TEXTS, tmp_path / "states")
    assert not (tmp_path / "states").exists()


def test_what_is_not_frozen_or_not_read_by_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has an adapter"):
        take_states(mlpool.add_lora(embedder(), rank=2), TEXTS, tmp_path)
    with pytest.raises(ValueError, match="eos-causal reads tokens of the last layer"):
        take_states(embedder("eos-causal"), TEXTS, tmp_path)


def test_states_that_are_not_finite_name_their_text(tmp_path):
    model = embedder()
    with torch.no_grad():
        model[0].model.embed_tokens.weight[model[0].tokenizer("Zürich")["input_ids"][0]] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite, the first 'Zürich"):
        take_states(model, TEXTS, tmp_path)


# --- trials -----------------------------------------------------------------------------------------------------------


def test_a_pool_on_states_scores_as_the_embedder_does(tmp_path, data):
    from scipy.stats import spearmanr

    from mlpool.fitting.trials import DevSet
    from mlpool.training.train import load_scored

    model, lines = embedder(), load_scored(data / "dev.jsonl")
    texts = list(dict.fromkeys(("", text) for a, b, _ in lines for text in (a, b)))
    states = take_states(model, texts, tmp_path)
    first, second = (np.array([texts.index(("", line[i])) for line in lines]) for i in (0, 1))
    gold = [line[2] for line in lines]
    one, two = (model.encode([line[i] for line in lines]) for i in (0, 1))
    expected = spearmanr((one * two).sum(1), gold).statistic
    found = dev_score(PoolOnStates(model[1].pool, states, torch.device("cpu")), [DevSet(first, second, gold)])
    assert found == pytest.approx(expected, abs=0.02)  # float16 may swap near neighbours


def test_no_text_is_twice_in_a_batch():
    pairs = np.array([[0, 1], [0, 2], [3, 4], [5, 1], [6, 7], [8, 9]])
    made = batches(pairs, 3, seed=0)
    for _ in range(20):
        rows = pairs[next(made)]
        assert len(np.unique(rows)) == rows.size
    with pytest.raises(ValueError, match="not one batch of 6"):
        next(batches(pairs, 6, seed=0))


def test_the_best_is_by_mean_dev_and_a_diverged_one_is_not():
    a, b, c = (Candidate(name, None, "default", 1e-3) for name in "abc")
    found = Found({
        a: [Trial(0.5, 0, 1, 1.0), Trial(0.7, 0, 1, 1.0)], b: [Trial(0.9, 0, 1, 1.0), Trial(None, 0, 1, None)],
        c: [Trial(0.65, 0, 1, 1.0), Trial(0.5, 0, 1, 1.0)],
    })  # fmt: skip
    assert (found.best, found.seed) == (a, 1)
    assert "diverged" in str(found)
    assert "test" not in str(found)
    with pytest.raises(ValueError, match="every candidate diverged"):
        Found({b: found.trials[b]})


def test_a_candidate_that_diverges_ends_no_other(data, tmp_path):
    rates = [1e-3, 1e30]
    found = fit(config_of(data, tmp_path, candidates=[{"pooler": SMALL, "learning_rate": rates}], seeds=1))
    assert [of[0].dev is None for of in found.trials.values()] == [False, True]


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_the_best_is_an_embedder_that_training_goes_on_from(whole, data, tmp_path):
    rows = json.loads((whole / "fit.json").read_text())
    assert len(rows) == 6
    assert len({row["dev"] for row in rows}) > 1
    assert all(row["test"] not in (None, row["dev"]) for row in rows)  # other texts
    assert rows[0]["loss"] is not None
    model = mlpool.load(whole, device="cpu")
    assert model.encode("a text").shape == (D,)
    from mlpool.training.train import train

    train({
        "model": str(whole), "data": str(data / "pairs.jsonl"), "lora": {"rank": 2}, "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4, "max_steps": 1, "use_cpu": True, "disable_tqdm": True, "device": "cpu",
    })  # fmt: skip
    again = mlpool.load(tmp_path, device="cpu")
    assert type(again[1].pool) is type(model[1].pool)


def test_training_on_states_is_training_on_texts(whole, data):
    """The same pool, batch and steps through the embedder itself, by the loss that both use."""
    import dataclasses

    from mlpool.fitting.fit import _build, _index
    from mlpool.fitting.trials import try_pool
    from mlpool.training.data import load_pairs
    from mlpool.training.losses import InfoNCE
    from mlpool.training.train import load_scored

    model, config = embedder(), read_fit_config(config_of(data, whole, seeds=1))
    pairs = load_pairs(str(data / "pairs.jsonl"))
    texts, table, dev = _index(model, pairs, [load_scored(data / "dev.jsonl")])
    states = take_states(model, texts, whole / "again")
    chosen = dataclasses.replace(config.candidates[0], learning_rate=1e-2)
    torch.manual_seed(0)
    pool = _build(model, chosen)
    with progress("fit", "step", 3) as bar:
        assert pool.start == "all"  # as `load` starts it on a raw decoder
        assert try_pool(pool, states, table, dev, [], config, 1e-2, 0, torch.device("cpu"), bar).test is None
    torch.manual_seed(0)
    model[1].pool = other = _build(model, chosen)
    model[0].requires_grad_(False)
    model.calibrate([texts[row][1] for row in np.unique(table)])
    model.train()
    loss = InfoNCE(model)
    proportion = {"mix_weights": 0.3, "whitening": 1e-3}  # the pool's own
    groups = [{"params": [p], "lr": proportion.get(name, 1e-2)} for name, p in other.named_parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 1.0, 0.5][min(step, 2)])
    made = batches(table, 8, 0)
    for _ in range(3):
        rows = next(made)
        columns = [[pairs[i][name] for i in rows] for name in ("anchor", "positive")]
        optimizer.zero_grad()
        loss([model.preprocess(column) for column in columns]).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for name, parameter in pool.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=0, atol=3e-3, msg=name)


def test_the_same_command_goes_on(whole, data, monkeypatch, capsys):
    from mlpool.fitting import fit as room

    def refuse(*_, **__):
        raise AssertionError("trained again")

    before = json.loads((whole / "fit.json").read_text())
    weights = next(iter(sorted((whole / "trials").glob("*/pool.safetensors"))))
    damaged = weights.read_bytes()
    monkeypatch.setattr(room, "try_pool", refuse)
    fit(config_of(data, whole))
    assert json.loads((whole / "fit.json").read_text()) == before
    weights.write_bytes(damaged[:-1])
    with pytest.raises(AssertionError, match="trained again"):
        fit(config_of(data, whole))
    weights.write_bytes(damaged)
    with pytest.raises(AssertionError, match="trained again"):
        fit(config_of(data, whole, max_steps=4))


def test_a_pool_of_ones_own(data, tmp_path):
    from torch import nn

    from mlpool.pooling.layers import read_layer_states

    @mlpool.register_pool
    class ScaledTop(mlpool.Pool):
        reads_all_layers = True

        def __init__(self, hidden_size, num_layers, layers=None, token_pooling="mean", normalize=True):
            super().__init__()
            self.hidden_size, self.num_layers, self.layers = hidden_size, num_layers, layers
            self.token_pooling, self.normalize = token_pooling, normalize
            self.weight = nn.Parameter(torch.ones(hidden_size))

        def forward(self, hidden_states=None, attention_mask=None, *, layer_states=None):
            return self._finish(read_layer_states(self, None, layer_states)[:, -1] * self.weight)

    found = fit(config_of(data, tmp_path, candidates=[{"pool": "ScaledTop", "learning_rate": 0.1}], layers=[0, 2]))
    assert found.best.name == "ScaledTop, default"
    pool = mlpool.load(tmp_path, device="cpu")[1].pool
    assert type(pool) is ScaledTop
    assert not torch.equal(pool.weight, torch.ones(D))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_ready_configs_are_valid(path):
    assert len(read_fit_config(path).candidates) > 1


def test_the_command(data, tmp_path, capsys):
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(config_of(data, tmp_path / "out")))
    assert main(["fit", str(path), "--dry-run", "--max_steps", "2"]) == 0
    assert "6 of 8" not in (said := capsys.readouterr().out)
    assert "states      0.00 GB" in said
    assert "small: 0.01 M parameters, learning rate 0.001" in said
    assert not (tmp_path / "out").exists()
    assert main(["fit", str(path), "--lora.rank", "4"]) == 2
    assert "lora is for `mlpool train`" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "none.yaml")]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": []}, "lacks candidates"),
        ({"candidates": [{"pooler": SMALL}]}, "has no learning_rate"),
        ({"candidates": [{"pool": "AbsentPool", "learning_rate": 1}]}, "no pool 'AbsentPool'"),
        ({"candidates": [{"poolr": {}, "learning_rate": 1}]}, "unknown key in candidates 'poolr'; nearest: pool"),
        ({"candidates": [{"pooler": SMALL, "learning_rate": -1}]}, "learning_rate is -1"),
        ({"candidates": [{"pool": "MeanPool", "learning_rate": 1}]}, "has nothing to train"),
        ({"candidates": [{"pool": "LastLayerPool", "learning_rate": 1}]}, "reads no layer_states"),
        ({"candidates": [{"pooler": {"latents": 3}, "learning_rate": 1}]}, "does not fit MultiLayerPool"),
        ({"candidates": [{"pooler": SMALL, "learning_rate": [1e-3, 1e-3]}]}, "twice"),
        (
            {"candidates": [{"pooler": {"skip_tokens": i}, "learning_rate": 1} for i in (0, 1)]},
            r"skip_tokens \[0, 1\], and states are taken once",
        ),
        ({"lora": True}, "lora is for `mlpool train`"),
        ({"dev": []}, "lacks dev"),
        ({"batch_size": 64}, "not one batch of 64"),
        ({"pooler": "default"}, "unknown config key 'pooler'"),
    ],
)
def test_bad_configs(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(config_of(data, tmp_path, **changes))


def test_a_quantised_base(data, tmp_path):
    """Its codes are frozen: states of the base as it runs, kept for it alone, and an embedder with these very codes."""
    pytest.importorskip("torchao")
    config = config_of(data, tmp_path / "out", seeds=1, candidates=[{"pooler": SMALL, "learning_rate": 0.1}])
    fit({**config, "quantization": "int8"})
    fitted = mlpool.load(tmp_path / "out")
    plain = tiny.embedder(quantization="int8")
    assert is_quantized(fitted)
    assert identity(fitted[0]) == identity(plain[0]) != identity(embedder()[0])
    plain[1] = fitted[1]
    assert np.array_equal(fitted.encode(tiny.TEXTS), plain.encode(tiny.TEXTS))
    states = {"states": str(tmp_path / "out/states"), "output_dir": str(tmp_path / "full")}
    with pytest.raises(ValueError, match=r"keeps the states of another model.*: model was '"):
        fit({**config, **states})
    fit({**config, **states, "quantization": "int8"})
