"""`mlpool train`: configs, a whole run, resume, a run that is killed, and two processes under DDP and FSDP2."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("datasets")
pytest.importorskip("peft")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

import mlpool
from mlpool.training.config import read_config
from mlpool.training.train import train, training_arguments
from mlpool.training.trainer import EmbedderTrainer, last_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny Llama in `base` and 40 triplets in `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("train")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(
        folder / "base"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=62,
        max_position_embeddings=64, eos_token_id=1, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(40):
            # Each word of a query has its translation in the positive: not known at the start, and learned quickly.
            query, other = torch.randint(30, (2, 3), generator=generator).tolist()
            row = {"query": query, "positive": [j + 30 for j in query], "negative": [j + 30 for j in other]}
            row = {name: " ".join([WORDS[j] for j in value]) for name, value in row.items()}
            row["positive"] += f" {WORDS[30 + i % 30]}"
            file.write(json.dumps(row) + "\n")
    return folder


def config_of(place: Path, output: Path, **changes) -> dict:
    return {
        "model": str(place / "base"),
        "design": "multi-layer-bidirectional",
        "pooler": {"num_latents": 4, "num_heads": 2, "head_dim": 8},
        "data": {"train": str(place / "pairs.jsonl")},
        "lora": {"rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "loss": {"mini_batch_tokens": 32},
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "pooler_learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def losses(output: Path) -> list[float]:
    """The loss of every step, of the newest checkpoint."""
    newest = max(output.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def same_weights(a: Path, b: Path, tolerance: float = 0.0) -> None:
    one, other = mlpool.load(a).state_dict(), mlpool.load(b).state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def whole_run(place) -> Path:
    output = place / "whole"
    train(config_of(place, output))
    return output


# --- configs ----------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_reach_nested_keys(place):
    words = "--learning_rate 1e-5 --loss.temperature=0.02 --lora.rank 2 --bf16 --design eos-causal --layers [0,-1]"
    config = read_config(config_of(place, place / "x"), words.split())
    assert config.arguments["learning_rate"] == 1e-5
    assert config.loss["temperature"] == 0.02
    assert config.lora["rank"] == 2
    assert config.arguments["bf16"] is True
    assert config.options["design"] == "eos-causal"
    assert config.options["layers"] == [0, -1]


def test_short_forms(place):
    base = config_of(place, place / "x")
    assert read_config({**base, "data": "a.jsonl", "lora": True}, ["--data.limit", "5"]).data == {
        "train": "a.jsonl",
        "limit": 5,
    }
    assert read_config({**base, "lora": True}).lora == {}
    assert read_config(read_config({**base, "lora": True}).as_dict()).lora == {}
    assert read_config({**base, "lora": False}).lora is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learing_rate": 1}, "learning_rate"),
        ({"loss": {"temprature": 1}}, "temperature"),
        ({"lora": {"rnak": 1}}, "rank"),
        ({"data": {"train": "x", "colums": {}}}, "columns"),
        ({"data": None}, "lacks data"),
        ({"output_dir": None}, "lacks output_dir"),
        ({"design": "multi-layer"}, "multi-layer-causal"),
    ],
)
def test_mistakes_name_what_was_meant(place, changes, message):
    with pytest.raises(ValueError, match=message):
        train(config_of(place, place / "never", **changes))
    assert not (place / "never").exists()


def test_a_config_that_is_not_there_or_not_yaml(tmp_path):
    with pytest.raises(FileNotFoundError, match="configs/"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("model: [")
    with pytest.raises(ValueError, match=r"bad\.yaml is no valid YAML"):
        read_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\ndata: x\nmodel: b\n", "'model' twice in one section, lines 1 and 3"),
        ("model: a\ndata:\n  train:\n    - {source: x, weight: 1, weight: 2}\n", "'weight' twice .* lines 4 and 4"),
        ("model: &m {a: 1}\nloss: {a: *m, b: *m}\ndata: {source: x, source: *m}\n", "'source' twice .* lines 3 and 3"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path, text, message):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"twice\.yaml has {message}"):
        read_config(tmp_path / "twice.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("**/*.yaml")), ids=lambda p: p.stem)
def test_ready_configs_are_valid(path):
    values = yaml.safe_load(path.read_text())
    if "accelerate" in path.parts:
        assert values["distributed_type"] in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    elif not {"study", "fit"} & set(path.parts):
        config = read_config(path)
        config.arguments["bf16"] = False  # refused without a GPU
        arguments = training_arguments(config)
        if "paper" in path.parts:  # as published
            assert (arguments.learning_rate, arguments.weight_decay, arguments.max_steps) == (1e-5, 0.01, 1000)
            assert (arguments.warmup_steps, arguments.gradient_accumulation_steps) == (100, 256)
            assert config.lora == {"rank": 16, "alpha": 32, "dropout": 0.1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seed @x", r"seed is '@x', expected an integer"),
        ("--seed {", r"seed is '\{', expected an integer"),
        ("--seed [1", "seed is"),
        ('--seed "', "seed is"),
        ("--seed %", "seed is"),
        ("--seed *a", "seed is"),
        ("--seed null", "seed is None, expected an integer"),
        ("--seed true", "seed is True, expected a number, not true"),
        ("--max_steps .inf", "max_steps is inf, expected a finite number"),
        ("--max_steps 0", "max_steps is 0, expected a number of at least 1, or -1"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size is 0, expected greater than or equal to 1"),
        ("--per_device_train_batch_size 2.5", "per_device_train_batch_size is 2.5, expected an integer"),
        ("--warmup_steps soon", "warmup_steps is 'soon', expected a number"),
        ("--loss true", "loss is True, expected a dictionary"),
        ("--loss.temperature warm", "loss.temperature is 'warm', expected a number"),
        ("--lora 5", "lora is 5, expected a boolean or a dictionary"),
        ("--lora 0", "lora is 0, expected a boolean or a dictionary"),
        ("--lora.rank x", "lora.rank is 'x', expected an integer"),
        ("--dtype x", "dtype is 'x', expected 'auto', 'float32'"),
        ("--device x", "device is 'x', expected a device of this machine"),
        ("--lr_scheduler_type sideways", "lr_scheduler_type is 'sideways', expected 'linear'"),
        ("--data 5", "data.train is 5, expected a path"),
        ("--model.name x", "model.name cannot be set: model is"),
        ("--0 1", "unknown config key '0'"),
    ],
)
def test_values_that_do_not_fit_are_named_with_their_key(place, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_config(config_of(place, place / "never"), words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["5: 3", "a: &x [*x]", "a: !!bool x", "a: 2024-13-01", "[" * 5000, "a: !!python/object:os.system x"]
)
def test_files_that_are_no_config_get_our_message(place, tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml|unknown config key"):
        read_config(tmp_path / "bad.yaml")


def test_numbers_in_words_are_numbers_and_yaml_no_is_no(place):
    values = {**config_of(place, place / "x"), "learning_rate": "1e-5", "save_strategy": False, "run_name": 5}
    config = read_config(values, ["--loss.temperature", "2e-2", "--per_device_train_batch_size", "8"])
    found = {name: config.arguments[name] for name in ("learning_rate", "save_strategy", "run_name")}
    assert found == {"learning_rate": 1e-5, "save_strategy": "no", "run_name": "5"}
    assert config.loss["temperature"] == 0.02
    assert read_config({**values, "seed": 7}, ["--seed", "08"]).arguments["seed"] == 8  # octal to YAML, not to people


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "0 rows"),
        ([{"sentence1": "a", "sentence2": "b", "score": 1}], "1 rows with 1 different scores"),
        ([{"sentence1": "a", "sentence2": "b", "score": float("nan")}], r"dev\.jsonl:1 .*score is nan"),
        ([{"sentence1": "a", "sentence2": 5, "score": 1}], r"dev\.jsonl:1 .*expected text"),
        (["x"], r"dev\.jsonl:1"),
    ],
)
def test_a_dev_file_that_cannot_be_used_is_named_before_the_model_is_loaded(place, tmp_path, lines, message):
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(place, tmp_path / "never", dev=str(tmp_path / "dev.jsonl"), model=str(place))
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not (tmp_path / "never").exists()


def test_a_broken_line_of_data_is_named(place, tmp_path):
    lines = (place / "pairs.jsonl").read_text().splitlines()
    lines[6] = lines[6][:20]
    (tmp_path / "broken.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"broken\.jsonl:7"):
        train(config_of(place, tmp_path / "never", data=str(tmp_path / "broken.jsonl")))


def test_dry_run_prints_the_plan_and_writes_nothing(place, capsys):
    train(config_of(place, place / "dry"), dry_run=True)
    out = capsys.readouterr().out
    for expected in ("6", "multi-layer-bidirectional", "M LoRA", "M pool", "M frozen", "15 negatives"):
        assert expected in out
    assert not (place / "dry").exists()


def test_a_dry_run_refuses_what_the_run_would(place, tmp_path):
    """Arguments, optimizer groups and a batch are built; bfloat16 on a CPU is fine, and no memory is pinned."""
    train(config_of(place, tmp_path / "dry", bf16=True, use_cpu=False), dry_run=True)
    arguments = training_arguments(read_config(config_of(place, tmp_path / "dry", bf16=True, use_cpu=False)))
    assert torch.accelerator.is_available() or not arguments.dataloader_pin_memory
    with pytest.raises(ValueError, match="No parameters found"):
        train(config_of(place, tmp_path / "dry", learning_rate_mapping={"nothing": 1e-3}), dry_run=True)
    with pytest.raises(ValueError, match="leave no room for a text"):
        train(config_of(place, tmp_path / "dry", max_seq_length=1), dry_run=True)
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        ([("w1", "w2")], "from 1 pair "),
        ([("w1", "w2"), ("w3", "w4"), ("w5", "w6")] * 10, r"30 pairs \(3 different, 6 distinct texts\)"),
        ([("w1", "w2")] * 32, r"32 pairs \(1 different, 2 distinct texts\)"),
    ],
)
def test_data_of_which_no_batch_can_be_made_is_an_error_before_the_model_is_loaded(place, tmp_path, rows, counts):
    lines = [json.dumps({"query": query, "positive": positive}) for query, positive in rows]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    config = config_of(place, tmp_path / "out", data=str(tmp_path / "few.jsonl"), model=str(place))
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=f"nothing would be trained: not one batch of 8 .*{counts}"):
            train(config, dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_a_pool_rate_without_a_pool_is_not_used(place, tmp_path, caplog):
    config = config_of(place, tmp_path / "out", design="mean-bidirectional", max_steps=1, save_strategy="no")
    del config["pooler"]
    train(config)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


# --- a run ------------------------------------------------------------------------------------------------------------


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
        ({}, None, {"mix_weights": 3e-2, "output_weight": 1e-3}),
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


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resume_goes_on_with_the_same_losses_and_weights(place, whole_run):
    output = place / "resumed"
    shutil.copytree(whole_run / "checkpoint-3", output / "checkpoint-3")
    config = config_of(place, output)
    with pytest.raises(ValueError, match="--resume"):
        train(config)
    train(config, resume=True)
    assert losses(output) == pytest.approx(losses(whole_run), abs=1e-6)
    same_weights(output, whole_run, 1e-6)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_finished(place, whole_run, capsys):
    before = bytes_of(whole_run)
    for _ in range(2):
        embedder = train(config_of(place, whole_run), resume=True)
    assert "holds a finished training" in capsys.readouterr().out
    assert bytes_of(whole_run) == before
    assert embedder.encode(["w1"]).shape == (1, 32)


def test_a_run_that_was_killed_behind_its_last_checkpoint_makes_no_further_step(place, whole_run, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole_run / "checkpoint-6", output / "checkpoint-6")
    train(config_of(place, output), resume=True)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-6"]
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 6
    same_weights(output, whole_run)


def test_a_config_that_was_cut_is_named_on_resume(place, whole_run, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    for text in ("model: [", "", "null"):
        (output / "train_config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"train_config\.yaml .*delete it to resume"):
            train(config_of(place, output), resume=True)


def test_a_half_written_checkpoint_is_passed_over(place, whole_run, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole_run, output)
    assert last_checkpoint(output).name == "checkpoint-6"
    weights = output / "checkpoint-6/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert last_checkpoint(output).name == "checkpoint-3"
    (output / "checkpoint-3/trainer_state.json").unlink()
    assert last_checkpoint(output) is None


def test_resume_with_another_config_is_refused(place, whole_run):
    with pytest.raises(ValueError, match=r"learning_rate was 0\.003, is 0\.5"):
        train(config_of(place, whole_run, learning_rate=0.5), resume=True)


def test_sigkill_loses_at_most_the_work_since_the_last_checkpoint(place, whole_run, tmp_path):
    output = tmp_path / "killed"
    config = config_of(place, output, max_steps=200, save_steps=2, save_total_limit=3)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mlpool.cli", "train", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-4").is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = int(last_checkpoint(output).name.partition("-")[2])
    assert reached >= 2
    steps = reached + 2
    # The schedule depends on max_steps, so the whole run is made with the same.
    config["max_steps"] = 200
    stop = {"max_steps": 200, "save_steps": 2, "save_total_limit": 3}
    assert {name: config[name] for name in stop} == stop
    train_for(config, steps, resume=True)
    other = {**config, "output_dir": str(tmp_path / "other")}
    train_for(other, steps, resume=False)
    assert losses(output) == pytest.approx(losses(tmp_path / "other"), abs=1e-6)
    same_weights(output / f"checkpoint-{steps}", tmp_path / f"other/checkpoint-{steps}", 1e-6)


def train_for(config: dict, steps: int, resume: bool) -> None:
    """Train until a step and stop there, as an interrupt would."""
    from transformers import TrainerCallback

    from mlpool.training import train as module

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step >= steps:
                control.should_save = control.should_training_stop = True

    class Stopped(module.EmbedderTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.add_callback(Stop())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EmbedderTrainer", Stopped)
        train(config, resume=resume)


# --- several processes ------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def launch(config: Path, *words: str) -> None:
    """Two gloo processes."""
    worker = str(Path(__file__).with_name("train_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", worker]
    done = subprocess.run([*command, str(config), *words], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(place, tmp_path, kind):
    shared = {"lora": None, "loss": {"mini_batch_tokens": 64, "gather_across_devices": True}, "max_steps": 3}
    if kind == "fsdp2":
        shared["lora"] = {"rank": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    shared |= {"save_steps": 2, "batch_sampler": "batch_sampler", "max_grad_norm": 0.0}
    config = config_of(place, tmp_path / "two", per_device_train_batch_size=4, **shared)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    launch(tmp_path / "two.yaml", kind)
    one = config_of(place, tmp_path / "one", per_device_train_batch_size=8, **shared)
    one["loss"] = {"mini_batch_tokens": 64}
    train(one)
    same_weights(tmp_path / "two", tmp_path / "one", 2e-4)
    # The first process logs the mean over both.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    if kind == "fsdp2":
        # Sharded weights and states come back: from step 2, the third is the same again.
        shutil.copytree(tmp_path / "two/checkpoint-2", tmp_path / "again/checkpoint-2")
        config["output_dir"] = str(tmp_path / "again")
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
        launch(tmp_path / "again.yaml", kind, "--resume")
        same_weights(tmp_path / "again", tmp_path / "two", 1e-6)
