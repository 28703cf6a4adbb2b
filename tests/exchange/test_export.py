"""Exported embedders, read by others: transformers alone, plain sentence-transformers, a process with torch only."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlpool_kernels import reference
from tiny import BOS, EOS, GATED, PAD, SMALL, TEXTS, D, embedder, shake, tokenizer, transformer, transformers
from torch.nn.functional import normalize

from mlpool.embedder import DESIGNS, add_lora, load, merge
from mlpool.embedder.designs import Design
from mlpool.exchange import export, vllm
from mlpool.exchange import folder as plain_folder
from mlpool.exchange.export import export_folder, export_program, load_exported
from mlpool.exchange.vllm import folder as vllm_folder

PLAIN = [name for name, design in DESIGNS.items() if not design.trainable]
# Every kind of trained pooler, over both kinds of attention and of token pooling.
TRAINED = ["last-layer-causal", "multi-layer-causal", "multi-layer-bidirectional", "layer-weights-bidirectional"]
PROMPTS = {"query": "read: ", "document": ""}


def difference(a, b) -> float:
    return (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max().item()


# --- a plain folder ---------------------------------------------------------------------------------------------------


def by_transformers(folder: Path, texts: list[str]) -> torch.Tensor:
    """What the folder's own files say, by AutoModel and AutoTokenizer alone, text by text."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    own = transformers.AutoTokenizer.from_pretrained(folder)
    modes = json.loads((folder / "1_Pooling/config.json").read_text())
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    rows = []
    for text in texts:
        with torch.no_grad():
            states = model(**own(text, return_tensors="pt", truncation=True, max_length=limit)).last_hidden_state[0]
        (mode,) = (name for name, on in modes.items() if on is True and name != "include_prompt")
        rows.append({"pooling_mode_lasttoken": states[-1], "pooling_mode_mean_tokens": states.mean(0)}[mode])
    return normalize(torch.stack(rows).float())


CASES = [
    *((design, "qwen2", "bare") for design in PLAIN),
    ("eos-causal", "llama", "bos"), ("mean-bidirectional", "llama", "bos"), ("eos-causal", "llama", "eos"),
    ("mean-causal", "llama", "both"), ("mean-bidirectional", "gpt2", "bare"), ("eos-causal", "gpt2", "bare"),
    ("eos-causal", "opt", "bos"), ("mean-bidirectional", "bert", None), ("mean-bidirectional", "roberta", None),
]  # fmt: skip


@pytest.mark.parametrize(("design", "family", "frame"), CASES)
def test_folder_is_read_by_others(design, family, frame, tmp_path):
    from sentence_transformers import SentenceTransformer

    made = embedder(design, family, frame=frame, prompts=PROMPTS, max_seq_length=24)
    assert export_folder(made, tmp_path / "out") < 1e-5
    long = [*TEXTS, "how many layers " * 20]
    texts = [text for text in long if text.strip()]  # transformers pads nothing to an empty text
    assert difference(by_transformers(tmp_path / "out", texts), made.encode(texts)) < 1e-5
    plain = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    assert [type(module).__module__.partition(".")[0] for module in plain] == ["sentence_transformers"] * 3
    assert (plain.prompts, plain.max_seq_length, plain.similarity_fn_name) == (PROMPTS, 24, "cosine")
    filled = long if frame != "eos" and made[0].texts.suffix else texts
    assert difference(plain.encode(filled), made.encode(filled)) < 1e-5
    assert difference(plain.encode_query(texts), made.encode_query(texts)) < 1e-5


def test_folder_has_the_classic_layout(tmp_path):
    """The names that text-embeddings-inference and vLLM look up; no mlpool."""
    export.export(embedder("eos-causal", "llama", frame="bos", base_dtype=torch.bfloat16), tmp_path / "out")
    modules = json.loads((tmp_path / "out/modules.json").read_text())
    assert [module["type"].removeprefix("sentence_transformers.models.") for module in modules] == [
        "Transformer", "Pooling", "Normalize",
    ]  # fmt: skip
    pooling = json.loads((tmp_path / "out/1_Pooling/config.json").read_text())
    assert {name for name, on in pooling.items() if on is True} == {"pooling_mode_lasttoken", "include_prompt"}
    assert pooling["word_embedding_dimension"] == D
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert "mlpool" not in " ".join(path.read_text() for path in tmp_path.glob("out/*.json"))
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids
    assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)


