"""Several sources in whole runs: killed behind the first epoch and resumed, by one process and by two, they make the
batches and end at the weights of a run that nobody disturbed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

pytest.importorskip("datasets")

import runs
from runs import config_of, same_weights, together

place = runs.place  # its tiny base and 40 triplets
WORLD = 2
STEPS, SAVED, KILLED = 10, 8, 9  # an epoch has 7


def sources_of(folder: Path, **options) -> dict:
    """24 triplets, and 16 pairs that are drawn twice an epoch under prompts of their own."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    (folder / "rich.jsonl").write_text("\n".join(map(json.dumps, rows[:24])))
    poor = [{"query": row["query"], "positive": row["positive"]} for row in rows[24:]]
    (folder / "poor.jsonl").write_text("\n".join(map(json.dumps, poor)))
    sources = [
        {"source": str(folder / "rich.jsonl"), "name": "rich"},
        {"source": str(folder / "poor.jsonl"), "name": "poor", "weight": 2, "prompts": {"query": "w7 w8 "}},
    ]
    return {"train": sources, "cache_dir": str(folder / "cache"), **options}


def work(rank: int, config: dict, seen: str, kill: int | None) -> None:
    """Train as one of several processes; what it is trained on is written to `seen`, a line a batch."""
    from mlpool.training import train as module

    class Watched(module.EmbedderTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            ids, masks = inputs["anchor_input_ids"], inputs["anchor_attention_mask"].bool()
            texts = [row[mask].tolist() for row, mask in zip(ids, masks, strict=True)]
            with open(f"{seen}-{rank}", "a") as file:
                print(json.dumps([self.state.global_step + 1, texts]), file=file)
            if self.state.global_step + 1 == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().compute_loss(model, inputs, *args, **kwargs)

    module.EmbedderTrainer = Watched
    module.train(config, resume=Path(config["output_dir"]).exists())


def run(config: dict, world: int = 1, kill: int | None = None) -> list[tuple[int, list]]:
    """Train in processes of their own; what each step was trained on, in the order of processes."""
    seen = f"{config['output_dir']}-{'killed' if kill else 'seen'}"
    for part in together(work, config, seen, kill, world=world):
        assert part.exitcode == (-signal.SIGKILL if kill else 0), f"ended with {part.exitcode}"
    of_each = [map(json.loads, Path(f"{seen}-{rank}").read_text().splitlines()) for rank in range(world)]
    return [(lots[0][0], [text for _, texts in lots for text in texts]) for lots in zip(*of_each, strict=True)]


@pytest.fixture(scope="module")
def one_source(place):
    """The config of batches of one source, and how an undisturbed run of one process goes."""

    def config(name: str, size: int) -> dict:
        return config_of(
            place, place / name, data=sources_of(place, batches="one source"), per_device_train_batch_size=size,
            max_steps=STEPS, save_steps=SAVED, lora={"rank": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
            loss={"mini_batch_tokens": 64, "gather_across_devices": True}, max_grad_norm=0.0,
        )  # fmt: skip

    return config, run({**config("undisturbed", 8), "save_strategy": "no"})


def check_resumed(config: dict, world: int, undisturbed: list, tokens: Path) -> None:
    killed = run(config, world, KILLED)
    kept = {path: path.stat().st_mtime_ns for path in tokens.rglob("*.*")}
    assert kept
    assert (Path(config["output_dir"]) / f"checkpoint-{SAVED}").is_dir()
    resumed = run(config, world)
    assert killed == undisturbed[:KILLED]
    assert resumed == undisturbed[SAVED:]
    assert {path: path.stat().st_mtime_ns for path in tokens.rglob("*.*")} == kept  # tokenized once


def test_one_process_killed_and_resumed_ends_as_one_that_was_not(place, one_source):
    config, undisturbed = one_source
    # A text of the second source begins with its prompt; draws of 24 and 2 x 16 pairs.
    prompted = [all(text[:2] == [9, 10] for text in texts) for _, texts in undisturbed]
    assert prompted == [any(text[:2] == [9, 10] for text in texts) for _, texts in undisturbed]
    assert sum(prompted[:7]) == 4
    assert undisturbed[:3] != undisturbed[7:]
    check_resumed(config("one", 8), 1, undisturbed, place / "cache/mlpool-tokens")
    same_weights(place / "one", place / "undisturbed")


def test_two_processes_share_the_order_of_one_and_resume_in_it(place, one_source):
    config, undisturbed = one_source
    check_resumed(config("two", 4), WORLD, undisturbed, place / "cache/mlpool-tokens")
    same_weights(place / "two", place / "undisturbed", 2e-4)
    history = json.loads((place / "two/trainer_state.json").read_text())["log_history"]
    assert [entry["computed_per_token"] for entry in history] == [1.0] * len(history)


def test_mixed_batches_resume_in_a_later_epoch(place):
    """Of a sampler whose order is its generator's, which a resumed run begins anew (accelerate's own is of epochs)."""

    def config(name: str) -> dict:
        data = sources_of(place, num_negatives=0, temperature=2.0)
        return config_of(
            place, place / f"mixed-{name}", data=data, batch_sampler="batch_sampler", packing="never",
            max_steps=STEPS, save_steps=SAVED, accelerator_config={"use_seedable_sampler": False},
        )  # fmt: skip

    undisturbed = run(config("whole"))
    mixed = [sum(text[:2] == [9, 10] for text in texts) for _, texts in undisturbed]
    assert all(0 < n < 8 for n in mixed)
    shutil.copytree(place / "mixed-whole/checkpoint-8", place / "mixed-again/checkpoint-8")
    assert run(config("again")) == undisturbed[SAVED:]
    same_weights(place / "mixed-again", place / "mixed-whole")
    history = json.loads((place / "mixed-whole/trainer_state.json").read_text())["log_history"]
    assert all(entry["computed_per_token"] > 1 for entry in history)
