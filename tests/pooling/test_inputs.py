"""Bad input: every error names what came and what was expected."""

import functools

import pytest
import torch
from conftest import SMALL, last, make_states, multi
from mlpool_kernels.embed import unit
from torch.testing import assert_close

from mlpool import EosPool, LastLayerPool, LayerWeightsPool, MeanPool, MultiLayerPool, gather
from mlpool.pooling import select_tokens

D, L, B, T = 16, 4, 3, 5
STATES = make_states(L + 1, (B, T, D))
MASK = torch.ones(B, T, dtype=torch.long)
MULTI = [multi(D, L), LayerWeightsPool(D, L)]
LAST = [last(D), last(D, token_pooling="last"), EosPool(D), MeanPool(D)]
every_pool = pytest.mark.parametrize("pool", [*MULTI, *LAST], ids=lambda p: type(p).__name__)
every_trainable = pytest.mark.parametrize("pool", [MULTI[0], *LAST[:2]], ids=["multi", "mean", "last"])
multi_pool = pytest.mark.parametrize("pool", MULTI, ids=lambda p: type(p).__name__)


def raises(kind, match):
    return pytest.raises(kind, match=match)


# --- layers --------------------------------------------------------------------------------------------------------


@multi_pool
def test_wrong_number_of_layers(pool):
    with raises(ValueError, r"expected 5 hidden states \(the embedding and 4 layers\), got 3$"):
        pool(STATES[:3], MASK)
    with raises(ValueError, r"expected 5 hidden states.*got 4; these look like the L layers.*includes_embedding=False"):
        pool(STATES[1:], MASK)
    with raises(ValueError, r"expected 4 hidden states \(4 layers\), got 5; .*embedding first: leave out"):
        pool(STATES, MASK, includes_embedding=False)


@every_pool
def test_no_layers(pool):
    for empty in ((), []):
        with raises(ValueError, r"hidden_states is empty.*output_hidden_states=True"):
            pool(empty, MASK)
    with raises(ValueError, "hidden_states is empty"):
        gather([], MASK)


@multi_pool
def test_layers_of_different_shape_or_dtype(pool):
    with raises(ValueError, r"one shape: \[0\] is \[3, 5, 16\], \[2\] is \[3, 4, 16\]"):
        pool([*STATES[:2], STATES[2][:, :4], *STATES[3:]], MASK)
    with raises(TypeError, r"one floating dtype: \[0\] is torch.float32, \[4\] is torch.bfloat16"):
        pool([*STATES[:4], STATES[4].bfloat16()], MASK)
    with raises(TypeError, r"one floating dtype: \[0\] is torch.int64"):
        pool([s.long() for s in STATES], MASK)
    with raises(TypeError, r"hidden_states\[1\] must be a tensor, got list"):
        pool([STATES[0], STATES[1].tolist(), *STATES[2:]], MASK)


@multi_pool
def test_one_tensor_where_a_tuple_was_expected(pool):
    with raises(TypeError, r"sequence of 5 tensors \[B, T, D\], got one tensor of shape \[3, 5, 16\].*layer_states="):
        pool(STATES[0], MASK)


@every_pool
def test_wrong_hidden_size(pool):
    with raises(ValueError, r"must have D = 16, got shape \[3, 5, 8\]"):
        pool([s[..., :8] for s in STATES], MASK)


@multi_pool
def test_layer_states(pool):
    rows = torch.randn(B, L, D)
    with raises(ValueError, "got both hidden_states and layer_states"):
        pool(STATES, MASK, layer_states=rows)
    with raises(ValueError, "got neither hidden_states nor layer_states"):
        pool()
    for bad in (rows[:, :3], rows[..., :8], rows[0]):
        with raises(ValueError, r"layer_states must be \[B, 4, 16\], got \["):
            pool(layer_states=bad)
    with raises(ValueError, r"batch of no texts \(layer_states \[0, 4, 16\]\)"):
        pool(layer_states=rows[:0])
    with raises(TypeError, "layer_states must be floating, got torch.int64"):
        pool(layer_states=rows.long())


# --- batches, masks, offsets ---------------------------------------------------------------------------------------