def test_folder_says_which_way_it_reads(tmp_path):
    for design, family in (("mean-bidirectional", "qwen2"), ("mean-causal", "qwen2")):
        export_folder(embedder(design, family), tmp_path / design)
        model = transformers.AutoModel.from_pretrained(tmp_path / design).eval()
        ids = torch.arange(5, 15)[None]
        with torch.no_grad():
            first, other = (
                model(input_ids=x).last_hidden_state[0, 0] for x in (ids, ids + torch.eye(10, dtype=int)[9])
            )
        assert torch.equal(first, other) == (design == "mean-causal")


def test_folder_without_the_prompt(tmp_path):
    from sentence_transformers import SentenceTransformer

    made = embedder("mean-bidirectional", "llama", frame="bos", prompts={"query": "read:"}, include_prompt=False)
    export_folder(made, tmp_path / "out")
    plain = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    texts = [text for text in TEXTS if text.strip()]
    assert difference(plain.encode_query(texts), made.encode_query(texts)) < 1e-5
    assert difference(plain.encode_query(texts), plain.encode(["read:" + text for text in texts])) > 1e-3


def test_folder_where_there_is_no_equivalent(tmp_path):
    def refused(error, match, made, **options):
        with pytest.raises(error, match=match):
            export.export(made, tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())

    refused(
        ValueError,
        "include_bos=False has no equivalent",
        embedder("mean-causal", "llama", frame="bos", include_bos=False),
    )
    spaced = embedder("mean-causal", prompts={"query": "layers "}, include_prompt=False)
    refused(ValueError, r"must end where a token ends: 'layers ' is 4 tokens by itself and \[3, 4\] before", spaced)
    refused(ValueError, "has a trained pooler.*--format torch", embedder("last-layer-causal"), format="st")
    refused(ValueError, r"ends in .pt2, got", embedder("last-layer-causal"))
    refused(ValueError, "format must be one of", embedder("mean-causal"), format="gguf")
    refused(ValueError, r"call merge\(embedder\) first", add_lora(embedder("eos-causal")))
    # What is left out of the last token changes nothing.
    export.export(
        embedder("eos-causal", "llama", frame="bos", include_bos=False, include_prompt=False), tmp_path / "out"
    )
    with pytest.raises(FileExistsError, match="already and not empty"):
        export.export(embedder("eos-causal"), tmp_path / "out")


