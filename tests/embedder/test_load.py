"""Loading: what is missing, damaged, moved or does not belong is named; plain sentence-transformers gives the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny import DESIGNS, TEXTS

import mlpool
from mlpool import cli
from mlpool.embedder import add_lora, load
from mlpool.embedder.adapters import fingerprint, same_base

LORA = {"rank": 2, "dropout": 0.0}


def close(got, expected, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), atol=atol, rtol=0)


def change(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.embedder().save(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter on a base of its own, model beside base."""
    root = tmp_path_factory.mktemp("adapter")
    shutil.copytree(tiny.base("llama"), root / "base")
    embedder = add_lora(load(root / "base", "multi-layer-bidirectional", tiny.SMALL), **LORA)
    tiny.shake(embedder[1])
    tiny.shake(embedder[0].model, 0.1, only="lora_B")
    embedder.save(root / "model")
    return root


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def adapter_copy(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter / "model", tmp_path / "adapter"))


# --- files ------------------------------------------------------------------------------------------------------------


FILES = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "backbone_config.json",
    "config_sentence_transformers.json",
    "1_Pooler/config.json",
    "1_Pooler/pool.safetensors",
]


def test_all_files_are_tested(saved):
    written = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert written == {*FILES, "README.md", "mlpool.json"}


@pytest.mark.parametrize("name", FILES)
def test_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"model lacks {name}, which was saved with it; copy the folder again"):
        load(copy)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("json")])
@pytest.mark.parametrize("broken", [b'{"design": ', b"\xff\xfe{}"])
def test_broken_json(copy, name, broken):
    (copy / name).write_bytes(broken)
    with pytest.raises(ValueError, match=f"model/{name} is not valid JSON"):
        load(copy)


def test_broken_manifest(copy):
    (copy / "mlpool.json").write_text("{")
    with pytest.raises(ValueError, match=r"model/mlpool\.json is not valid JSON"):
        load(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooler/pool.safetensors"])
def test_weights_that_are_cut_short_or_changed(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-100])
    with pytest.raises(ValueError, match=f"{name} has {len(data) - 100} bytes, {len(data)} were saved"):
        load(copy)
    (copy / name).write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    with pytest.raises(ValueError, match=f"{name} is damaged: its SHA-256 is not the one that was saved"):
        load(copy)
    (copy / name).write_bytes(data)
    load(copy)


def test_large_files_are_hashed_when_asked(copy, monkeypatch):
    from mlpool.embedder import folder

    monkeypatch.setattr(folder, "_READ_WHOLE", 100)
    path = copy / "1_Pooler/pool.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    load(copy)
    with pytest.raises(ValueError, match="SHA-256"):
        load(copy, verify=True)


def test_edited_text_files_are_fine(copy):
    (copy / "README.md").write_text("mine")
    config = json.loads((copy / "config_sentence_transformers.json").read_text())
    config["prompts"]["query"] = "Q: "
    (copy / "config_sentence_transformers.json").write_text(json.dumps(config))
    assert load(copy).prompts["query"] == "Q: "
    (copy / "README.md").unlink()
    load(copy)


def test_without_a_manifest(copy):
    """As from the Hub: the files themselves still tell."""
    (copy / "mlpool.json").unlink()
    close(load(copy).encode(TEXTS), tiny.embedder().encode(TEXTS))
    change(copy / "1_Pooler/config.json", b"MultiLayerPool", b"MultiLayerPond")
    with pytest.raises(ValueError, match=r"1_Pooler/config\.json: there is no pool 'MultiLayerPond'"):
        load(copy)
    change(copy / "1_Pooler/config.json", b"MultiLayerPond", b"LastLayerPool")
    with pytest.raises((ValueError, TypeError)):
        load(copy)
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:999])
    with pytest.raises(ValueError, match=r"model/model\.safetensors cannot be read, is it cut short\?"):
        load(copy)
    (copy / "modules.json").write_text("[")
    with pytest.raises(ValueError, match=r"modules\.json is not valid JSON"):
        load(copy)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"])
def test_missing_file_of_an_adapter(adapter_copy, name):
    (adapter_copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"adapter lacks {name}"):
        load(adapter_copy)


