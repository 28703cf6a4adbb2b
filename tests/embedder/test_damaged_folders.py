"""Saved folders that are missing a file, damaged, edited or hostile: named, and nothing outside of them is touched."""

import json
import shutil
from pathlib import Path

import pytest
import saved_folders
import tiny
import torch
from saved_folders import change, close
from tiny import TEXTS

from mlpool.embedder import load

saved, adapter = saved_folders.saved, saved_folders.adapter
copy, adapter_copy = saved_folders.copy, saved_folders.adapter_copy


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
