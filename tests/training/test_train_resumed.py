"""`mlpool train` that goes on: finished, killed or cut short runs; and two processes under DDP and FSDP2."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets")

import runs
from runs import SERVER, config_of, losses, same_weights, together

from mlpool.training.train import train
from mlpool.training.trainer import last_checkpoint

place, whole_run = runs.place, runs.whole_run  # its tiny base and 40 triplets, and a training of it


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
    process = SERVER.Process(target=train, args=(config,))
    process.start()
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-4").is_dir():
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    reached = int(last_checkpoint(output).name.partition("-")[2])
    assert reached >= 2
    steps = reached + 2
    # The schedule depends on max_steps, so the whole run is made with the same.
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


def train_worker(rank: int, config: dict, kind: str, resume: bool) -> None:
    if kind == "fsdp2":
        shard_on_the_cpu()
    train(config, resume=resume)


def shard_on_the_cpu() -> None:
    """What configs/accelerate/fsdp2.yaml says, as accelerate launch would put it, for processes without a GPU.

    accelerate offers FSDP to accelerators alone, so the processes are declared to be such; torch's FSDP2 runs on CPUs.
    """
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
        FSDP_OFFLOAD_PARAMS="false",
    )
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    # Declared an accelerator, the CPU has a number, and torch 2.11 saves it as "cpu:0", which it cannot read.
    torch.serialization.register_package(0, lambda _: None, lambda storage, at: storage if at == "cpu:0" else None)

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def train_two(config: dict, kind: str, resume: bool = False) -> None:
    assert [part.exitcode for part in together(train_worker, config, kind, resume)] == [0, 0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(place, tmp_path, kind):
    shared = {"lora": None, "loss": {"mini_batch_tokens": 64, "gather_across_devices": True}, "max_steps": 3}
    if kind == "fsdp2":
        shared["lora"] = {"rank": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    shared |= {"save_steps": 2, "batch_sampler": "batch_sampler", "max_grad_norm": 0.0}
    config = config_of(place, tmp_path / "two", per_device_train_batch_size=4, **shared)
    train_two(config, kind)
    one = config_of(place, tmp_path / "one", per_device_train_batch_size=8, **shared)
    one["loss"] = {"mini_batch_tokens": 64}
    train(one)
    same_weights(tmp_path / "two", tmp_path / "one", 2e-4)
    # The first process logs the mean over both.
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    if kind == "fsdp2":
        # Sharded weights and states come back: from step 2, the third is the same again.
        shutil.copytree(tmp_path / "two/checkpoint-2", tmp_path / "again/checkpoint-2")
        train_two({**config, "output_dir": str(tmp_path / "again")}, kind, resume=True)
        same_weights(tmp_path / "again", tmp_path / "two", 1e-6)