@every_pool
def test_no_texts_and_no_tokens(pool):
    with raises(ValueError, r"batch of no texts \(hidden states \[0, 5, 16\]\); B must be at least 1"):
        pool([s[:0] for s in STATES], MASK[:0])
    with raises(ValueError, r"texts of no tokens \(hidden states \[3, 0, 16\]\); T must be at least 1"):
        pool([s[:, :0] for s in STATES], MASK[:, :0])


@every_pool
def test_both_or_neither_of_mask_and_offsets(pool):
    with raises(ValueError, r"got neither attention_mask nor cu_seqlens; pass attention_mask \[B, T\]"):
        pool(STATES)
    with raises(ValueError, "got both attention_mask and cu_seqlens"):
        pool(STATES, MASK, cu_seqlens=torch.tensor([0, 5]))


@every_pool
def test_masks_that_do_not_fit(pool):
    for name in ("attention_mask", "token_mask"):
        call = functools.partial(pool, STATES, **({"attention_mask": MASK} if name == "token_mask" else {}))
        for bad in (MASK[:2], MASK[:, :3], MASK[0], MASK.T):
            with raises(ValueError, rf"{name} must be \[3, 5\] like the hidden states, got \["):
                call(**{name: bad})
        with raises(ValueError, rf"{name} must be .* got \[3, 1, 5, 5\] \(a 4-dimensional attention mask"):
            call(**{name: torch.ones(B, 1, T, T)})
        with raises(ValueError, rf"{name} of dtype torch.float32 holds values other than 0 and 1; an additive mask"):
            call(**{name: torch.zeros(B, T).index_fill(1, torch.tensor([0]), -torch.inf)})
        with raises(TypeError, rf"{name} must be bool, integer or float of 0 and 1, got torch.complex64"):
            call(**{name: MASK.to(torch.complex64)})


@every_pool
def test_a_text_without_a_token_is_named(pool):
    mask = MASK.clone()
    mask[1] = 0
    with raises(ValueError, r"no token left by attention_mask in row\(s\) \[1\]"):
        pool(STATES, mask)
    with raises(ValueError, r"no token left by attention_mask and token_mask in row\(s\) \[1\]"):
        pool(STATES, MASK, token_mask=mask)
    flat = [s.flatten(0, 1) for s in STATES]
    with raises(ValueError, r"no token left by token_mask in row\(s\) \[1\]"):
        pool(flat, cu_seqlens=torch.arange(4) * T, token_mask=mask.flatten())


@every_pool
def test_offsets_that_do_not_fit(pool):
    flat = [s.flatten(0, 1) for s in STATES]

    def packed(*offsets, states=flat, dtype=torch.int32):
        return pool(states, cu_seqlens=torch.tensor(offsets, dtype=dtype))

    with raises(ValueError, r"must increase: text\(s\) \[1\] have no token or a negative length \(offsets 5 to 5\)"):
        packed(0, 5, 5, 15)
    with raises(ValueError, r"must increase: text\(s\) \[1\].*\(offsets 9 to 4\)"):
        packed(0, 9, 4, 15)
    with raises(ValueError, "cu_seqlens runs from 0 to 16, but there are 15 packed rows"):
        packed(0, 5, 16)
    with raises(ValueError, "cu_seqlens runs from -1 to 15"):
        packed(-1, 5, 15)
    with raises(ValueError, r"cu_seqlens must be \[B\+1\] with B at least 1, got shape \[1\]"):
        packed(0)
    with raises(ValueError, r"cu_seqlens must be \[B\+1\] with B at least 1, got shape \[1, 2\]"):
        packed([0, 5])
    with raises(TypeError, "cu_seqlens must be int32 or int64, got torch.float32"):
        packed(0, 15, dtype=torch.float32)
    with raises(ValueError, r"packed hidden states must be \[total, D\] or \[1, total, D\], got shape \[3, 5, 16\]"):
        packed(0, 5, 15, states=STATES)
    with raises(ValueError, r"hidden states must be \[B, T, D\] with attention_mask, got shape \[15, 16\]"):
        pool(flat, MASK)
    with raises(ValueError, r"token_mask must be \[1, 15\] like the hidden states, got \[1, 14\]"):
        pool(flat, cu_seqlens=torch.tensor([0, 15]), token_mask=torch.ones(14))


