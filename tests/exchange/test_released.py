"""The authors' folders: a peft adapter of a causal LM beside attn_pool.pt, against an eager computation of our own."""

import json
import shutil

import peft
import pytest
import torch
from mlpool_kernels import reference
from safetensors.torch import load_file, save_file
from tiny import EOS, GATED, PAD, TEXTS, UNK, D, L, shake, tokenizer, transformers

from mlpool import MultiLayerPool
from mlpool.embedder import DESIGNS, load
from mlpool.exchange.released import import_released
from mlpool.pooling.checkpoints import from_released

R, HEADS, I = 5, 2, 16  # noqa: E741
NAMES = {design.number: name for name, design in DESIGNS.items() if design.number}
FAMILIES = {2: "Llama", 3: "Mistral", 4: "Mistral", 5: "Llama"}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def attn_pool(layers: int | None, hidden: int = D) -> dict[str, torch.Tensor]:
    """Random tensors under the names of the released module."""
    block, ff = "cross_attend_blocks.0", "cross_attend_blocks.1"
    shapes = {
        "latents": (R, hidden), f"{block}.fn.to_q.weight": (I, hidden), f"{block}.fn.to_kv.weight": (2 * I, hidden),
        f"{block}.fn.to_out.weight": (hidden, I), f"{ff}.fn.net.0.weight": (8 * hidden, hidden),
        f"{ff}.fn.net.0.bias": (8 * hidden,), f"{ff}.fn.net.2.weight": (hidden, 4 * hidden),
        f"{ff}.fn.net.2.bias": (hidden,), **({} if layers is None else {"pos_emb.weight": (layers, hidden)}),
    }  # fmt: skip
    shapes |= {
        f"{norm}.{part}": (hidden,)
        for norm in (f"{block}.norm", f"{block}.norm_context", f"{ff}.norm")
        for part in ("weight", "bias")
    }
    generator = torch.Generator().manual_seed(4)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def causal_lm(family: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**GATED, "attn_implementation": "eager", **changes})
    return shake(getattr(transformers, f"{family}ForCausalLM")(config), 0.1).eval()


