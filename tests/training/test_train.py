"""`mlpool train`: a whole run, what it trains and at which rate, and a run that diverges."""

import json

import pytest
import torch

pytest.importorskip("datasets")

import runs
from runs import config_of, losses

import mlpool
from mlpool.training.config import read_config
from mlpool.training.mixture import load_mixture
from mlpool.training.train import train, training_arguments
from mlpool.training.trainer import EmbedderTrainer, last_checkpoint

place, whole_run = runs.place, runs.whole_run  # its tiny base and 40 triplets, and a training of it


def test_a_run_learns_and_leaves_a_folder_that_loads(whole_run):
    values = losses(whole_run)
    assert len(values) == 6
    assert values[-1] < values[0]
    embedder = mlpool.load(whole_run)
    assert embedder.encode(["w1 w2", "w3"]).shape == (2, 32)
    assert mlpool.is_bidirectional(embedder[0].model)
    names = {path.name for path in whole_run.iterdir()}
    assert {"adapter_model.safetensors", "modules.json", "checkpoint-3", "checkpoint-6", "train_config.yaml"} <= names
    assert "model.safetensors" not in names
    assert not [path for path in whole_run.parent.iterdir() if path.name.startswith(".")]  # nothing left beside


def test_the_pool_has_its_own_learning_rate_and_only_lora_trains(place, tmp_path):
    config = config_of(place, tmp_path / "out", pooler_learning_rate=0.0, max_steps=2, save_strategy="no")
    config["pooler"] |= {"start": "all"}
    before = mlpool.load(config["model"], config["design"], config["pooler"]).state_dict()
    after = train(config).state_dict()
    assert any("lora_B" in name and bool(tensor.any()) for name, tensor in after.items())
    frozen = [name for name in before if name.startswith("backbone.") and name in after]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    for name in ("mix_weights", "output_weight"):  # a rate of 0 leaves them at their start
        assert torch.equal(after[f"pooler.pool.{name}"], before[f"pooler.pool.{name}"])


@pytest.mark.parametrize(
    ("pooler", "asked", "rates"),
    [
        ({}, None, {"mix_weights": 3e-2, "output_weight": 1e-3, "whitening": 1e-4}),
        ({"start": "all"}, None, {"mix_weights": 3e-2, "output_weight": 1e-3}),
        ({"start": "last"}, None, {"mix_weights": 3e-3, "output_weight": 3e-4}),
        ({}, 1e-4, {"mix_weights": 3e-3, "output_weight": 1e-4}),
        ({"residual": True}, None, {"gate": 3e-3, "output_weight": 3e-3}),
        ({"residual": False}, 1e-4, {"layer_weights": 1e-4, "output_weight": 1e-4}),
    ],
)
def test_the_learning_rates_that_a_pool_is_given(place, tmp_path, monkeypatch, pooler, asked, rates):
    """Its own where nothing is said, in their proportion where something is; the backbone's where it has none."""
    config = config_of(place, tmp_path / "out", pooler_learning_rate=asked)
    config["pooler"] |= pooler
    made = []
    create = EmbedderTrainer.create_optimizer
    monkeypatch.setattr(EmbedderTrainer, "create_optimizer", lambda self, *_: made.append((self, create(self))))
    train(config, dry_run=True)
    (trainer, optimizer), *_ = made
    given = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    of = {name.rpartition(".")[2]: given[id(p)] for name, p in trainer.model.named_parameters() if id(p) in given}
    assert {name: of[name] for name in rates} == pytest.approx(rates)
    assert {given[id(p)] for n, p in trainer.model.named_parameters() if "lora_" in n} == {3e-3}


def test_a_pool_that_whitens_is_calibrated_once_by_texts_of_the_training(place, tmp_path):
    config = config_of(place, tmp_path / "out", pooler_learning_rate=0.0, max_steps=1, save_strategy="no")
    pool = train(config).pooler.pool
    by_hand = mlpool.load(config["model"], config["design"], config["pooler"])
    by_hand.calibrate([text for _, text in load_mixture(config["data"]).texts(1000, {})])
    for name in ("whitening", "ff_out_bias", "mix_weights"):
        torch.testing.assert_close(getattr(pool, name), getattr(by_hand.pooler.pool, name), atol=1e-4, rtol=1e-3)
    again = {**config, "model": str(tmp_path / "out"), "output_dir": str(tmp_path / "again"), "lora": None}
    again = {name: value for name, value in again.items() if name not in ("design", "pooler", "lora")}
    assert torch.equal(train(again).pooler.pool.whitening, pool.whitening)


