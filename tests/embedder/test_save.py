"""Saving: what is written is loaded and compared before it replaces anything, and nothing that was there is lost."""

import copy
import json
import os
import signal
from pathlib import Path

import pytest
import tiny
import torch
from tiny import DESIGNS, TEXTS

import mlpool
from mlpool.embedder import add_lora, load, merge
from mlpool.embedder import embedder as embedder_module
from mlpool.embedder import saved as saved_module
from mlpool.embedder.backbone import Backbone
from mlpool.embedder.folder import check_folder, recover, staged, write_manifest
from mlpool.embedder.pooler import Pooler

SHAKE = 0.05


def with_lora(design: str = "multi-layer-bidirectional", family: str = "qwen2", **options):
    embedder = add_lora(tiny.embedder(design, family, **options))
    tiny.shake(embedder[0].model, SHAKE, only="lora_B")
    return embedder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def close(got, expected, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(got).float(), torch.as_tensor(expected).float(), atol=atol, rtol=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A saved embedder; copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.embedder(prompts={"query": "Q: "}).save(folder)
    return folder


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["multi-layer-causal", "multi-layer-bidirectional", "mean-bidirectional"])
def test_full_adapter_and_merged(design, tmp_path):
    """And again from what was loaded; test_fresh_process.py has every design in each of the forms."""
    embedder = with_lora(design)
    expected = embedder.encode(TEXTS)
    assert abs(expected - tiny.embedder(design).encode(TEXTS)).max() > 1e-3
    embedder.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    again = load(tmp_path / "adapter")
    close(again.encode(TEXTS), expected)
    assert mlpool.is_bidirectional(again[0].model) == (DESIGNS[design].attention == "bidirectional")
    again.save(tmp_path / "adapter-2")  # from one that was loaded
    close(load(tmp_path / "adapter-2").encode(TEXTS), expected)
    merge(again).save(tmp_path / "full")
    assert (tmp_path / "full/model.safetensors").exists()
    full = load(tmp_path / "full")
    close(full.encode(TEXTS), expected, 1e-5)
    assert type(full) is mlpool.Embedder
    assert full[0].design == design


@pytest.mark.parametrize(("family", "design"), [("gpt2", 5), ("opt", 3), ("bert", 5), ("llama", 1)])
def test_other_families(family, design, tmp_path):
    name = list(DESIGNS)[design - 1]
    embedder = with_lora(name, family)
    expected = embedder.encode(TEXTS)
    embedder.save(tmp_path / "a")
    close(load(tmp_path / "a").encode(TEXTS), expected)
    merge(embedder).save(tmp_path / "b")
    close(load(tmp_path / "b").encode(TEXTS), expected, 1e-5)


def test_settings_come_back(tmp_path):
    options = {
        "prompts": {"query": "Q: ", "sts": "compare: "}, "max_seq_length": 33, "include_prompt": False,
        "layers": [1, 3], "include_bos": False, "packing": "never", "append_eos": False, "frame": "both",
    }  # fmt: skip
    embedder = tiny.embedder(**options)
    embedder.default_prompt_name, embedder.similarity_fn_name, embedder.truncate_dim = "sts", "dot", 8
    embedder.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.prompts == {"query": "Q: ", "sts": "compare: ", "document": ""}
    assert (again.default_prompt_name, again.similarity_fn_name, again.truncate_dim) == ("sts", "dot", 8)
    assert again.max_seq_length == 33
    assert again[0].get_config_dict() == embedder[0].get_config_dict()
    assert again[0].layers == again[1].pool.layers == [1, 3]
    assert again[1].pool.config() == embedder[1].pool.config()
    close(again.encode(TEXTS), embedder.encode(TEXTS))
    close(again.encode_query(TEXTS), embedder.encode_query(TEXTS))