def test_folder_of_a_family_that_needs_its_patch(tmp_path):
    """StableLM's saved config does not reach its attention: causal where nothing is padded."""
    config = transformers.StableLmConfig(**{**GATED, "num_key_value_heads": 2})
    transformers.StableLmModel(config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="stablelm is bidirectional only as mlpool patches it"):
        export_folder(load(tmp_path / "base", "mean-bidirectional"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_folder(load(tmp_path / "base", "mean-causal"), tmp_path / "out")


def test_folder_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    made = embedder("mean-causal")
    with monkeypatch.context() as patch:
        patch.setattr(plain_folder, "self_contained", lambda backbone: tokenizer(pad_token="<pad>"))
        with pytest.raises(RuntimeError, match="the saved tokenizer gives other tokens for"):
            export_folder(made, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(
            plain_folder, "_MODES", {**plain_folder._MODES, "mean_tokens": None, "lasttoken": plain_folder.MeanPool}
        )
        with pytest.raises(RuntimeError, match="not exported: loaded by sentence-transformers, embeddings with"):
            export_folder(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- for vLLM: what needs none; the rest is in tests/served -----------------------------------------------------------


def test_vllm_folder_is_still_an_embedder(tmp_path):
    made = embedder(
        "multi-layer-bidirectional", "llama", frame="bos", prompts=PROMPTS, include_bos=False, layers=[0, -1]
    )
    assert export.export(made, tmp_path / "out", "vllm") < 1e-5
    assert difference(load(tmp_path / "out").encode(TEXTS, prompt_name="query"), made.encode_query(TEXTS)) < 1e-6
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["architectures"], config["is_causal"]) == ([vllm.ARCHITECTURE], False)
    section = config[vllm.SECTION]
    assert {key: section[key] for key in ("layers", "final_norm", "skip_tokens", "token_pooling", "pool")} == {
        "layers": [0, 3], "final_norm": True, "skip_tokens": 1, "token_pooling": "mean", "pool": "1_Pooler",
    }  # fmt: skip
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert json.loads((tmp_path / "out/sentence_bert_config.json").read_text())["max_seq_length"] == 128


def test_vllm_folder_refuses(tmp_path, monkeypatch):
    def refused(match, made):
        with pytest.raises(ValueError, match=match):
            export.export(made, tmp_path / "out", "vllm")
        assert not list(tmp_path.iterdir())

    refused("serves llama, mistral, qwen2, qwen3, and this is a gpt2", embedder("mean-causal", "gpt2"))
    refused(r"call merge\(embedder\) first", add_lora(embedder("mean-causal")))
    refused("include_prompt=False leaves the prompt's tokens", embedder("mean-causal", include_prompt=False))
    made = embedder("mean-bidirectional", "llama")
    config = made[0].model.config
    config.sliding_window = 100
    refused("see a window of 100 tokens.*max_seq_length to at most 100, it is 128", made)
    config.sliding_window = None
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    refused("the plugin knows the positions default.*has dynamic", made)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_folder, "self_contained", lambda backbone: tokenizer(pad_token="<pad>"))
        with pytest.raises(RuntimeError, match="the saved tokenizer gives"):
            export.export(embedder("mean-causal"), tmp_path / "out", "vllm")
    assert not list(tmp_path.iterdir())


# --- one file ---------------------------------------------------------------------------------------------------------

LIMIT = 40
TRACED = {"num_hidden_layers": 1}  # every layer is traced, slowly
ALONE = """
import json, sys
for name in ("mlpool", "mlpool_kernels", "transformers", "sentence_transformers"):
    sys.modules[name] = None  # importing it is an error
import torch
worst = {}
for file, cases in torch.load(sys.argv[1]).items():
    program = torch.export.load(file).module()
    for name, (inputs, expected) in cases.items():
        got = program(*inputs)
        assert got.shape == expected.shape, (got.shape, expected.shape)
        worst[file + " " + name] = (got - expected).abs().max().item()
print(json.dumps(worst))
"""


def batches() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and masks of several sizes, padded on either side with ids that would matter."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for count, length in ((1, 1), (1, 17), (2, LIMIT), (5, 1), (5, 9)):
        ids = torch.randint(4, 300, (count, length), generator=generator)
        lengths = torch.randint(1, length + 1, (count,), generator=generator)
        lengths[0] = length
        right = (torch.arange(length) < lengths[:, None]).long()
        for side, mask in (("right", right), ("left", right.flip(1))):
            ends = lengths - 1 if side == "right" else torch.full_like(lengths, length - 1)
            made[f"{count}x{length} {side}"] = (ids.scatter(1, ends[:, None], EOS), mask)
    return made


def by_equations(made, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """All hidden states of the padded model in float64, then the paper's equations."""
    model, pool, design = made[0].model, made[1].pool, DESIGNS[made[0].design]
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        states = [state.double() for state in states]
        if design.name == "layer-weights-bidirectional":
            rows = reference.gather(states, mask, "mean")
            return normalize((pool.weights.double()[:, None] * normalize(rows, dim=-1)).sum(1)).float()
        parameters = {name: p.double() for name, p in pool.named_parameters()}
        if design.reads_all_layers:
            out = reference.multi_layer_pool(states, mask, parameters, pool.num_heads, design.token_pooling)
        else:
            out = reference.last_layer_pool(states[-1], mask, parameters, pool.num_heads, design.token_pooling)
        return out.float()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A file of each design of TRAINED, that of the last layer of a base that is cut; what they were made from."""
    folder = tmp_path_factory.mktemp("programs")
    transformer("qwen2", num_hidden_layers=2).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    made, other = {}, {"last-layer-causal": True, "multi-layer-causal": False}
    for design in TRAINED:
        sizes = {**SMALL, "residual": other.get(design, "mix")} if DESIGNS[design].has_latents else "default"
        options = {"packing": "never", "max_seq_length": LIMIT, "prompts": PROMPTS, "device": "cpu"}
        if not DESIGNS[design].reads_all_layers:
            options["depth"] = 1
        made[design] = load(folder / "base", design, sizes, **options)
        shake(made[design][1])
        assert export.export(made[design], folder / f"{design}.pt2") < 1e-5
    return folder, made


def test_programs_run_with_torch_alone(programs, tmp_path):
    folder, made = programs
    expected = {
        str(folder / f"{design}.pt2"): {
            name: (batch, by_equations(made[design], *batch)) for name, batch in batches().items()
        }
        for design in TRAINED
    }
    torch.save(expected, tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "expected.pt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    worst = json.loads(done.stdout)
    assert len(worst) == len(TRAINED) * len(batches())
    assert {name: error for name, error in worst.items() if not error < 1e-5} == {}


def test_program_is_its_embedder(programs):
    """Its own tokenizer frames, cuts and prompts as the embedder's; the embedder is as it was."""
    folder, made = programs
    for design in ("last-layer-causal", "multi-layer-bidirectional"):
        exported = load_exported(folder / f"{design}.pt2")
        texts = [*TEXTS, "layers " * 100]
        assert difference(exported(*exported.tokenize(texts)), made[design].encode(texts)) < 1e-5
        assert difference(exported(*exported.tokenize(texts, "query")), made[design].encode_query(texts)) < 1e-5
        assert exported.settings["design"] == design
        assert exported.settings["dimension"] == D
        with pytest.raises(ValueError, match="no prompt 'title'; there are query, document"):
            exported.tokenize(texts, "title")
        with pytest.raises(ValueError, match="row 1 is int"):
            exported.tokenize(["a", 3])
    assert not any(module.__class__.__module__.startswith("torch.fx") for module in made["last-layer-causal"].modules())
    assert not made["multi-layer-bidirectional"][1].pool.folded


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    """One file of a model whose tokenizer puts BOS, neither it nor prompts pooled; and the embedder."""
    path = tmp_path_factory.mktemp("framed") / "out.pt2"
    made = embedder(
        "mean-bidirectional", "llama", frame="bos", prompts=PROMPTS, include_prompt=False, include_bos=False, **TRACED
    )
    made.train()
    before = made.encode(TEXTS)
    made.train()
    packed = made[0].packed
    export_program(made, path)
    assert all(module.training for module in made.modules())
    assert difference(made.encode(TEXTS), before) == 0
    assert made[0].packed == packed
    return path, made


def test_program_with_tokens_that_are_not_pooled(framed):
    """A third input."""
    path, made = framed
    exported = load_exported(path)
    inputs = exported.tokenize(TEXTS, "query")
    assert len(inputs) == 3
    assert difference(exported(*inputs), made.encode_query(TEXTS)) < 1e-5


def test_program_of_unit_means(tmp_path, monkeypatch):
    """A design of a user's own, whose rows are means of unit vectors: the file's are too."""
    monkeypatch.setitem(
        DESIGNS,
        "unit-means",
        Design("unit-means", None, "bidirectional", DESIGNS["multi-layer-causal"].pool, "unit_mean"),
    )
    made = embedder("unit-means", "llama", frame="bos", include_bos=False, max_seq_length=LIMIT, **TRACED)
    export_program(made, tmp_path / "out.pt2")
    exported = load_exported(tmp_path / "out.pt2")
    found = exported(*exported.tokenize(TEXTS))
    assert difference(found, made.encode(TEXTS)) < 1e-5
    monkeypatch.setitem(DESIGNS, "unit-means", replace(DESIGNS["unit-means"], token_pooling="mean"))
    plain = embedder("unit-means", "llama", frame="bos", include_bos=False, max_seq_length=LIMIT, **TRACED)
    assert difference(found, plain.encode(TEXTS)) > 1e-3  # so that the two can be told apart


def test_program_refuses(programs, tmp_path):
    folder, made = programs
    pooled = made["last-layer-causal"]
    with pytest.raises(FileExistsError, match="is there already"):
        export_program(pooled, folder / "last-layer-causal.pt2")
    with pytest.raises(ValueError, match=r"ends in \.pt2, got"):
        export_program(pooled, tmp_path / "out")
    with pytest.raises(ValueError, match=r"call merge\(embedder\) first"):
        export_program(add_lora(embedder()), tmp_path / "out.pt2")
    other = embedder()
    other[0].attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 cannot be traced; load with attn_implementation='sdpa'"):
        export_program(other, tmp_path / "out.pt2")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_exported(tmp_path / "none.pt2")
    shutil.copy(folder / "last-layer-causal.pt2", tmp_path / "cut.pt2")
    content = (tmp_path / "cut.pt2").read_bytes()
    (tmp_path / "cut.pt2").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.pt2 is damaged, or was not written by mlpool export"):
        load_exported(tmp_path / "cut.pt2")
    exported = load_exported(folder / "last-layer-causal.pt2")
    long, blank = torch.full((2, LIMIT + 1), EOS), torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(AssertionError, match=f"<= {LIMIT}"):
        exported(long, long)
    with pytest.raises(RuntimeError, match="a text has no token left by attention_mask"):
        exported(blank, 0 * blank)


def test_program_refuses_ids_without_their_frame(framed):
    """A plain tokenizer's ids, without EOS, were embedded wrongly by 0.49 without a word; the file has the rule."""
    path, made = framed
    files = {"embedder.json": ""}
    program = torch.export.load(path, extra_files=files).module()
    frame = json.loads(files["embedder.json"])["frame"]
    assert frame == {"before": [BOS], "behind": [EOS]}
    own = tokenizer()  # frames nothing
    plain = own(TEXTS[0]).input_ids
    for ids, match in ((plain, "does not begin"), ([BOS, *plain], "does not end"), ([*plain, EOS], "does not begin")):
        for padded in ([ids, [*ids[:1], *ids[2:], PAD]], [ids, [PAD, *ids[:1], *ids[2:]]]):
            rows = torch.tensor(padded)
            with pytest.raises(RuntimeError, match=f"a text {match} with token .* put embedder.json's frame"):
                program(rows, (rows != PAD).long(), (rows != PAD).long())
    rows = torch.tensor([[*frame["before"], *plain, *frame["behind"]]])
    found = program(rows, torch.ones_like(rows), (rows != BOS).long())
    assert difference(found, made.encode(TEXTS[:1])) < 1e-5


def test_program_that_differs_is_not_left_behind(programs, tmp_path, monkeypatch):
    folder, made = programs

    class Foreign(torch.nn.Module):
        def forward(self, x):
            rows = torch.arange(x.shape[0])
            return torch.ops.mlpool.gather([x], rows, rows + 1, rows, rows + 1, None, False, "torch", False)

    other = torch.export.load(folder / "last-layer-causal.pt2")
    foreign = torch.export.export(Foreign(), (torch.ones(3, 4),))
    for program, match in (
        (other, "not exported: the embeddings of the file differ by"),
        (foreign, r"still calls mlpool\.gather\.default"),
    ):
        monkeypatch.setattr("mlpool.exchange.program.trace", lambda *_, program=program: program)
        with pytest.raises(RuntimeError, match=match):
            export_program(made["multi-layer-causal"], tmp_path / "out.pt2")
    assert not list(tmp_path.iterdir())


def test_merged_adapter_is_exported(tmp_path):
    made = add_lora(embedder("mean-bidirectional"))
    shake(made[0].model, only="lora_B")
    expected = made.encode(TEXTS)
    export_folder(merge(made), tmp_path / "out")
    texts = [text for text in TEXTS if text.strip()]
    kept = [TEXTS.index(text) for text in texts]
    assert difference(by_transformers(tmp_path / "out", texts), expected[kept]) < 1e-5
