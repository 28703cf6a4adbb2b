"""Loading: what is missing, damaged, moved or does not belong is named; plain sentence-transformers gives the same."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import saved_folders
import tiny
import torch
from saved_folders import LORA, change, close
from tiny import DESIGNS, TEXTS

import mlpool
from mlpool import cli
from mlpool.embedder import add_lora, load
from mlpool.embedder.adapters import fingerprint, same_base

adapter, saved = saved_folders.adapter, saved_folders.saved


# --- adapters and their base ------------------------------------------------------------------------------------------


def test_base_that_moved(adapter, tmp_path):
    expected = load(adapter / "model").encode(TEXTS)
    shutil.copytree(adapter, tmp_path / "there")
    config = tmp_path / "there/model/adapter_config.json"
    change(config, str(adapter).encode(), b"/nowhere")
    folder = tmp_path / "there/model"
    with pytest.raises(FileNotFoundError, match=r"model is an adapter for the base model at /nowhere/base.*pass base="):
        load(folder)
    close(load(folder, base=tmp_path / "there/base").encode(TEXTS), expected)
    again = load(folder, base=tmp_path / "there/base")
    again.save(tmp_path / "again")  # which remembers the new place
    close(load(tmp_path / "again").encode(TEXTS), expected)


def test_another_base(adapter, tmp_path):
    other = tmp_path / "other"
    model = tiny.transformer("llama")
    with torch.no_grad():  # a fine-tuned base, not another architecture
        model.layers[2].mlp.up_proj.weight.add_(3e-3)
    model.save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    with pytest.raises(
        ValueError, match=r"model holds an adapter for another base model: the weights of .*other are not"
    ):
        load(adapter / "model", base=other)
    with pytest.raises(ValueError, match="adapter for another base model"):
        load(adapter / "model", base=tiny.base("qwen2"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fingerprint_is_the_same_in_every_precision(dtype):
    model = tiny.transformer("llama")
    exact = fingerprint(model)
    assert same_base(fingerprint(model.to(dtype)), exact)
    assert same_base(exact, fingerprint(model.float()))
    assert not same_base(exact, fingerprint(tiny.transformer("qwen2")))
    assert not same_base(exact, fingerprint(tiny.transformer("llama", intermediate_size=64)))
    assert same_base(exact, fingerprint(add_lora(tiny.embedder(family="llama"), **LORA)[0].model))


def test_base_for_what_is_no_adapter(saved):
    with pytest.raises(ValueError, match="is for saved adapters"):
        load(tiny.base(), 1, base=tiny.base())


def test_adapter_keeps_the_direction_of_its_attention(adapter):
    assert mlpool.is_bidirectional(load(adapter / "model")[0].model)
    from transformers import AutoModel

    assert not mlpool.is_bidirectional(AutoModel.from_pretrained(adapter / "base"))


def test_add_and_merge_are_refused_where_they_make_no_sense(adapter):
    embedder = load(adapter / "model")
    with pytest.raises(ValueError, match=r"has an adapter already; merge\(embedder\) it"):
        add_lora(embedder)
    mlpool.merge(embedder)
    with pytest.raises(ValueError, match="no adapter to merge: this embedder holds full weights"):
        mlpool.merge(embedder)
    add_lora(embedder)


def test_papers_targets(adapter):
    embedder = add_lora(tiny.embedder(family="llama"))
    config = embedder[0].model.peft_config["default"]
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.1)


def test_adapter_of_a_hub_model(tmp_path, monkeypatch):
    """A cache laid out as the Hub's stands in for it: the commit is kept with the adapter, the cache with the model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "cache/models--org--tiny", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny.base("llama"), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    embedder = add_lora(
        load("org/tiny", "eos-causal", cache_folder=str(tmp_path / "cache"), local_files_only=True), **LORA
    )
    tiny.shake(embedder[0].model, 0.1, only="lora_B")
    assert embedder.model_card_data.base_model == "org/tiny"
    embedder.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["revision"] == commit
    (repo / "refs/main").write_text("f" * 40)  # the model was changed under its name
    again = load(tmp_path / "adapter", cache_folder=str(tmp_path / "cache"), local_files_only=True)
    close(again.encode(TEXTS), embedder.encode(TEXTS))


