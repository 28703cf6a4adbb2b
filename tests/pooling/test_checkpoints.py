"""Saving and loading: the authors' released files both ways, our own folders, and files that are broken."""

import json
import pickle

import pytest
import torch
from conftest import SMALL, last, make_mask, make_states, multi, randomise, use
from safetensors.torch import load_file, save_file

from mlpool import EosPool, LastLayerPool, LayerWeightsPool, MeanPool, MultiLayerPool

D, L = 16, 4
# As the released module names them: LN1 norms the keys, LN2 the latents; keys stand above values in to_kv.
RELEASED = {
    "latents": (5, D), "pos_emb.weight": (L, D),
    "cross_attend_blocks.0.norm.weight": (D,), "cross_attend_blocks.0.norm.bias": (D,),
    "cross_attend_blocks.0.norm_context.weight": (D,), "cross_attend_blocks.0.norm_context.bias": (D,),
    "cross_attend_blocks.0.fn.to_q.weight": (16, D), "cross_attend_blocks.0.fn.to_kv.weight": (32, D),
    "cross_attend_blocks.0.fn.to_out.weight": (D, 16),
    "cross_attend_blocks.1.norm.weight": (D,), "cross_attend_blocks.1.norm.bias": (D,),
    "cross_attend_blocks.1.fn.net.0.weight": (8 * D, D), "cross_attend_blocks.1.fn.net.0.bias": (8 * D,),
    "cross_attend_blocks.1.fn.net.2.weight": (D, 4 * D), "cross_attend_blocks.1.fn.net.2.bias": (D,),
}  # fmt: skip
KINDS = [pytest.param(MultiLayerPool, id="multi"), pytest.param(LastLayerPool, id="last")]


def released(kind=MultiLayerPool, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [name for name in RELEASED if kind is MultiLayerPool or name != "pos_emb.weight"]
    return {name: torch.randn(RELEASED[name], generator=generator).to(dtype) for name in names}


@pytest.fixture
def write(tmp_path):
    def save(content) -> str:
        torch.save(content, tmp_path / "attn_pool.pt")
        return tmp_path / "attn_pool.pt"

    return save


# --- the authors' files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_released_both_ways(kind, dtype, write):
    theirs = released(kind, dtype)
    pool = kind.from_released(write(theirs), num_heads=2)
    assert (pool.num_latents, pool.head_dim, pool.ff_mult, pool.residual) == (5, 8, 4, False)
    assert {p.dtype for p in pool.parameters()} == {dtype}
    assert torch.equal(pool.key_norm_weight, theirs["cross_attend_blocks.0.norm.weight"])
    assert torch.equal(pool.latent_norm_bias, theirs["cross_attend_blocks.0.norm_context.bias"])
    assert torch.equal(pool.key_weight, theirs["cross_attend_blocks.0.fn.to_kv.weight"][:16])
    assert torch.equal(pool.value_weight, theirs["cross_attend_blocks.0.fn.to_kv.weight"][16:])
    ours = pool.released_state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = kind.from_released(write(ours), num_heads=2)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pool.parameters(), strict=True))


@pytest.mark.parametrize("token_pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_released_file_gives_the_released_modules_embedding(kind, token_pooling, write):
    """The equations written out once more under the authors' own names."""
    c = {name: t.double() for name, t in released(kind).items()}
    block, ff = "cross_attend_blocks.0", "cross_attend_blocks.1"
    pool = kind.from_released(write(released(kind)), num_heads=2, token_pooling=token_pooling)
    states, mask = make_states(L, (3, 5, D)), make_mask(3, 5)

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (D,), c[f"{name}.weight"], c[f"{name}.bias"])

    def heads(x):
        return x.unflatten(-1, (2, -1)).transpose(-3, -2)

    rows = []
    for b, length in enumerate(mask.sum(1).tolist()):
        text = [s[b, :length].double() for s in states]
        x = torch.stack([t[-1] if token_pooling == "last" else t.mean(0) for t in text])
        if kind is LastLayerPool:
            x = text[-1][-1:] if token_pooling == "last" else text[-1]
        else:
            x = x + c["pos_emb.weight"]
        x, z = norm(x, f"{block}.norm"), norm(c["latents"], f"{block}.norm_context")
        q = heads(z @ c[f"{block}.fn.to_q.weight"].T)
        k, v = map(heads, (x @ c[f"{block}.fn.to_kv.weight"].T).chunk(2, -1))
        attention = (q @ k.mT / 8**0.5).softmax(-1)
        y = (attention @ v).transpose(-3, -2).flatten(-2) @ c[f"{block}.fn.to_out.weight"].T + c["latents"]
        inner = norm(y, f"{ff}.norm") @ c[f"{ff}.fn.net.0.weight"].T + c[f"{ff}.fn.net.0.bias"]
        a, gate = inner.chunk(2, -1)
        y = (a * torch.nn.functional.gelu(gate)) @ c[f"{ff}.fn.net.2.weight"].T + c[f"{ff}.fn.net.2.bias"] + y
        rows.append(torch.nn.functional.normalize(y.mean(0), dim=0))
    torch.testing.assert_close(use(pool, states, mask).double(), torch.stack(rows), atol=1e-5, rtol=0)