def test_selected_tokens():
    """starts, ends, last, count and keep of a padded and of a packed batch."""
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    t = select_tokens((2, 4, D), torch.device("cpu"), mask, token_mask=torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]))
    assert [x.tolist() for x in (t.starts, t.ends, t.last, t.count)] == [[0, 4], [4, 8], [1, 7], [1, 3]]
    assert t.keep.tolist() == [False, True, False, False, False, True, True, True]
    assert (t.batch_size, t.shape, t.packed) == (2, (2, 4), False)
    offsets, mask = torch.tensor([1, 3, 8]), torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1])
    t = select_tokens((9, D), torch.device("cpu"), cu_seqlens=offsets, token_mask=mask)
    assert [x.tolist() for x in (t.starts, t.ends, t.last, t.count)] == [[1, 3], [3, 8], [1, 5], [1, 3]]
    assert t.keep.nonzero().flatten().tolist() == [1, 3, 4, 5]
    moved = t.to(torch.device("meta"))
    assert {x.device.type for x in (moved.starts, moved.ends, moved.last, moved.count, moved.keep)} == {"meta"}


# --- constructors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["multi", "last"])
@pytest.mark.parametrize("bad", [0, -1, 2.0, True, None])
@pytest.mark.parametrize("name", ["hidden_size", "num_layers", "num_latents", "num_heads", "head_dim", "ff_mult"])
def test_sizes(name, bad, kind):
    options = {"hidden_size": D, "num_layers": L, **SMALL, name: bad}
    if kind == "last":
        del options["num_layers"]
        if name == "num_layers":
            return
    with raises(ValueError, rf"{name} must be an integer of at least 1, got {bad}"):
        (MultiLayerPool if kind == "multi" else LastLayerPool)(**options)


def test_sizes_of_the_simple_pools():
    for make, name in (
        (lambda: EosPool(0), "hidden_size"), (lambda: MeanPool(-1), "hidden_size"),
        (lambda: LayerWeightsPool(0, L), "hidden_size"), (lambda: LayerWeightsPool(D, 0), "num_layers"),
    ):  # fmt: skip
        with raises(ValueError, f"{name} must be an integer of at least 1"):
            make()


@pytest.mark.parametrize("kind", [MultiLayerPool, LayerWeightsPool])
def test_layers_subset(kind):
    for bad, message in (
        ([], r"at least one of 0 … 3 \(or -4 … -1\), got \[\]"), ([4], r"got \[4\]"), ([-5], r"got \[-5\]"),
        ([1, 0], r"must increase and not repeat, got \[1, 0\]"), ([0, -4], "must increase and not repeat"),
    ):  # fmt: skip
        with raises(ValueError, message):
            kind(D, L, layers=bad)


@pytest.mark.parametrize("make", [lambda **o: MultiLayerPool(D, L, **o), lambda **o: LastLayerPool(D, **o)])
def test_choices(make):
    with raises(ValueError, r"token_pooling must be one of \('last', 'mean'.*\), got 'cls'"):
        make(token_pooling="cls")
    with raises(ValueError, r"backend must be one of \('auto', 'triton', 'torch'\), got 'cuda'"):
        make(backend="cuda")
    with raises(ValueError, "unknown plan entry 'key'"):
        make(choices={"key": "plain"})
    with raises(ValueError, r"plan entry 'memory' must be one of \('save', 'recompute_ff', 'recompute'\), got 'none'"):
        make(choices={"memory": "none"})
    with raises(ValueError, r"token_pooling must be one of"):
        gather(STATES, MASK, token_pooling="cls")


@pytest.mark.parametrize("kind", [EosPool, MeanPool, LayerWeightsPool])
def test_backend_of_the_simple_pools(kind):
    pool = kind(D, backend="cuda") if kind is not LayerWeightsPool else kind(D, L, backend="cuda")
    with raises(ValueError, r"backend must be one of .*got 'cuda'"):
        pool(STATES, MASK)


@every_pool
def test_triton_on_the_cpu_outside_the_interpreter(pool, monkeypatch):
    monkeypatch.setattr("mlpool_kernels.runtime.INTERPRETED", False)
    monkeypatch.setattr(pool, "backend", "triton")
    with raises(ValueError, r'backend="triton" needs CUDA tensors, got cpu; .*TRITON_INTERPRET=1'):
        pool(STATES, MASK)
    monkeypatch.setattr("mlpool_kernels.runtime.HAS_TRITON", False)
    with raises(ModuleNotFoundError, r'needs Triton: pip install "triton'):
        pool(STATES, MASK)