def test_tokenizer_that_was_set_comes_back(tmp_path):
    embedder = tiny.embedder()
    embedder.tokenizer = tiny.tokenizer("both", pad_token="<pad>", padding_side="left")
    embedder.save(tmp_path / "m")
    close(load(tmp_path / "m").encode(TEXTS), embedder.encode(TEXTS))
    assert load(tmp_path / "m")[0].texts.prefix == [tiny.BOS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_pooler_in_full(dtype, tmp_path):
    embedder = tiny.embedder(base_dtype=dtype)
    embedder[1].float()
    embedder.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert {p.dtype for p in again.parameters()} == {dtype}  # sentence-transformers loads all modules in the first's
    close(again.encode(TEXTS), embedder.encode(TEXTS), 3e-2 if dtype == torch.bfloat16 else 4e-3)
    assert load(tmp_path / "m", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_in_half_precision_fits_its_base_in_any(dtype, tmp_path):
    embedder = load(tiny.base(), "mean-bidirectional", dtype=dtype)
    tiny.shake(add_lora(embedder)[0].model, SHAKE, only="lora_B")
    embedder.save(tmp_path / "m")
    for other in (torch.float32, torch.bfloat16, torch.float16):
        close(load(tmp_path / "m", dtype=other).encode(TEXTS), embedder.encode(TEXTS), 5e-2)


def test_attention_backend_is_kept_while_verifying(tmp_path):
    embedder = with_lora(attn_implementation="eager")
    seen = []
    load_again = saved_module.reload
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_module, "reload", lambda *a, **k: seen.append(load_again(*a, **k)) or seen[-1])
        embedder.save(tmp_path / "m")
    assert seen[0][0].attn_implementation == "eager"


def test_trainable_after_loading_and_merging(tmp_path):
    embedder = with_lora()
    embedder.save(tmp_path / "m")
    again = load(tmp_path / "m")
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in embedder.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("pooler.") for name in trainable)
    assert not any(module.training for module in again[0].model.modules())
    assert all(p.requires_grad for p in merge(again).parameters())


def test_save_keeps_mode_random_state_and_counts(tmp_path):
    embedder = tiny.embedder(max_seq_length=6).train()
    embedder[1].eval()
    modes = [module.training for module in embedder.modules()]
    embedder[0].token_ids(["a long text to cut"])
    cut, state = embedder[0].truncated, torch.get_rng_state()
    embedder.save(tmp_path / "m")
    assert [module.training for module in embedder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert embedder[0].truncated == cut
    assert all(p.requires_grad and not p.is_inference() for p in embedder.parameters())


def test_a_cut_that_only_the_probes_meet_is_not_reported(tmp_path, caplog):
    embedder = tiny.embedder(max_seq_length=8, prompts={"long": "a prompt that fills it all: "})
    embedder.default_prompt_name = "long"  # no text has room, the probes go without it
    embedder.save(tmp_path / "m")
    assert not [r for r in caplog.records if r.name == "mlpool"]


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embedder = tiny.embedder("eos-causal")
    embedder.save("here")
    embedder.save(Path("a/b/c"))
    os.mkdir("inside")
    monkeypatch.chdir("inside")
    embedder.save(".")
    assert sorted(os.listdir(".")) == sorted(os.listdir("../here")) == sorted(os.listdir("../a/b/c"))
    assert Path.cwd() == tmp_path / "inside"  # it was not replaced under our feet
    embedder.save(".")
    close(load(".").encode(TEXTS), embedder.encode(TEXTS))


def test_link_to_a_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        tiny.embedder("eos-causal").save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/modules.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_base_that_was_loaded_by_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    os.symlink(tiny.base(), "base")
    embedder = add_lora(load("base", "eos-causal"))
    embedder.save("adapter")
    monkeypatch.chdir(tmp_path)
    close(load("models/adapter").encode(TEXTS), embedder.encode(TEXTS))


# --- what is already there --------------------------------------------------------------------------------------------


def test_full_then_adapter_then_full(tmp_path):
    folder = tmp_path / "m"
    embedder = tiny.embedder()
    embedder.save(folder)
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5/trainer_state.json").write_text("{}")
    (folder / "link").symlink_to("nowhere")
    full = set(content(folder))
    tiny.shake(add_lora(embedder)[0].model, SHAKE, only="lora_B")
    embedder.save(folder)
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "config.json").exists()
    close(load(folder).encode(TEXTS), embedder.encode(TEXTS))
    merge(embedder).save(folder)
    assert set(content(folder)) == full
    assert (folder / "optimizer.pt").read_bytes() == b"state"
    assert (folder / "link").is_symlink()
    close(load(folder).encode(TEXTS), embedder.encode(TEXTS))
    assert os.listdir(tmp_path) == ["m"]