def test_base_model_with_a_damaged_file(tmp_path):
    base = Path(shutil.copytree(tiny.base(), tmp_path / "base"))
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"base/model\.safetensors cannot be read, is it cut short\?"):
        load(base, 1)
    (base / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(base, 1)
    (base / "config.json").write_text("{")
    with pytest.raises(OSError, match="config"):
        load(base, 1)


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
import mlpool, mlpool.cli
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


# --- hostile and damaged folders --------------------------------------------------------------------------------------

OUTSIDE = ["../secret", "1_Pooler/../../secret", "{absolute}", "out/secret", "", ".", "a\0b", "a\\b", "C:/x", 7, None]


@pytest.fixture
def secret(copy) -> Path:
    """A file beside the folder, and a link in the folder that leads there."""
    (copy.parent / "secret").write_text("mine")
    (copy / "out").symlink_to("..")
    return copy.parent / "secret"


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_outside_of_the_folder_are_refused(copy, secret, name):
    """Loading deleted `../secret`, which the manifest names and the save does not, and replaced what the save names."""
    name = str(secret) if name == "{absolute}" else name
    prepared = copy / ".mlpool-saved"
    prepared.mkdir()
    (prepared / ".files").write_text('["README.md"]')
    before = {path: path.read_bytes() for path in copy.parent.rglob("*") if path.is_file()}
    if isinstance(name, str):
        manifest = json.loads((copy / "mlpool.json").read_text())
        manifest["files"][name] = {"bytes": 4}
        (copy / "mlpool.json").write_text(json.dumps(manifest))
        before[copy / "mlpool.json"] = (copy / "mlpool.json").read_bytes()
        for act in (load, tiny.embedder("eos-causal").save):
            with pytest.raises(ValueError, match=r"mlpool\.json names the file .*expected a name inside"):
                act(copy)
        shutil.copy(tiny.base() / "config.json", copy / "mlpool.json")  # a manifest without files
        before[copy / "mlpool.json"] = (copy / "mlpool.json").read_bytes()
    (prepared / ".files").write_text(json.dumps(["README.md", name]))
    before[prepared / ".files"] = (prepared / ".files").read_bytes()
    with pytest.raises(ValueError, match=r"\.files names the file .*expected a name inside"):
        load(copy)
    assert {path: path.read_bytes() for path in copy.parent.rglob("*") if path.is_file()} == before


def test_a_saved_folder_that_is_a_link_is_refused(copy, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".files").write_text('["stolen"]')
    (elsewhere / "stolen").write_text("theirs")
    (copy / ".mlpool-saved").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="is a link, expected a folder that a save left"):
        load(copy)
    assert (elsewhere / "stolen").is_file()


@pytest.mark.parametrize("path", ["../elsewhere", "/tmp", "out", 3])
def test_modules_outside_of_the_folder(copy, secret, path):
    modules = json.loads((copy / "modules.json").read_text())
    modules[1]["path"] = path
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules\.json (names the file|has a module without path)"):
        load(copy)


def test_an_index_of_weights_outside_of_the_folder(tmp_path):
    base = Path(shutil.copytree(tiny.base(), tmp_path / "base"))
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ValueError, match=r"index\.json names the file '\.\./x\.safetensors'"):
        load(base, 1)


@pytest.mark.parametrize("broken", ["[]", "null", "3", '{"files": 3}', '{"files": {"a": []}}', '{"files": [1]}'])
def test_manifests_of_another_kind(copy, broken):
    (copy / "mlpool.json").write_text(broken)
    with pytest.raises(ValueError, match=r"mlpool\.json.*expected"):
        load(copy)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [("backbone_config.json", {"max_seq_length": "a"}, "max_seq_length is 'a', expected an integer"),
     ("backbone_config.json", {"max_seq_length": 0}, "max_seq_length must be an integer of at least 1, got 0"),
     ("backbone_config.json", {"appendeos": True}, "unknown key 'appendeos'; nearest: append_eos"),
     ("backbone_config.json", {"append_eos": [1]}, r"append_eos is \[1\], expected"),
     ("backbone_config.json", {"design": None}, "design is None, expected a string"),
     ("1_Pooler/config.json", {"gain": 1}, "unknown key 'gain'"),
     ("1_Pooler/config.json", {"residual": "no"}, 'residual must be "mix", True or False'),
     ("1_Pooler/config.json", {"choices": [1]}, r"choices must be a dict such as .*, got \[1\]"),
     ("config_sentence_transformers.json", {"prompts": ["a"]}, "prompts is .*, expected")],
)  # fmt: skip
def test_entries_that_do_not_fit(copy, file, changes, message):
    path = copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        load(copy)


@pytest.mark.parametrize("file", ["backbone_config.json", "1_Pooler/config.json", "modules.json"])
@pytest.mark.parametrize("content", ["[]", "null", "[" * 9999, '{"a": ' + "9" * 5000 + "}"])
def test_json_of_another_kind(copy, file, content):
    (copy / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file}|is a base model itself|no design was given"):
        load(copy)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(saved, tmp_path, value):
    broken = load(saved)
    weight = broken[0].model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] = value
    name = "NaN" if value != value else "infinity"
    with pytest.raises(RuntimeError, match=rf"^not saved: the weight .*layers\.1\.mlp\.up_proj\.weight holds {name}"):
        broken.save(tmp_path / "m")
    base = tmp_path / "base"
    shutil.copytree(tiny.base(), base)
    broken[0].model.save_pretrained(base)
    with pytest.raises(ValueError, match=rf"base cannot be used: the weight .*layers\.1\.mlp\.up_proj.* holds {name}"):
        load(base, "multi-layer-bidirectional")


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