def write(folder, family: str, layers: int | None, **options):
    """A base folder and a released one beside it; the peft model they were made from."""
    base = causal_lm(family)
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base, config)
    shake(model, only="lora_B")
    model.save_pretrained(folder / "released")
    config = json.loads((folder / "released/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somebody/base"
    (folder / "released/adapter_config.json").write_text(json.dumps(config))
    torch.save(attn_pool(layers), folder / "released/attn_pool.pt")
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By design: its folder and the peft model."""
    made = {}
    for design, family in FAMILIES.items():
        folder = tmp_path_factory.mktemp(f"design-{design}")
        made[design] = folder, write(folder, family, L if design in (3, 5) else None)
    return made


def by_hand(model, design: int, released: dict[str, torch.Tensor], texts=TEXTS, pad: int = -1) -> torch.Tensor:
    """Text by text without padding, EOS appended; bidirectional by an additive mask that hides nothing.

    Tokens `pad` are read and not pooled, as in their design 5.
    """
    own, rows = tokenizer(), []
    parameters = {name: tensor.double() for name, tensor in from_released(released).items()}
    for text in texts:
        ids = torch.tensor([[*own(text, add_special_tokens=False).input_ids, EOS]])
        mask = (ids != pad).long()
        visible = torch.zeros(1, 1, ids.shape[1], ids.shape[1]) if design in (4, 5) else torch.ones_like(ids)
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=visible, output_hidden_states=True).hidden_states[1:]
        states = [state.double() for state in states]
        pooling = "last" if design in (2, 3) else "mean"
        if design in (3, 5):
            rows.append(reference.multi_layer_pool(states, mask, parameters, HEADS, pooling))
        else:
            rows.append(reference.last_layer_pool(states[-1], mask, parameters, HEADS, pooling))
    return torch.cat(rows)


@pytest.mark.parametrize("design", [2, 3, 4, 5])
def test_embeddings_are_the_released_models(design, folders, tmp_path):
    folder, model = folders[design]
    made = import_released(folder / "released", folder / "base", design, HEADS, device="cpu")
    assert made[0].design == NAMES[design]
    expected = by_hand(model, design, torch.load(folder / "released/attn_pool.pt"))
    torch.testing.assert_close(torch.from_numpy(made.encode(TEXTS)).double(), expected, atol=2e-5, rtol=0)
    made.save(tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    again = load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(torch.from_numpy(again.encode(TEXTS)).double(), expected, atol=2e-5, rtol=0)


def test_a_pad_token_in_a_text_is_text(folders, tmp_path):
    """Theirs leaves it out of design 5's mean, unless it is one that the text does not hold."""
    folder, model = folders[5]
    shutil.copytree(folder / "base", tmp_path / "base")
    tokenizer(pad_token="<unk>").save_pretrained(tmp_path / "base")
    made = import_released(folder / "released", tmp_path / "base", 5, HEADS, device="cpu")
    assert made.tokenizer.pad_token_id == UNK
    texts, released = ["how many <unk> layers", "all of them<unk>"], torch.load(folder / "released/attn_pool.pt")
    assert all(UNK in ids for ids in made[0].token_ids(texts).ids)
    found = torch.from_numpy(made.encode(texts)).double()
    theirs = by_hand(model, 5, released, texts, pad=UNK)
    assert ((found - theirs).abs().amax(1) > 1e-3).all()
    torch.testing.assert_close(found, by_hand(model, 5, released, texts, pad=PAD), atol=2e-5, rtol=0)


def copied(folder, tmp_path):
    shutil.copytree(folder / "released", tmp_path / "released")
    return tmp_path / "released"


def test_other_forms_of_the_adapter(folders, tmp_path):
    """A .bin of torch; names of the bare model; an adapter of the head, which no embedding depends on."""
    folder, model = folders[3]
    expected = by_hand(model, 3, torch.load(folder / "released/attn_pool.pt"))
    released = copied(folder, tmp_path)
    tensors = load_file(released / "adapter_model.safetensors")
    (released / "adapter_model.safetensors").unlink()
    assert all(name.startswith("base_model.model.model.layers.") for name in tensors)
    bare = {name.replace("model.model.", "model."): tensor for name, tensor in tensors.items()}
    head = {"base_model.model.lm_head.lora_A.weight": torch.ones(4, D)}
    for content in (tensors, bare, {**tensors, **head}):
        torch.save(content, released / "adapter_model.bin")
        made = import_released(released, folder / "base", "multi-layer-causal", HEADS, device="cpu")
        torch.testing.assert_close(torch.from_numpy(made.encode(TEXTS)).double(), expected, atol=2e-5, rtol=0)


def test_options_and_a_base_of_another_name(folders, caplog):
    folder, _ = folders[5]
    arguments = (folder / "released", folder / "base", 5, HEADS)
    made = import_released(*arguments, max_seq_length=16, prompts={"query": "read: "}, dtype="bfloat16", device="cpu")
    assert (made.max_seq_length, made.prompts["query"], made.dtype) == (16, "read: ", torch.bfloat16)
    assert "trained on" not in caplog.text
    shutil.copytree(folder / "base", folder / "another")
    import_released(folder / "released", folder / "another", 5, HEADS, device="cpu")
    assert "was trained on somebody/base, and base is" in caplog.text


def test_design_that_is_not_in_the_files(folders):
    for design, match in (
        (None, r"has no layer weights, so its design is 2 \(causal\) or 4 \(bidirectional\), which no file says"),
        (3, r"has no layer weights, so its design is 2 \(causal\) or 4 \(bidirectional\), not 3"),
        ("mean-causal", "not mean-causal"), (9, "there is no design 9"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            import_released(folders[2][0] / "released", folders[2][0] / "base", design, HEADS)
    with pytest.raises(ValueError, match=r"has layer weights, so its design is 3 \(causal\) or 5 \(bidirectional\)"):
        import_released(folders[5][0] / "released", folders[5][0] / "base", num_heads=HEADS)
    with pytest.raises(ValueError, match="inner width of 16, which 32 heads do not divide; pass num_heads"):
        import_released(folders[5][0] / "released", folders[5][0] / "base", 5)


def test_another_base_model(folders, tmp_path):
    """Named by tensor where the adapter does not fit, by size where the pooler does not."""
    folder, _ = folders[5]
    for name, changes, match in (
        ("wide", {"intermediate_size": 64}, r"up_proj.lora_B.weight is \[48, 4\], expected \[64, 4\].* and \d+ more"),
        ("deep", {"num_hidden_layers": L + 1}, f"another base model: layers {L}, expected {L + 1}"),
        ("broad", {"hidden_size": 2 * D}, f"another base model: hidden size {D}, expected {2 * D}"),
    ):
        causal_lm("Llama", **changes).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=match):
            import_released(folder / "released", tmp_path / name, 5, HEADS)
    folder, _ = folders[4]  # a pooler of the last layer fits any depth
    causal_lm("Mistral", num_hidden_layers=L - 1).save_pretrained(tmp_path / "shallow")
    tokenizer().save_pretrained(tmp_path / "shallow")
    with pytest.raises(ValueError, match=rf"it has layers.{L - 1}.*, the model has not"):
        import_released(folder / "released", tmp_path / "shallow", 4, HEADS)
    released = copied(folder, tmp_path)
    tensors = load_file(released / "adapter_model.safetensors")
    less = {name: tensor for name, tensor in tensors.items() if f"layers.{L - 1}." not in name}
    save_file(less, released / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"it lacks layers.{L - 1}"):
        import_released(released, folder / "base", 4, HEADS)


def test_files_that_are_missing_or_broken(folders, tmp_path):
    folder, _ = folders[5]

    def broken(error, match, name, content=None):
        shutil.rmtree(tmp_path / "released", ignore_errors=True)
        released = copied(folder, tmp_path)
        (released / name).unlink()
        if content is not None:
            (released / name).write_bytes(content)
        with pytest.raises(error, match=match):
            import_released(released, folder / "base", 5, HEADS)

    with pytest.raises(FileNotFoundError, match=r"no folder .*none; expected the authors'"):
        import_released(tmp_path / "none", folder / "base", 5, HEADS)
    broken(FileNotFoundError, "has no adapter_config.json; expected adapter_config.json", "adapter_config.json")
    broken(FileNotFoundError, "has no attn_pool.pt, nor is there releasedattn_pool.pt beside it", "attn_pool.pt")
    weights = "adapter_model.safetensors"
    broken(FileNotFoundError, "has neither adapter_model.safetensors nor adapter_model.bin", weights)
    for name in (weights, "attn_pool.pt"):
        half = (folder / "released" / name).read_bytes()
        broken(ValueError, f"{name} (cannot be read|is damaged)", name, half[: len(half) // 2])
    broken(ValueError, "adapter_config.json cannot be read", "adapter_config.json", b'{"peft_type": ')
    prompt = json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}).encode()
    broken(ValueError, "is a PromptTuningConfig, expected LoRA's", "adapter_config.json", prompt)


# --- as the authors' trainer leaves it --------------------------------------------------------------------------------


def test_rows_for_more_layers_than_the_base_has(folders, tmp_path, caplog):
    """Their table has 32 rows, whatever the base; its first rows are read."""
    folder, model = folders[5]
    released = copied(folder, tmp_path)
    short = torch.load(folder / "released/attn_pool.pt")
    tall = {**short, "pos_emb.weight": torch.cat([short["pos_emb.weight"], torch.full((32 - L, D), 9.0)])}
    torch.save(tall, released / "attn_pool.pt")
    made = import_released(released, folder / "base", 5, HEADS, device="cpu")
    assert made[1].pool.num_layers == L
    assert f"has rows for 32 layers and the base model has {L}: the first are read" in caplog.text
    expected = by_hand(model, 5, short)
    torch.testing.assert_close(torch.from_numpy(made.encode(TEXTS)).double(), expected, atol=2e-5, rtol=0)
    pool = MultiLayerPool.from_released(released / "attn_pool.pt", HEADS, num_layers=2)
    assert torch.equal(pool.layer_weights, short["pos_emb.weight"][:2])
    with pytest.raises(ValueError, match="has layer weights of 32 layers, 33 are asked for"):
        MultiLayerPool.from_released(released / "attn_pool.pt", HEADS, num_layers=33)


def test_pool_file_beside_the_folder(folders, tmp_path, monkeypatch):
    """A missing slash in their trainer: OUT/ and OUTattn_pool.pt."""
    folder, model = folders[4]
    released = copied(folder, tmp_path)
    (released / "attn_pool.pt").rename(tmp_path / "releasedattn_pool.pt")
    expected = by_hand(model, 4, torch.load(folder / "released/attn_pool.pt"))
    monkeypatch.chdir(released)
    for place in (released, f"{released}/", "."):
        made = import_released(place, folder / "base", 4, HEADS, device="cpu")
        torch.testing.assert_close(torch.from_numpy(made.encode(TEXTS)).double(), expected, atol=2e-5, rtol=0)


def test_design_1_has_no_pool_file(folders, tmp_path):
    folder, model = folders[2]
    released = copied(folder, tmp_path)
    (released / "attn_pool.pt").unlink()
    made = import_released(released, folder / "base", 1, device="cpu", max_seq_length=32)
    assert (made[0].design, made.max_seq_length) == ("eos-causal", 32)
    own, rows = tokenizer(), []
    for text in TEXTS:
        ids = torch.tensor([[*own(text, add_special_tokens=False).input_ids, EOS]])
        with torch.no_grad():
            rows.append(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1])
    expected = torch.nn.functional.normalize(torch.stack(rows))
    torch.testing.assert_close(torch.from_numpy(made.encode(TEXTS)), expected, atol=2e-5, rtol=0)
    for design in (None, 2, "layer-weights-bidirectional"):
        with pytest.raises(FileNotFoundError, match=r"nor is there releasedattn_pool\.pt beside it.*pass design=1"):
            import_released(released, folder / "base", design, HEADS)