def test_sentence_transformers_own_save_into_the_folder(tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "m"
    tiny.embedder().save(folder)
    plain = SentenceTransformer(str(folder), trust_remote_code=True)
    tiny.shake(plain[0], SHAKE)
    plain.save(str(folder))  # its weights are not those of the manifest
    close(load(folder).encode(TEXTS), plain.encode(TEXTS))


def test_into_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file; expected a folder to write to"):
        tiny.embedder().save(tmp_path / "file")


def test_into_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(FileNotFoundError, match="link is a link to nothing, which is not there; delete the"):
        tiny.embedder().save(tmp_path / "link")
    assert os.listdir(tmp_path) == ["link"]


def test_adapter_into_the_folder_of_its_base(tmp_path):
    base = tmp_path / "base"
    tiny.transformer().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    before = content(base)
    embedder = add_lora(load(base, "eos-causal"))
    with pytest.raises(ValueError, match="base holds the base model of this adapter; save into another folder"):
        embedder.save(base)
    assert content(base) == before
    merge(embedder).save(base)
    close(load(base).encode(TEXTS), embedder.encode(TEXTS))


def test_pickled_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="saved as safetensors only"):
        tiny.embedder().save(tmp_path / "m", safe_serialization=False)
    assert not os.listdir(tmp_path)


def test_a_damaged_manifest_is_found_before_anything_is_written(saved_copy):
    (saved_copy / "mlpool.json").write_text("{")
    before = content(saved_copy)
    with pytest.raises(ValueError, match=r"mlpool\.json is not valid JSON"):
        tiny.embedder().save(saved_copy)
    assert content(saved_copy) == before


@pytest.fixture
def saved_copy(saved, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "copy"))


# --- a save that fails ------------------------------------------------------------------------------------------------


def other_pool(self, output_path, **_):
    tiny.shake(copy.deepcopy(self.pool)).save_pretrained(output_path)


def no_adapter(self, output_path, **_):
    SAVE(self, output_path)
    (Path(output_path) / "adapter_model.safetensors").unlink()


def base_instead_of_adapter(self, output_path, **_):
    SAVE(self, output_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (Path(output_path) / name).unlink()
    tiny.transformer().save_pretrained(output_path)


def other_design(self, output_path, **_):
    SAVE(self, output_path)
    path = Path(output_path) / "backbone_config.json"
    path.write_text(path.read_text().replace("bidirectional", "causal"))


def other_limit(self, output_path, **_):
    SAVE(self, output_path)
    path = Path(output_path) / "backbone_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_seq_length": 9}))


def no_eos(self, output_path, **_):
    SAVE(self, output_path)
    path = Path(output_path) / "backbone_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "append_eos": False}))


def other_tokenizer(self, output_path, **_):
    SAVE(self, output_path)
    tiny.tokenizer("both").save_pretrained(output_path)


def disk_full(self, output_path, **_):
    SAVE(self, output_path)
    raise OSError(28, "No space left on device")


SAVE = Backbone.save
FAULTS = [
    (Pooler, other_pool, RuntimeError, "not saved.*pooler.pool.latents differs"),
    (Backbone, no_adapter, Exception, "adapter_model|adapter"),
    (Backbone, base_instead_of_adapter, RuntimeError, "not saved.*lora_A.default.weight is missing"),
    (Backbone, other_design, RuntimeError, "not saved.*embeddings differ by"),
    (Backbone, other_limit, RuntimeError, "not saved.*max_seq_length is 9, not 128"),
    (Backbone, no_eos, RuntimeError, "not saved.*embeddings differ by"),
    (Backbone, other_tokenizer, RuntimeError, "not saved.*embeddings differ by"),
    (Backbone, disk_full, OSError, "No space left"),
]


