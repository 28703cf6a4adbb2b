"""Configs of `mlpool train`: what they may hold, and what is said of the others before anything is trained."""

import json
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("datasets")

import runs
from runs import config_of

from mlpool.training.config import read_config
from mlpool.training.train import train, training_arguments

place = runs.place  # its tiny base and 40 triplets
ROOT = Path(__file__).resolve().parents[2]


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
