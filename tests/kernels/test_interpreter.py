"""The Triton kernels, run by Triton's interpreter on the CPU, against the paper's equations.

The interpreter must be chosen before Triton is imported, so these tests have a process of their own:

    TRITON_INTERPRET=1 pytest tests/kernels/test_interpreter.py
"""

import functools
import importlib
import itertools
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process of its own: TRITON_INTERPRET=1 pytest tests/kernels/test_interpreter.py",
        allow_module_level=True,
    )

import torch
from conftest import (
    INTERPRETER,
    TORCH,
    assert_close_to_equations,
    last,
    make_mask,
    make_states,
    multi,
    ours,
    randomise,
    use,
    use_rows,
)  # fmt: skip
from contrast_cases import OPTIONS, assert_three_ways, texts
from contrast_cases import SIZES as CONTRAST
from hypothesis import given, settings
from hypothesis import strategies as st
from mlpool_kernels import Plan, reference
from mlpool_kernels import plan as cost_model
from mlpool_kernels.contrast import contrast
from mlpool_kernels.gather import gather_backward
from test_ops import check_embed, check_select, unit_batch

from mlpool import LastLayerPool, MultiLayerPool
from mlpool.pooling import gather, select_tokens

CONTRASTIVE, EMBED, feed_forward = (
    importlib.import_module(f"mlpool_kernels.{name}") for name in ("contrast", "embed", "feed_forward")
)