def test_a_folded_pool_does_not_train():
    folded = multi(D, L).fold()
    with raises(ValueError, "folded already"):
        folded.fold()
    with raises(RuntimeError, "a folded pool is for inference; use the pool it was folded from to train"):
        folded([s.clone().requires_grad_() for s in STATES], MASK)
    with raises(ValueError, "no residual gate and no folded weights"):
        folded.released_state_dict()
    with raises(ValueError, "a folded pool is not saved"):
        folded.save_pretrained("unused")


def test_folded_pool_with_gradients_for_some_layers():
    """A backbone that learns in its last layer alone is not silently given half a gradient."""
    states = [s.clone() for s in STATES]
    states[-1].requires_grad_()
    with raises(RuntimeError, "a folded pool is for inference"):
        multi(D, L).fold()(states, MASK)


# --- sizes of numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_unit_length_of_any_finite_size(dtype):
    """1e20 gave zeros, 1e-30 something shorter than 1; ordinary vectors keep every digit."""
    torch.manual_seed(0)
    ordinary = torch.randn(7, 33, dtype=dtype)
    assert torch.equal(unit(ordinary), torch.nn.functional.normalize(ordinary, dim=-1))
    exact = torch.nn.functional.normalize(ordinary.double(), dim=-1)
    info = torch.finfo(dtype)
    for size in (info.max / 8, info.max**0.75, info.tiny**0.75, info.tiny * 8):
        rows = (ordinary.double() * size).to(dtype)
        assert rows.isfinite().all()
        found = unit(rows)
        assert (found.double() - exact).abs().max() < 8 * info.eps
    assert not unit(torch.zeros(2, 3, dtype=dtype)).any()
    assert unit(torch.tensor([[torch.inf, 1]], dtype=dtype)).isnan().any()


def test_unit_length_compiled_and_its_gradient():
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, x)
    large = torch.randn(3, 16) * 1e30
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(large), unit(large))
    large.requires_grad_()
    unit(large)[:, 0].sum().backward()
    assert large.grad.isfinite().all()


@pytest.mark.parametrize("kind", [EosPool, MeanPool])
def test_large_states_are_pooled(kind):
    states = torch.randn(B, T, D)
    pool = kind(D)
    assert_close(pool(states * 1e25, MASK), pool(states, MASK), atol=1e-6, rtol=0)


@every_trainable
def test_states_beyond_layer_norms_are_named(pool):
    states = [s.clone() for s in STATES]
    states[-1][1] *= 1e20
    with raises(ValueError, r"row 1: its hidden states reach \d\.\de\+2\d.*use float64"):
        pool(states, MASK)
    large = [s * 1e14 for s in STATES]
    assert pool(large, MASK).isfinite().all()


# --- wrong types ---------------------------------------------------------------------------------------------------


@every_trainable
def test_flags_and_choices(pool):
    config = pool.config()
    for name, known in (("residual", '"mix", True or False'), ("normalize", "True or False")):
        with raises(ValueError, f"{name} must be {known}, got 'no'"):
            type(pool)(**{**config, name: "no"})
    with raises(ValueError, 'residual must be "mix", True or False, got 1'):
        type(pool)(**{**config, "residual": 1})
    with raises(ValueError, r"choices must be a dict such as .*, got \[1\]"):
        type(pool)(**{**config, "choices": [1]})


def test_lists_where_tensors_belong():
    pool = MultiLayerPool(D, L, num_latents=2, num_heads=1, head_dim=8)
    with raises(TypeError, r"layer_states must be a tensor \[B, 4, 16\], got list"):
        pool(layer_states=[[0.0]])
    with raises(TypeError, r"cu_seqlens must be an int32 or int64 tensor \[B\+1\], got list"):
        pool([s.reshape(-1, D) for s in STATES], cu_seqlens=[0, 5, 10, 15])
    for bad in ("ab", [1.5], [None], 3):
        with raises(ValueError, "layers must be a list of integers, got"):
            MultiLayerPool(D, L, layers=bad)