# --- options and places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"pooler": "paper"},
        {"layers": [1]},
        {"append_eos": False},
        {"include_prompt": False},
        {"include_bos": False},
        {"sliding_window": "full"},
    ],
)
def test_what_a_saved_embedder_has_decided(saved, options):
    with pytest.raises(ValueError, match=f"is a saved embedder, which has decided {next(iter(options))}; leave it out"):
        load(saved, **options)


def test_what_can_be_chosen_anew(saved):
    embedder = load(
        saved, 5, packing="never", max_seq_length=9, prompts={"query": "Q: "}, dtype=torch.float64,
        attn_implementation="eager", verify=True,
    )  # fmt: skip
    assert (embedder[0].packing, embedder.max_seq_length, embedder.prompts["query"]) == ("never", 9, "Q: ")
    assert (embedder.dtype, embedder[0].attn_implementation) == (torch.float64, "eager")
    assert not embedder[0].packed
    embedder.encode(TEXTS)
    assert not embedder[0].packed
    with pytest.raises(ValueError, match="packing must be one of"):
        load(saved, packing="sometimes")


def test_another_design(saved):
    with pytest.raises(ValueError, match="was saved as multi-layer-bidirectional, not as eos-causal; leave design out"):
        load(saved, "eos-causal")
    with pytest.raises(ValueError, match="there is no design 'eos'"):
        load(saved, "eos")