# NumPy warns: lanes past the end of a softmax row, never stored, divide zero by zero; some tests feed Inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# The form that gathers in the pool's own kernel; residual="mix" brings its rows to one length before.
multi = functools.partial(multi, residual=True)
GATHER, ATTEND = (importlib.import_module(f"mlpool_kernels.{name}") for name in ("gather", "attend"))
LAYERS, HIDDEN, LATENTS = (1, 6, 24, 28, 36, 80), (64, 384, 896, 1536), (1, 7, 64)
# Every pair of two sizes; 768 latents at a small D. The forms take turns.
FORMS = list(itertools.product(cost_model.LAUNCHES, cost_model.FEED_FORWARD, cost_model.VALUES, cost_model.MEMORY))
SIZES = [
    (layers, hidden, LATENTS[(i + j) % 3]) for i, layers in enumerate(LAYERS) for j, hidden in enumerate(HIDDEN)
] + [(layers, 64, 768) for layers in LAYERS]
PAIRWISE = [(*size, FORMS[5 * i % len(FORMS)]) for i, size in enumerate(SIZES)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def forms(form) -> dict[str, str]:
    return dict(zip(("launches", "feed_forward", "values", "memory"), form, strict=True))


def name(form) -> str:
    return "-".join(form)


@pytest.mark.parametrize(("layers", "hidden", "latents", "form"), PAIRWISE)
def test_sizes(layers, hidden, latents, form):
    pool = multi(hidden, layers, INTERPRETER, num_latents=latents, num_heads=1, head_dim=8, choices=forms(form))
    batch = 1 if hidden == 1536 else 2
    assert_close_to_equations(pool, make_states(layers, (batch, 2, hidden)), make_mask(batch, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", cost_model.KEYS)
@pytest.mark.parametrize("form", FORMS, ids=name)
def test_every_form(form, keys, dtype):
    """Odd sizes, tiles that end inside D, R and F; bfloat16 too, which the interpreter's dot gets wrong."""
    choices = {**forms(form), "keys": keys}
    pool = multi(72, 5, INTERPRETER, num_latents=9, num_heads=2, head_dim=8, choices=choices)
    assert_close_to_equations(pool, make_states(5, (2, 3, 72)), make_mask(2, 3), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", cost_model.VALUES)
@pytest.mark.parametrize("token_pooling", ["last", "mean"])
def test_last_layer(token_pooling, values, dtype):
    """Design 2, one key, and design 4, whose softmax streams over 70 tokens with the padding mask."""
    pool = last(40, INTERPRETER, num_latents=9, token_pooling=token_pooling, choices={"values": values})
    assert_close_to_equations(pool, make_states(1, (3, 70, 40)), make_mask(3, 70), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token_pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", ["multi", "last"])
def test_paper(kind, token_pooling, dtype):
    sizes = {"num_latents": 20, "num_heads": 2, "head_dim": 16, "token_pooling": token_pooling}
    pool = (
        MultiLayerPool.paper(24, 6, backend="triton", **sizes)
        if kind == "multi"
        else LastLayerPool.paper(24, backend="triton", **sizes)
    )
    assert_close_to_equations(randomise(pool), make_states(6, (3, 5, 24)), make_mask(3, 5, "left"), dtype)


@settings(max_examples=15, deadline=None)
@given(
    hidden=st.integers(4, 70), layers=st.integers(1, 9), num_latents=st.integers(1, 20), num_heads=st.integers(1, 3),
    batch=st.integers(1, 3), tokens=st.integers(1, 7), kind=st.sampled_from([multi, last]), seed=st.integers(0, 99),
    token_pooling=st.sampled_from(["last", "mean"]), form=st.sampled_from(FORMS),
    padding=st.sampled_from(["left", "right"]),
)  # fmt: skip
def test_any_size(kind, hidden, layers, batch, tokens, seed, form, padding, **options):
    if kind is multi:
        options["layers"] = layers
    pool = randomise(kind(hidden, target=INTERPRETER, choices=forms(form), **options), seed)
    assert_close_to_equations(
        pool, make_states(layers, (batch, tokens, hidden), seed=seed), make_mask(batch, tokens, padding, seed)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", cost_model.MIX)
@pytest.mark.parametrize("values", cost_model.VALUES)
def test_mix_by_kernel_and_by_product(values, mix, dtype, monkeypatch):
    """Both are exact, and the choice is what runs; with late values there is no kernel."""
    module, launched = importlib.import_module("mlpool_kernels.mix"), []
    kernel = module._mix_triton
    monkeypatch.setattr(module, "_mix_triton", lambda *args: launched.append(mix) or kernel(*args))
    pool = multi(72, 5, INTERPRETER, num_latents=9, num_heads=2, head_dim=8, choices={"values": values, "mix": mix})
    assert_close_to_equations(pool, make_states(5, (2, 3, 72)), make_mask(2, 3), dtype)
    assert bool(launched) == (mix == "kernel" and values != "late")


# --- feed-forward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "latents", "hidden", "width"),
    # Latents that divide a tile share it with other texts; tiles that end inside texts, D and F; groups of tiles.
    [(3, 9, 72, 40), (35, 8, 16, 72), (2, 130, 48, 130), (3, 64, 64, 100), (300, 1, 24, 16), (3, 7, 20, 33)],
)
def test_feed_forward_by_pointers_and_by_descriptors(batch, latents, hidden, width, dtype):
    """A tile of the copy engine reads rows of other texts and units of the other half, here NaN: none may count."""
    generator = torch.Generator().manual_seed(0)
    normed, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((batch, latents, hidden), (2 * width, hidden), (2 * width,))
    )
    normed[1] = torch.nan
    others = torch.arange(batch) != 1

    def plain(precision):
        both = (normed[others].to(precision) @ weight.to(precision).T) + bias.to(precision)
        a, g = both.chunk(2, -1)
        return (a * torch.nn.functional.gelu(g)).mean(1).double()

    exact = plain(torch.float64)
    limit = max(2 * (plain(dtype) - exact).norm() / exact.norm(), torch.finfo(dtype).eps)
    fits = feed_forward.takes_descriptors(normed, weight)
    assert fits == (dtype != torch.float32 and hidden % 8 == 0)
    for descriptors in (False, True) if fits else (False,):
        got = feed_forward._feed_forward_triton(normed, weight, bias, descriptors)
        assert (got[others].double() - exact).norm() / exact.norm() <= limit
        assert got[1].isnan().all()


# --- gather --------------------------------------------------------------------------------------------------------


def rounding(dtype):
    eps = torch.finfo(dtype).eps
    return {"rtol": 4 * eps, "atol": 8 * eps} if dtype == torch.float32 else {"rtol": eps, "atol": eps}


def assert_same(got, states, want, wide):
    """Values, and gradients by the states, to the precision of `got`; want and wide are their float64 counterparts."""
    close = rounding(got.dtype)
    torch.testing.assert_close(got.double(), want, **close)
    grad = torch.randn(want.shape).to(got.dtype)
    for mine, exact in zip(
        torch.autograd.grad(got, states, grad), torch.autograd.grad(want, wide, grad.double()), strict=True
    ):
        torch.testing.assert_close(mine.double(), exact, **close)


@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layers", "hidden"), [(1, 7), (3, 300), (80, 16)])
def test_gather(layers, hidden, how, dtype):
    """Values and gradients of padded states, and of the same texts packed."""
    batch, tokens = (2, 3) if layers == 80 else (3, 20)
    mask = make_mask(batch, tokens, "left")
    states = [s.requires_grad_() for s in make_states(layers, (batch, tokens, hidden), dtype=dtype)]
    wide = [s.detach().double().requires_grad_() for s in states]
    got, want = gather(states, mask, token_pooling=how, backend="triton"), reference.gather(wide, mask, how)
    assert_same(got, states, want, wide)

    packed = [s.detach()[mask.bool()] for s in states]
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    for view in (packed, [p[None] for p in packed]):
        again = gather(view, cu_seqlens=offsets, token_pooling=how, backend="triton")
        torch.testing.assert_close(again.double(), want, **rounding(dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["mean", "unit_mean"])
@pytest.mark.parametrize("packed", [False, True])
def test_long_texts_are_summed_in_parts(packed, how, dtype, monkeypatch):
    """Texts of 1 to 75 rows in up to 8 parts, some empty, a left-out run at a part's edge; and the gradients."""
    monkeypatch.setattr(GATHER, "PART_ROWS", 10)
    monkeypatch.setattr(GATHER, "PROGRAMS", 1000)
    kernel = GATHER._mean_kernel
    grids = []
    monkeypatch.setattr(GATHER, "_mean_kernel", _Counted(kernel, grids))
    mask = make_mask(3, 75, "left")
    mask[0, 18:31] = 0
    states = make_states(2, (3, 75, 37), dtype=dtype)
    where = {"attention_mask": mask}
    if packed:
        rows = torch.cat([torch.arange(75 * b, 75 * b + 75)[n:] for b, n in enumerate((0, 40, 74))])
        states = [s.flatten(0, 1)[rows] for s in states]
        keep = torch.ones(len(rows), dtype=torch.bool)
        keep[18:31] = False
        where = {"cu_seqlens": torch.tensor([0, 75, 110, 111]), "token_mask": keep}
    states = [s.requires_grad_() for s in states]
    wide = [s.detach().double().requires_grad_() for s in states]
    got = gather(states, token_pooling=how, backend="triton", **where)
    want = gather(wide, token_pooling=how, backend="torch", **where)
    assert len(grids) == 2  # the parts, and their sum
    assert grids[0][0] > 3
    assert_same(got, states, want, wide)


class _Counted:
    """A kernel that notes the grids it is launched with."""

    def __init__(self, kernel, grids):
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
def test_a_gradient_added_to_the_state_s_own(how, dtype):
    """As taps ask, with rows before, between and behind packed texts; out of place; the same numbers as in torch."""
    mask = torch.tensor([[0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]])
    padded = select_tokens((2, 6, 20), torch.device("cpu"), mask)
    packed = select_tokens((1, 12, 20), torch.device("cpu"), None, torch.tensor([1, 2, 8, 11]))
    for t in (padded, packed):
        grad = torch.randn(t.batch_size, 1, 20).to(dtype)
        added = torch.randn(12, 20).to(dtype)
        given = added.clone()
        spans = (t.starts, t.ends, t.last, t.count, t.keep, how != "last")
        states = [torch.randn((*t.shape, 20)).to(dtype)] if how == "unit_mean" else []
        for more in (None, added):
            got, want = (
                gather_backward(grad, (12, 20), *spans, backend, more, states)[0] for backend in ("triton", "torch")
            )
            torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        assert torch.equal(added, given)
    grad = torch.randn(2, 1, 20, requires_grad=True)
    spans = (padded.starts, padded.ends, padded.last, padded.count, padded.keep, True)
    (again,) = gather_backward(grad, (12, 20), *spans, "triton")
    with pytest.raises(RuntimeError, match="autograd"):  # a kernel cannot be differentiated again: said, not wrong
        again.sum().backward()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_mean_of_zeros_and_nan(dtype):
    """As in torch, with zero tokens, a text of zeros alone and padding of NaN."""
    states, _, mask = unit_batch(dtype, INTERPRETER)
    got, want = (gather(states, mask, token_pooling="unit_mean", backend=backend) for backend in ("triton", "torch"))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=2 * eps, atol=2 * eps)
    grad = torch.randn(want.shape).to(dtype)
    for mine, theirs in zip(*(torch.autograd.grad(out, states, grad) for out in (got, want)), strict=True):
        # A tiny token's gradient is huge, a huge one's tiny: row by row.
        torch.testing.assert_close(mine, theirs, rtol=8 * eps, atol=4 * eps * theirs.abs().max().item())
        assert not mine[2].any()
        assert not mine[mask == 0].any()


@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
def test_strided_hidden_states(how):
    """Transposed and sliced states are read where they lie, in one launch or, where D is strided, layer by layer."""
    base = torch.randn(6, 3, 64)
    pool = multi(32, 2, INTERPRETER, token_pooling=how)
    mask = make_mask(3, 6)
    for view in (base.transpose(0, 1)[:, :, :32], base.transpose(0, 1)[:, :, ::2], base.transpose(0, 1)[..., 32:]):
        assert_close_to_equations(pool, [view, view.flip(0) if view.stride(2) == 1 else view], mask)


@pytest.mark.parametrize("launches", cost_model.LAUNCHES)
@pytest.mark.parametrize("memory", cost_model.MEMORY)
def test_strided_layer_states(launches, memory):
    """X0 given as it lies: every stride, also that of D, is respected, forward and backward."""
    pool = multi(32, 5, INTERPRETER, choices={"launches": launches, "memory": memory})
    plain = multi(32, 5, TORCH)
    base = torch.randn(3, 5, 64)
    views = (base[:, :, :32], torch.randn(5, 3, 32).transpose(0, 1), base[:, :, ::2], torch.randn(3, 32, 5).mT)
    for view in views:
        got, want = (ours(p, [view], use_rows) for p in (pool, plain))
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, atol=1e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


# --- what a kernel may not do --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("form", FORMS[::2], ids=name)
def test_nothing_is_left_unwritten(form, dtype):
    """Uninitialised memory holds NaN; every output and gradient is written all the same."""
    for pool in (multi(24, 3, INTERPRETER, choices=forms(form)), last(24, INTERPRETER, choices=forms(form))):
        assert_close_to_equations(pool, make_states(3, (2, 4, 24)), make_mask(2, 4), dtype)


@pytest.mark.parametrize("how", ["last", "mean"])
@pytest.mark.parametrize("kind", [multi, last])
def test_nan_in_padding_and_in_one_text(kind, how):
    """Padding reaches nothing; a text that holds NaN is NaN alone, and so are its gradients."""
    pool, mask = kind(16, target=INTERPRETER, token_pooling=how), make_mask(4, 5)
    states = make_states(4 if kind is multi else 1, (4, 5, 16))
    clean = ours(pool, states, use, mask)
    soiled = [torch.where(mask[:, :, None] == 0, torch.nan, s) for s in states]
    for key, value in ours(pool, soiled, use, mask).items():
        assert torch.equal(value, clean[key]), key
    states = [s.index_fill(0, torch.tensor([2]), torch.nan) for s in states]
    result = ours(pool, states, use, mask)
    others = torch.tensor([0, 1, 3])
    assert result["output"][2].isnan().all()
    for key in ("output", *(f"states[{i}]" for i in range(len(states)))):
        assert torch.isfinite(result[key][others]).all(), key


@pytest.mark.parametrize("launches", ["one", "two"])
def test_states_out_of_range_are_nan_and_not_zeros(launches, monkeypatch):
    """Where nobody looks beforehand, as on a GPU, their text alone has no number; its squares are none of float32."""
    for place in ("trainable", "mix"):
        monkeypatch.setattr(f"mlpool.pooling.{place}.check_range", lambda *_: None)
    pool, (rows,) = multi(target=INTERPRETER, choices={"launches": launches}), make_states(1, (3, 4, 16))
    want = use_rows(pool, [rows])
    rows[1, 2] *= 1e20
    got = use_rows(pool, [rows])
    assert got[1].isnan().all()
    assert torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("launches", cost_model.LAUNCHES)
@pytest.mark.parametrize("how", ["last", "mean"])
def test_a_mix_of_layers(how, launches):
    pool = multi(24, 3, INTERPRETER, residual="mix", token_pooling=how, choices={"launches": launches})
    assert_close_to_equations(pool, make_states(3, (2, 3, 24)), make_mask(2, 3))


@pytest.mark.parametrize("form", FORMS[::5], ids=name)
def test_bitwise_from_run_to_run(form):
    pool = multi(40, 3, INTERPRETER, num_latents=20, choices=forms(form))
    states, mask = make_states(3, (2, 3, 40)), make_mask(2, 3)
    first, second = (ours(pool, states, use, mask) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_columns_of_a_text_in_one_program(dtype, monkeypatch):
    """What many texts get: here with two, an odd number of columns, rows gathered and given."""
    monkeypatch.setattr(ATTEND, "MANY_TEXTS", 1)
    pool = multi(72, 5, INTERPRETER, num_latents=9, num_heads=3, head_dim=8, choices={"launches": "one"})
    assert_close_to_equations(pool, make_states(5, (2, 3, 72)), make_mask(2, 3), dtype)
    rows = torch.randn(2, 5, 72).to(dtype)
    plain = multi(72, 5, TORCH, num_latents=9, num_heads=3, head_dim=8).to(dtype)
    torch.testing.assert_close(
        use_rows(pool, [rows]), use_rows(plain, [rows]), atol=3e-2 if dtype != DTYPES[0] else 1e-5, rtol=0
    )


@pytest.mark.parametrize("memory", cost_model.MEMORY)
@pytest.mark.parametrize("launches", cost_model.LAUNCHES)
@pytest.mark.parametrize("keys", cost_model.KEYS)
@pytest.mark.parametrize("kind", [multi, last])
def test_attention_weights_and_their_gradient(kind, keys, launches, memory):
    """As on the torch path, with every form of the scores."""
    choices = {"keys": keys, "launches": launches, "memory": memory}
    got, want = (
        ours(kind(24, target=target, choices=choices), make_states(4 if kind is multi else 1, (2, 4, 24)), attend)
        for target in (INTERPRETER, TORCH)
    )
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, atol=1e-5, rtol=1e-4)


def attend(pool, states):
    """Embedding and attention weights of a batch, in one tensor [B, ·]."""
    both = use(pool, states, make_mask(2, 4), output_attentions=True)
    return torch.cat([t.flatten(1) for t in both], 1)


@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
def test_opcheck(how):
    """torch's checks of the registrations with the kernels behind them, hidden states read by the pool's own launch."""
    pool = multi(24, 3, INTERPRETER)
    mask = make_mask(2, 4)
    states = [s.requires_grad_() for s in make_states(3, (2, 4, 24))]
    t = select_tokens(states[0].shape, states[0].device, mask)
    arguments = (states, t.starts, t.ends, t.last, t.count, t.keep, how != "last", "triton", how == "unit_mean")
    torch.library.opcheck(torch.ops.mlpool.gather.default, arguments)
    if how != "last":
        return
    for plan in (
        Plan(launches="one", mix="kernel"),
        Plan("plain", "late", memory="recompute"),
        Plan(memory="recompute_ff"),
    ):
        weights = pool._fold(plan, one_key=False)
        weights = [None if w is None else w.detach().requires_grad_() for w in weights]
        arguments = (
            states, t.last, None, pool.layer_weights, pool.key_norm_weight, pool.key_norm_bias, *weights, pool.latents,
            pool.ff_norm_weight, pool.ff_norm_bias, pool.ff_in_weight, pool.ff_in_bias, 2, str(plan), "triton", True,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.mlpool.pool.default, arguments)


def test_evaluation_uses_the_folded_cache():
    """no_grad and eval: the direct call, chunk by chunk, equals the differentiable one; also folded."""
    pool, mask = multi(24, 3, INTERPRETER).eval(), make_mask(3, 4)
    states = make_states(3, (3, 4, 24))
    want = use(pool, states, mask)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(use(pool, states, mask), want, atol=1e-6, rtol=0)
        torch.testing.assert_close(use(pool.fold(), states, mask), want, atol=1e-6, rtol=0)


def test_gradients_for_the_upper_layers_alone():
    """LoRA on the last layers: the first state needs no gradient, the last gets its own; a folded pool refuses."""
    states, mask = make_states(3, (2, 4, 24)), make_mask(2, 4)
    for frozen in (False, True):
        want, got = (multi(24, 3, target).requires_grad_(not frozen) for target in (TORCH, INTERPRETER))
        states[-1].requires_grad_()
        grads = [torch.autograd.grad(use(pool, states, mask)[:, 0].sum(), states[-1])[0] for pool in (got, want)]
        torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
    with pytest.raises(RuntimeError, match="a folded pool is for inference"):
        use(multi(24, 3, INTERPRETER).fold(), states, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("base", "gate", "normalize"), [(True, True, True), (True, False, False), (False, False, True)]
)
def test_embed(base, gate, normalize, dtype):
    check_embed(base, gate, normalize, dtype, INTERPRETER, hidden=72)


def test_embed_of_zeros_of_huge_numbers_and_of_nan():
    rows = torch.tensor([[0.0, 0, 0], [3e30, 4e30, 0], [3e-38, 4e-38, 0], [torch.nan, 1, 0]])
    zeros = torch.zeros(3)
    e = EMBED.embed(rows, zeros, torch.zeros(4, 3), None, None, True, torch.float32, "triton")
    torch.testing.assert_close(e[:3], torch.tensor([[0, 0, 0], [0.6, 0.8, 0], [0.6, 0.8, 0]]), rtol=1e-6, atol=1e-6)
    assert e[3].isnan().all()


@pytest.mark.parametrize("latents", [1, 2])
def test_gradients_of_the_scores_whatever_a_product_left_them_in(latents, monkeypatch):
    """A batched product of a GPU leaves dA in memory as it likes where a size is 1; the kernel reads rows."""
    original = ATTEND.softmax_backward_

    def scattered(attention, grad, triton):
        return original(attention, grad.transpose(1, 2).contiguous().transpose(1, 2), triton)

    monkeypatch.setattr(ATTEND, "softmax_backward_", scattered)
    pool = multi(16, 6, INTERPRETER, num_latents=latents, num_heads=2)
    assert_close_to_equations(pool, make_states(6, (2, 3, 16), INTERPRETER), make_mask(2, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize(("skip", "second"), [(0, False), (2, True)])
@pytest.mark.parametrize("length", [7, 2500])
def test_select(length, skip, second, dtype):
    check_select(INTERPRETER, length, skip, second, dtype)


# --- contrast ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "m", "hidden", "workspace"), [(*CONTRAST[0], 1 << 20), (*CONTRAST[1], 32 << 10)])
def test_contrast(n, m, hidden, options, dtype, workspace, monkeypatch):
    """Losses and gradients, with every mask and with prefixes, the weights in one block and in many."""
    monkeypatch.setattr(CONTRASTIVE, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(CONTRASTIVE, "PARTS", workspace >> 10)
    arguments, options = texts(n, m, hidden, dtype, OPTIONS[options])
    assert_three_ways(lambda *a, **o: contrast(*a, **o, backend="triton"), arguments, options)


def test_opcheck_contrast():
    (rows, others, partners), options = texts(5, 9, 8, torch.float32, OPTIONS["all"])
    given = (partners, options["row_keys"], options["other_keys"], torch.full((5,), 0.5), [2, 5], 0.1, "triton")
    torch.library.opcheck(torch.ops.mlpool.contrast.default, (rows.requires_grad_(), others.requires_grad_(), *given))
