"""The example that makes the tiny decoder, at minute size: it learns, it repeats, its folder loads anywhere."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "examples/tiny_decoder.py"
SMALL = {"vocabulary": 400, "hidden": 32, "layers": 2, "length": 32, "batch": 8, "rate": 1e-2, "precision": "float32"}


def make(data: Path, out: Path, *options: str) -> dict:
    """Run the script, in this process to save the imports; -> training.json."""
    with pytest.MonkeyPatch.context() as patch:
        small = [f"--{name}={value}" for name, value in SMALL.items()]
        patch.setattr(sys, "argv", [str(SCRIPT), "--data", str(data), "-o", str(out), *small, *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return json.loads((out / "training.json").read_text())


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of one grammar: what comes next can be learned in seconds."""
    words = random.Random(0)
    parts = ("the a one", "old small grey", "dog cat ship king", "saw left found", "the a one", "garden river house")
    folder = tmp_path_factory.mktemp("prose")
    for split, count in (("train", 200), ("valid", 40)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(count):
                sentences = (" ".join(words.choice(part.split()) for part in parts) for _ in range(8))
                file.write(json.dumps({"text": ". ".join(sentences) + "."}) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("made") / "decoder"
    return folder, make(prose, folder, "--steps", "60")


def test_folder_loads_and_has_learned(made: tuple[Path, dict], prose: Path):
    folder, about = made
    assert about["steps"] == 60
    assert 50 * 8 * 32 < about["tokens"] <= 60 * 8 * 32  # the last step of an epoch may be short
    assert about["perplexity_untrained"] > 100
    assert 2 < about["perplexity"] < 10  # the grammar leaves 2.5 open
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert AutoModel.from_pretrained(folder).config.model_type == "qwen2"
    # The perplexity once more from the saved weights, text by text and without packing: near the script's.
    texts = [json.loads(line)["text"] for line in (prose / "valid.jsonl").open()]
    losses = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True)["input_ids"]
            losses.append(model(input_ids=ids, labels=ids).loss)
    assert torch.stack(losses).mean().exp().item() == pytest.approx(about["perplexity"], rel=0.3)


def test_tokenizer_is_like_qwen2s(made: tuple[Path, dict]):
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 32
    text = "The naïve dog's 12 ships, 你好\n 🙂"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.eos_token_id not in ids  # none appended
    assert tokenizer.decode(ids) == text  # bytes: nothing is unknown
    assert tokenizer("the dog<|endoftext|>")["input_ids"][-1] == tokenizer.eos_token_id


def test_seed_decides(made: tuple[Path, dict], prose: Path, tmp_path: Path):
    folder, about = made
    again = make(prose, tmp_path / "again", "--steps", "60")
    other = make(prose, tmp_path / "other", "--steps", "60", "--seed", "1")
    assert again["perplexity"] == about["perplexity"] != other["perplexity"]
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_ends_with_the_clock(prose: Path, tmp_path: Path):
    about = make(prose, tmp_path / "clock", "--minutes", "0.1")
    assert about["steps"] > 0
    assert 2 < about["seconds_in_all"] < 6


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", r'no .*train\.jsonl: expected .*\{"text"'),
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2 is .*txt"),
        ('{"text": "a"}\n{"text": "b\n', "line 2 is"),
        ('{"text": 3}\n', "line 1 is"),
    ],
)
def test_wrong_data_is_named(tmp_path: Path, lines: str, message: str):
    if lines:
        (tmp_path / "train.jsonl").write_text(lines)
    with pytest.raises(SystemExit, match=message):
        make(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_said(tmp_path: Path):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a few words"}\n')
    with pytest.raises(SystemExit, match="do not fill one row"):
        make(tmp_path, tmp_path / "out")