def test_released_needs_the_released_form():
    for pool in (multi(D, L), last(D)):
        with pytest.raises(ValueError, match="no residual gate"):
            pool.released_state_dict()


def test_released_keys_that_do_not_fit(write):
    def loads(kind, content, match, **options):
        with pytest.raises(ValueError, match=match):
            kind.from_released(write(content), **{"num_heads": 2, **options})

    whole = released()
    less = {name: t for name, t in whole.items() if not name.endswith("to_kv.weight") and name != "latents"}
    loads(MultiLayerPool, less, r"missing keys \['cross_attend_blocks.0.fn.to_kv.weight', 'latents'\]")
    loads(MultiLayerPool, {**whole, "cls": whole["latents"]}, r"missing keys \[\], unexpected keys \['cls'\]")
    loads(LastLayerPool, whole, "has layer weights: load it with MultiLayerPool.from_released")
    loads(MultiLayerPool, released(LastLayerPool), "no layer weights: load it with LastLayerPool.from_released")
    for name, shape in RELEASED.items():
        wrong = torch.zeros(*shape[:-1], shape[-1] + 1)
        loads(MultiLayerPool, {**whole, name: wrong}, r"is \[.*\], expected \[|not a multiple of D = 17")
    loads(MultiLayerPool, {**whole, "latents": torch.zeros(D)}, r"latents must be a matrix, got shape \[16\]")
    loads(MultiLayerPool, whole, "inner width of 16, which 3 heads do not divide; pass num_heads", num_heads=3)
    loads(MultiLayerPool, whole, "which 0 heads do not divide", num_heads=0)
    loads(MultiLayerPool, [whole["latents"]], "must hold a dict of tensors, got list")
    loads(MultiLayerPool, {**whole, "latents": 3}, "must hold a dict of tensors")


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self):
        return exec, ("raise SystemExit('this ran')",)


@pytest.mark.parametrize("kind", KINDS)
def test_released_files_that_are_broken(kind, write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no released checkpoint at .*none.pt; expected the authors'"):
        kind.from_released(tmp_path / "none.pt")
    path = write(released(kind))
    content = path.read_bytes()
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"attn_pool.pt (cannot be read|is damaged)"):
            kind.from_released(path)
    for bad in (Evil(), {**released(kind), "latents": Evil()}):
        with pytest.raises(ValueError, match="holds more than plain tensors, and is not loaded"):
            kind.from_released(write(bad))
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"holds more than plain tensors|cannot be read"):
        kind.from_released(path)


# --- our own folders -----------------------------------------------------------------------------------------------

POOLS = {
    "multi": lambda: multi(D, L), "subset": lambda: randomise(MultiLayerPool(D, L, **SMALL, layers=[0, -1])),
    "last": lambda: last(D, token_pooling="last"), "paper": lambda: randomise(MultiLayerPool.paper(D, L, **SMALL)),
    "eos": lambda: EosPool(D, normalize=False), "mean": lambda: MeanPool(D),
    "scalar": lambda: LayerWeightsPool(D, L, token_pooling="mean"),
    "bfloat16": lambda: multi(D, L, choices={"keys": "plain"}).bfloat16(),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_save_and_load(name, tmp_path):
    """The same config, dtype and numbers; safetensors and JSON, nothing else."""
    pool = POOLS[name]()
    pool.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "pool.safetensors"]
    again = type(pool).from_pretrained(str(folder))
    assert again.config() == pool.config()
    assert repr(again) == repr(pool)
    ours, theirs = pool.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert type(pool).from_pretrained(folder, backend="torch").backend == "torch"