def test_prompts_are_read_in_training_as_in_encoding(place, tmp_path):
    config = config_of(place, tmp_path / "out", prompts={"query": "w7 w8 "}, max_steps=1, save_strategy="no")
    embedder = train(config)
    assert mlpool.load(tmp_path / "out").prompts["query"] == "w7 w8 "
    prompts = training_arguments(read_config(config)).prompts  # untouched by the config's own `prompts`
    assert prompts is None
    assert embedder.prompts["query"] == "w7 w8 "


def test_full_fine_tuning_in_bfloat16_keeps_float32_weights(place, tmp_path):
    train(config_of(place, tmp_path / "out", lora=None, bf16=True, max_steps=2, gradient_checkpointing=True))
    embedder = mlpool.load(tmp_path / "out")
    assert embedder.dtype == torch.float32
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_dev_file_is_evaluated(place, tmp_path):
    (tmp_path / "dev.jsonl").write_text(
        "\n".join(json.dumps({"sentence1": f"w{i}", "sentence2": f"w{i * 7 % 60}", "score": i % 6}) for i in range(12))
    )
    output = tmp_path / "out"
    train(config_of(place, output, dev=str(tmp_path / "dev.jsonl"), eval_strategy="steps", eval_steps=3))
    history = json.loads((output / "checkpoint-6/trainer_state.json").read_text())["log_history"]
    assert sum("eval_dev_spearman_cosine" in entry for entry in history) == 2
    (tmp_path / "dev.jsonl").write_text('{"sentence1": "a"}\n')
    with pytest.raises(ValueError, match=r"dev\.jsonl:1"):
        train(config_of(place, tmp_path / "never", dev=str(tmp_path / "dev.jsonl")))


# --- divergence ---------------------------------------------------------------------------------------------------


class _Poison:
    """A trainer that puts a value into the loss, or into one gradient, at a step."""

    def __init__(self, step: int, loss: float = 1.0, gradient: float = 1.0) -> None:
        self.step, self.loss, self.gradient = step, loss, gradient

    def __call__(self, base: type) -> type:
        poison = self

        class Poisoned(base):
            def compute_loss(self, *args, **kwargs):
                value = super().compute_loss(*args, **kwargs)
                return value * poison.loss if self.state.global_step + 1 == poison.step else value

            def training_step(self, model, *args, **kwargs):
                value = super().training_step(model, *args, **kwargs)
                if self.state.global_step + 1 == poison.step:
                    model[1].pool.mix_weights.grad.mul_(poison.gradient)
                return value

        return Poisoned


@pytest.mark.parametrize(
    ("poison", "said"),
    [
        (_Poison(4, loss=float("nan")), "diverged at step 4: the loss is nan"),
        (_Poison(4, loss=float("inf")), "diverged at step 4: the loss is inf"),
        (
            _Poison(5, gradient=float("inf")),
            r"step 5: the norm of the gradient is inf \(first in .*mix_weights\)",
        ),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_the_weights(place, tmp_path, poison, said):
    from mlpool.training import train as module

    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EmbedderTrainer", poison(module.EmbedderTrainer))
        with pytest.raises(ValueError, match=f"{said}.*last good weights are in .*checkpoint-3"):
            train(config_of(place, output, gradient_accumulation_steps=2))
    assert last_checkpoint(output).name == "checkpoint-3"
    assert all(tensor.isfinite().all() for tensor in mlpool.load(output / "checkpoint-3").state_dict().values())
    assert not (output / "modules.json").exists()


def test_a_run_that_fails_before_its_first_step_names_the_text_and_leaves_nothing(place, tmp_path):
    from mlpool.training.losses import InfoNCE

    embed = InfoNCE._embed

    def poisoned(self, columns):
        return embed(self, columns).index_fill(0, torch.tensor([8 + 3]), float("nan"))  # of 8 pairs a batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InfoNCE, "_embed", poisoned)
        found = "the loss is nan, the embedding of row 3 of column 1 of the batch"
        with pytest.raises(ValueError, match=rf"diverged at step 1: {found}.*no checkpoint"):
            train(config_of(place, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