def test_paths_that_are_wrong(saved, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no folder .*/modle \(near it: model\)$"):
        load(saved.parent / "modle")
    with pytest.raises(FileNotFoundError, match=r"no folder \./nothing$"):
        load("./nothing")
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file; pass the folder of a model, or a Hub name"):
        load(saved / "config.json")
    monkeypatch.chdir(saved.parent.parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    relative = f"{saved.parent.name}/modle"
    with pytest.raises(
        FileNotFoundError, match=rf"^{relative} is no folder here \(near it: model\) and no model in the"
    ):
        load(relative, 5)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises((OSError, ValueError), match="empty"):
        load(empty, 5)


def test_home_folder(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load("~/model")[0].design == "multi-layer-bidirectional"


def test_sentence_transformers_folder_as_base(tmp_path):
    """A model of sentence-transformers: its transformer is the base, its limit of tokens the limit."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    plain = SentenceTransformer(
        modules=[Transformer(str(tiny.base("bert")), max_seq_length=20), Pooling(tiny.D, "mean")]
    )
    plain.save(str(tmp_path / "st"))
    embedder = load(tmp_path / "st", "mean-bidirectional")
    close(embedder.encode(TEXTS[:3]), plain.encode(TEXTS[:3], normalize_embeddings=True), 1e-5)
    assert embedder.max_seq_length == plain.max_seq_length == 20
    long = "a b c d e f g h i j k l m n o p"
    close(embedder.encode(long), plain.encode(long, normalize_embeddings=True), 1e-5)
    assert embedder[0].truncated.count == 1


# --- plain sentence-transformers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["multi-layer-bidirectional", "eos-causal"])
@pytest.mark.parametrize("lora", [True, False])
def test_plain_sentence_transformers(design, lora, tmp_path):
    from sentence_transformers import SentenceTransformer

    embedder = tiny.embedder(design, prompts={"query": "Q: "})
    if lora:
        tiny.shake(add_lora(embedder, **LORA)[0].model, 0.1, only="lora_B")
    embedder.save(tmp_path / "m")
    plain = SentenceTransformer(str(tmp_path / "m"), trust_remote_code=True)
    assert type(plain) is SentenceTransformer
    close(plain.encode(TEXTS), embedder.encode(TEXTS), 1e-5)
    close(plain.encode_query(TEXTS), embedder.encode_query(TEXTS), 1e-5)
    assert mlpool.is_bidirectional(plain[0].model) == (DESIGNS[design].attention == "bidirectional")
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path / "m"))
    (tmp_path / "m/1_Pooler/pool.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1_Pooler"):
        SentenceTransformer(str(tmp_path / "m"), trust_remote_code=True)


# --- what must not be needed ------------------------------------------------------------------------------------------


def test_import_needs_torch_alone(tmp_path):
    (tmp_path / "x.txt").write_text("a text")
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "sentence_transformers", "safetensors", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import mlpool, mlpool.attention, mlpool.cli
assert mlpool.MultiLayerPool(8, 2)
for name in ("load", "DESIGNS", "pack"):
    try:
        getattr(mlpool, name)
    except ModuleNotFoundError as error:
        print(error)
try:
    mlpool.lode
except AttributeError as error:
    print(error)
print(mlpool.cli.main(["encode", "x.txt", "-o", "y", "-m", "."]))
"""
    env = {**os.environ}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("mlpool.load needs ")
    assert lines[0].endswith(": pip install 'mlpool[st]'")
    assert lines[1].startswith("mlpool.DESIGNS needs ")
    assert lines[-2:] == ["module 'mlpool' has no attribute 'lode'", "2"]
    assert done.stderr.startswith("mlpool: error: ")
    assert done.stderr.count("\n") == 1


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_help(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"mlpool {mlpool.__version__}\n"


@pytest.mark.parametrize(("words", "message"), [(["encoed"], "invalid choice: 'encoed'"), ([], "required: command")])
def test_unknown_command(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a wrong value"), 2),
        (FileNotFoundError("no such thing"), 2),
        (PermissionError(13, "not yours"), 2),
        (ModuleNotFoundError("pip install it"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_of_a_command(error, status, monkeypatch, capsys):
    class Command:
        @staticmethod
        def add_arguments(parser):
            parser.add_argument("--n", type=int)

        @staticmethod
        def run(args):
            if args.n is None:
                raise error
            return args.n

    monkeypatch.setattr(cli, "_find", lambda _: Command)
    assert cli.main(["encode"]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (f"mlpool: error: {error}\n" if status == 2 else "mlpool: stopped\n")
    assert cli.main(["encode", "--n", "0"]) == 0
    with pytest.raises(SystemExit) as end:
        cli.main(["encode", "--n", "x"])
    assert end.value.code == 2


def test_a_fault_keeps_its_traceback(monkeypatch):
    def fault(_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(cli, "_find", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["encode"])


# --- names of nothing -------------------------------------------------------------------------------------------------


def test_a_missing_name_says_at_once_what_was_asked(monkeypatch, tmp_path):
    """It took half a minute of trying each file again, and then was about a design."""
    import huggingface_hub

    asked = []

    def model_info(self, name, **options):
        asked.append(name)
        raise RuntimeError("Repository not found\nmore")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "missing-names").mkdir()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    told = r"missing-name is no folder here \(near it: missing-names\) and no model "
    with pytest.raises(
        FileNotFoundError, match=told + r"on the Hub, which was asked \(https.*\): Repository not found$"
    ):
        load("missing-name")
    assert asked == ["missing-name"]
    with pytest.raises(FileNotFoundError, match=told + r"in the Hub's cache; the Hub itself was not asked \(local_f"):
        load("missing-name", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"was not asked \(HF_HUB_OFFLINE is set\)"):
        load("missing-name", 5)
    assert asked == ["missing-name"]


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_fingerprint_is_kept_but_not_shown(adapter):
    card, shown = (adapter / "model/README.md").read_text(), str(load(adapter / "model"))
    kept = json.loads((adapter / "model/backbone_config.json").read_text())["base_fingerprint"]
    assert len(kept) > 500
    assert "base_fingerprint" not in card + shown
    assert "'design': 'multi-layer-bidirectional'" in shown
    assert "\n- **Base model:** base (a folder)\n" in card
    assert "Unknown](https://huggingface.co/unknown)" not in card