def test_folders_from_before_the_mix(tmp_path):
    """Folders written when the gated residual and the softmax mix were the defaults load as what they were."""
    x0 = torch.randn(3, L, D)
    scalar = LayerWeightsPool(D, L, token_pooling="mean", mix="softmax")
    torch.nn.init.normal_(scalar.weights)
    sizes = {"hidden_size": D, "num_latents": 5, "num_heads": 2, "head_dim": 8, "ff_mult": 1, "token_pooling": "mean"}
    rest, read = {"normalize": True, "backend": "torch"}, {"num_layers": L, "layers": None, "skip_tokens": 0}
    for pool, config in (
        (multi(D, L, residual=True, token_pooling="mean"), {**sizes, **rest, **read, "residual": True, "choices": {}}),
        (last(D, residual=True, token_pooling="mean"), {**sizes, **rest, "residual": True, "choices": {}}),
        (scalar, {"hidden_size": D, "token_pooling": "mean", **rest, **read}),
    ):
        pool.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"pool": type(pool).__name__, **config}))
        loaded = type(pool).from_pretrained(tmp_path)
        tokens = {"hidden_states": x0, "attention_mask": torch.ones(3, L)}
        given = tokens if isinstance(pool, LastLayerPool) else {"layer_states": x0}
        assert torch.equal(loaded(**given), pool(**given))
        assert not loaded.learning_rates  # such a pool learns at the rate that it is given


def test_folders_that_are_broken(tmp_path):
    def loads(kind, error, match):
        with pytest.raises(error, match=match):
            kind.from_pretrained(tmp_path)

    config, weights = tmp_path / "config.json", tmp_path / "pool.safetensors"
    loads(MultiLayerPool, FileNotFoundError, "has no config.json; expected a folder written by save_pretrained")
    pool = multi(D, L, residual=True)
    pool.save_pretrained(tmp_path)
    loads(LastLayerPool, ValueError, r"holds a MultiLayerPool, not a LastLayerPool; load it with mlpool.MultiLayerPool")
    state, text, content = load_file(weights), config.read_text(), weights.read_bytes()

    for size in (0, 7, 100, len(content) - 1):
        weights.write_bytes(content[:size])
        loads(MultiLayerPool, ValueError, "pool.safetensors cannot be read, is it cut short")
    less = {key: t for key, t in state.items() if key != "gate"}
    for changed, match in (
        (less, "does not fit MultiLayerPool: missing gate"), ({**state, "door": torch.zeros(3)}, "unexpected door"),
        ({**state, "gate": torch.zeros(3)}, r"gate is \[3\], expected \[16\]"),
        ({**less, "latents": torch.zeros(2, 2)}, r"missing gate; latents is \[2, 2\], expected \[5, 16\]"),
    ):  # fmt: skip
        save_file(changed, weights)
        loads(MultiLayerPool, ValueError, match)
    weights.unlink()
    loads(MultiLayerPool, FileNotFoundError, "has no pool.safetensors")
    weights.write_bytes(content)
    config.write_text(text[:20])
    loads(MultiLayerPool, ValueError, "config.json is not valid JSON")
    for broken in ("[]", "null", "[" * 9999):
        config.write_text(broken)
        loads(MultiLayerPool, ValueError, "config.json (holds|is not valid JSON).*; copy it again")
    for changes, match in (
        ({"nmu_heads": 2}, "unknown key 'nmu_heads'; nearest: num_heads"), ({"device": "cpu"}, "unknown key 'device'"),
        ({"residual": "no"}, "config.json does not give a MultiLayerPool: residual must be .*, got 'no'"),
        ({"choices": [1]}, "choices must be a dict"), ({"layers": "a"}, "layers must be a list of integers, got 'a'"),
        ({"num_layers": None}, "num_layers must be an integer of at least 1"), ({"backend": 3}, "backend must be one"),
    ):  # fmt: skip
        config.write_text(json.dumps({**json.loads(text), **changes}))
        loads(MultiLayerPool, ValueError, match)
    config.write_text(text)
    for bad, match in ((torch.nan, "latents holds NaN"), (torch.inf, "latents holds infinity")):
        save_file({**state, "latents": state["latents"] * bad}, weights)
        loads(MultiLayerPool, ValueError, match)
    weights.write_bytes(content)
    config.write_text(json.dumps({**json.loads(text), "num_heads": 0}))
    loads(MultiLayerPool, ValueError, "num_heads must be an integer of at least 1, got 0")


def test_a_half_loaded_pool_is_not_left_behind(tmp_path):
    """What does not fit changes nothing: load_checked looks at everything before it writes anything."""
    from mlpool.pooling.base import load_checked

    pool = multi(D, L, residual=True)
    before = {key: t.clone() for key, t in pool.state_dict().items()}
    state = {**{key: t + 1 for key, t in before.items()}, "gate": torch.zeros(3)}
    with pytest.raises(ValueError, match="gate is"):
        load_checked(pool, state, "file")
    assert all(torch.equal(before[key], t) for key, t in pool.state_dict().items())