@pytest.mark.parametrize(("module", "fault", "error", "message"), FAULTS, ids=[f[1].__name__ for f in FAULTS])
@pytest.mark.parametrize("there", [True, False])
def test_old_folder_stays_where_a_save_fails(
    module, fault, error, message, there, tuned, saved_copy, tmp_path, monkeypatch
):
    folder = saved_copy if there else tmp_path / "new"
    (saved_copy / "optimizer.pt").write_bytes(b"state")
    before, others = content(saved_copy), sorted(os.listdir(tmp_path))
    monkeypatch.setattr(module, "save", fault)
    with pytest.raises(error, match=message):
        tuned.train().save(folder)
    assert content(saved_copy) == before
    assert sorted(os.listdir(tmp_path)) == others
    assert tuned.training


@pytest.fixture(scope="module")
def tuned():
    return with_lora(packing="never")


def test_out_of_memory_while_verifying_on_the_cpu_is_an_error(tmp_path, monkeypatch):
    def reload(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(saved_module, "reload", reload)
    with pytest.raises(RuntimeError, match="can't allocate"):
        tiny.embedder().save(tmp_path / "m")
    assert not os.listdir(tmp_path)


# --- a save that is killed --------------------------------------------------------------------------------------------


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(work) -> int:
    """Run `work` in a forked process; the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(3)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def save_and_die(folder: Path, moment: str) -> None:
    moves = iter(range(99))

    def replace(self, target, move=Path.replace):
        saved = self.is_relative_to(folder / ".mlpool-saved")
        return die() if saved and moment == f"move {next(moves)}" else move(self, target)

    Path.replace = replace  # this is the child: nobody needs it back
    with staged(folder) as stage:
        (stage / "modules.json").write_text('["new"]')
        (stage / "sub").mkdir()
        (stage / "sub/new.json").write_text('["new"]')
        if moment == "writing":
            die()
        write_manifest(stage)
        if moment == "written":
            die()


def old_folder(folder: Path) -> dict[str, bytes]:
    with staged(folder) as stage:
        (stage / "modules.json").write_text('["old"]')
        (stage / "old.json").write_text("[]")
        write_manifest(stage)
    (folder / "optimizer.pt").write_bytes(b"state")
    return content(folder)


@pytest.mark.parametrize("moment", ["writing", "written", "move 0", "move 1", "move 2"])
def test_killed(moment, tmp_path):
    folder = tmp_path / "m"
    before = old_folder(folder)
    assert in_a_child(lambda: save_and_die(folder, moment)) == signal.SIGKILL
    if moment in ("writing", "written"):
        assert {name: data for name, data in content(folder).items() if not name.startswith(".")} == before
    check_folder(folder)  # as every load does
    recover(folder)
    after = content(folder)
    if moment in ("writing", "written"):
        assert after == before
    else:
        assert set(after) == {"modules.json", "sub/new.json", "mlpool.json", "optimizer.pt"}
        assert after["modules.json"] == b'["new"]'
    assert os.listdir(tmp_path) == ["m"]
    assert not list(folder.glob(".*"))
    old_folder(folder)  # the next save


def test_killed_save_of_an_embedder(saved_copy):
    embedder = load(saved_copy, packing="never")
    expected = embedder.encode(TEXTS)

    def work():
        tiny.shake(embedder)
        embedder_module.verify_saved = die  # in the child alone
        embedder.save(saved_copy)

    assert in_a_child(work) == signal.SIGKILL
    assert len(list(saved_copy.glob(".mlpool-saving-*/model.safetensors"))) == 1
    close(load(saved_copy).encode(TEXTS), expected)
    embedder.save(saved_copy)
    assert not list(saved_copy.glob(".*"))
