"""The two ops by themselves: torch's own checks, exact gradients in float64, strides and NaN."""

import itertools

import pytest
import torch
from conftest import GPU, Target, make_mask, make_states
from hypothesis import given, settings
from hypothesis import strategies as st
from mlpool_kernels import Plan, Weights, embed, fold_queries, fold_values, gather, pool, reference
from mlpool_kernels import plan as cost_model
from mlpool_kernels.fold import _AbsorbFunction

from mlpool.pooling import gather as gather_states
from mlpool.pooling import select_tokens

FORMS = list(itertools.product(cost_model.KEYS, cost_model.VALUES, cost_model.MEMORY))
# Each on raw rows or on rows of one length with their mix, in turn; whatever the keys, the values' forms meet both.
MIXED_FORMS = [(*form, bool(i % 2)) for i, form in enumerate(FORMS)]


def spans(shape, mask=None, **options):
    t = select_tokens(torch.Size(shape), torch.device("cpu"), mask, **options)
    return t.starts, t.ends, t.last, t.count, t.keep


def weights(
    form_keys, form_values, *, keys=3, hidden=8, latents=4, heads=2, head_dim=4, one_key=False, mixing=False, dtype=None
):  # fmt: skip
    """Random weights of the op in the forms named, each a leaf."""
    generator = torch.Generator().manual_seed(1)

    def new(*shape):
        t = torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5
        return t.to(dtype or torch.float64).requires_grad_()

    inner = heads * head_dim
    queries, key = (
        (new(heads * latents, hidden), None) if form_keys == "absorbed" else (new(heads, latents, head_dim), None)
    )
    if form_keys == "plain":
        key = new(inner, hidden)
    if one_key:
        queries = key = None
    value, output = (
        (new(heads * hidden, hidden), None) if form_values == "absorbed" else (new(inner, hidden), new(hidden, inner))
    )
    w = Weights(
        new(keys, hidden), new(hidden), new(hidden), queries, key, value, output, new(latents, hidden), new(hidden),
        new(hidden), new(2 * hidden, hidden), new(2 * hidden), new(keys) if mixing else None,
    )  # fmt: skip
    return w, new(hidden, hidden), new(hidden)


def pool_arguments(w, states, key_mask, plan, attentions):
    return ([states], None, key_mask, *w, 2, str(plan), "torch", attentions)


# Whether it is a mean, and whether of unit tokens.
POOLINGS = [pytest.param((False, False), id="last"), pytest.param((True, False), id="mean"),
            pytest.param((True, True), id="unit_mean")]  # fmt: skip


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch", ["padded", "packed", "packed and masked"])
def test_opcheck_gather(batch, pooling):
    mean, unit = pooling
    if batch == "padded":
        shape, where = (3, 5, 8), spans((3, 5, 8), make_mask(3, 5))
    else:
        shape = (1, 9, 8)
        mask = torch.tensor([[1, 0, 1, 0, 1, 1, 0, 1, 0]]) if "masked" in batch else None
        where = spans(shape, cu_seqlens=torch.tensor([0, 4, 9]), token_mask=mask)
    states = [s.requires_grad_() for s in make_states(3, shape)]
    torch.library.opcheck(torch.ops.mlpool.gather.default, (states, *where, mean, "torch", unit))


@pytest.mark.parametrize("attentions", [False, True])
@pytest.mark.parametrize(("keys", "values", "memory", "mixing"), MIXED_FORMS)
def test_opcheck_pool(keys, values, memory, mixing, attentions):
    states, mask = make_states(1, (2, 3, 8))[0].requires_grad_(), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    w, *_ = weights(keys, values, mixing=mixing, dtype=torch.float32)
    arguments = pool_arguments(w, states, mask, Plan(keys, values, memory=memory), attentions)
    torch.library.opcheck(torch.ops.mlpool.pool.default, arguments)


@pytest.mark.parametrize("memory", cost_model.MEMORY)
def test_opcheck_pool_of_one_key(memory):
    w, *_ = weights("absorbed", "late", keys=1, one_key=True, dtype=torch.bfloat16)
    states = make_states(1, (2, 1, 8), dtype=torch.bfloat16)[0].requires_grad_()
    arguments = pool_arguments(w, states, None, Plan(values="late", memory=memory), True)
    torch.library.opcheck(torch.ops.mlpool.pool.default, arguments, rtol=0, atol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradcheck_gather(pooling):
    mean, unit = pooling
    states = [s.requires_grad_() for s in make_states(2, (3, 4, 3), dtype=torch.float64)]
    where = spans((3, 4, 3), make_mask(3, 4, "left"))
    assert torch.autograd.gradcheck(lambda *s: gather(s, *where, mean, "torch", unit), states)


@pytest.mark.parametrize(("keys", "values", "memory", "mixing"), MIXED_FORMS)
def test_gradcheck_pool(keys, values, memory, mixing):
    """Every input of the op, both outputs, in the form that the plan names."""
    states = make_states(1, (2, 3, 4), dtype=torch.float64)[0].requires_grad_()
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]]).bool()
    w, *out = weights(keys, values, hidden=4, latents=2, head_dim=2, mixing=mixing)
    given = [t for t in (states, *w, *out) if t is not None]

    def run(*tensors):
        left = iter(tensors)
        x, *rest = (None if t is None else next(left) for t in (states, *w, *out))
        embedding, attention, _ = pool(
            [x], None, mask, Weights(*rest[:-2]), *rest[-2:], 2, Plan(keys, values, memory=memory), "torch", True
        )
        return embedding, attention

    assert torch.autograd.gradcheck(run, given, fast_mode=True)


def test_gradcheck_folds():
    (w, *_), plain = weights("plain", "early"), [torch.randn(4, 8, dtype=torch.float64).requires_grad_()]
    norm = (w.key_norm_weight, w.key_norm_bias)
    query = torch.randn_like(w.key_weight).requires_grad_()
    for key in (None, w.key_weight):
        assert torch.autograd.gradcheck(
            lambda z, a, b, q, *k: fold_queries(z, a, b, q, k[0] if k else None, 2),
            [*plain, *norm, query, *([] if key is None else [key])], fast_mode=True,
        )  # fmt: skip
    values = [w.value_weight, w.output_weight]
    assert torch.autograd.gradcheck(lambda v, o: fold_values(v, o, 2), values, fast_mode=True)


@pytest.mark.parametrize(
    ("dtype", "matrices"), [(torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)]
)
def test_absorbing_by_hand(dtype, matrices):
    """What a GPU takes, here by torch: as by autograd, of one dtype and under autocast."""
    new = torch.Generator().manual_seed(0)
    exact = [torch.randn(shape, generator=new, dtype=torch.float64) for shape in ((4, 8), (8,), (8,), (6, 8), (6, 8))]
    given = [t.to(d).requires_grad_() for t, d in zip(exact, (dtype,) * 3 + (matrices,) * 2, strict=True)]
    wide = [t.detach().double().requires_grad_() for t in given]
    got, plain, want = _AbsorbFunction.apply(*given, 2), fold_queries(*given, 2), fold_queries(*wide, 2)
    grad = torch.randn(want.shape, generator=new, dtype=torch.float64).to(matrices)
    results = [(got, plain, want)]
    results += zip(
        torch.autograd.grad(got, given, grad), torch.autograd.grad(plain, given, grad),
        torch.autograd.grad(want, wide, grad.double()), strict=True,
    )  # fmt: skip
    for mine, theirs, right in results:
        assert mine.dtype == theirs.dtype
        limit = max(3 * (theirs.double() - right).norm(), torch.finfo(theirs.dtype).eps * right.norm())
        assert (mine.double() - right).norm() <= limit


# --- gather --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 5), batch=st.integers(1, 5), tokens=st.integers(1, 9), hidden=st.integers(1, 17),
    how=st.sampled_from(["last", "mean", "unit_mean"]), padding=st.sampled_from(["left", "right", "none"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_gather_of_any_size(layers, batch, tokens, hidden, how, padding, seed):
    mask = make_mask(batch, tokens, padding, seed)
    states = [s.requires_grad_() for s in make_states(layers, (batch, tokens, hidden), seed=seed, dtype=torch.float64)]
    got, want = gather_states(states, mask, token_pooling=how), reference.gather(states, mask, how)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad(got, states, grad), torch.autograd.grad(want, states, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
        assert mine.layout == torch.strided


@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_of_strided_states(how, dtype, target):
    """Transposed, sliced and expanded states, layers of different strides, and one layer alone."""
    mask = make_mask(3, 4).to(target.device)
    base = torch.randn(4, 3, 32, device=target.device).to(dtype)
    views = [
        base.transpose(0, 1)[:, :, :16],
        base.transpose(0, 1)[:, :, ::2],
        base.transpose(0, 1)[:, :1, 16:].expand(3, 4, 16),
        base[0, :, :4, None].expand(3, 4, 16),
    ]
    for states in (views, [views[0], views[0] + 1], [views[1], views[1]], views[:1], views[1:2]):
        got = gather_states(states, mask, token_pooling=how, backend=target.backend)
        want = reference.gather([s.double() for s in states], mask, how)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=eps, atol=0 if how == "last" else eps)


def unit_batch(dtype, target):
    """Two states with zero tokens (a text of nothing else too), huge and tiny ones, and NaN where nothing is kept."""
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    states = make_states(2, (3, 5, 33))
    for state in states:
        state[0, 1] = state[2] = 0
        state[1, 0] *= 1e4
        state[1, 1] *= 1e-4
    clean = [s.to(dtype).double().requires_grad_() for s in states]
    soiled = [s.masked_fill(mask[:, :, None] == 0, torch.nan).to(target.device, dtype).requires_grad_() for s in states]
    return soiled, clean, mask


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unit_mean(dtype, target):
    """Three ways, forward and gradients; zero tokens give nothing and get nothing, padding of NaN neither."""
    states, clean, mask = unit_batch(dtype, target)
    backend = "auto" if dtype == torch.float64 else target.backend
    got = gather_states(states, mask.to(target.device), token_pooling="unit_mean", backend=backend)
    want = reference.gather(clean, mask, "unit_mean")
    low = [s.detach().to(dtype).requires_grad_() for s in clean]
    eager = reference.gather(low, mask, "unit_mean")
    grad = torch.randn(want.shape, dtype=torch.float64).to(dtype)
    results = [(got, want, eager)]
    results += zip(
        torch.autograd.grad(got, states, grad.to(target.device)), torch.autograd.grad(want, clean, grad.double()),
        torch.autograd.grad(eager, low, grad), strict=True,
    )  # fmt: skip
    for mine, exact, naive in results:
        limit = max(2 * (naive.double() - exact).norm(), 4 * torch.finfo(dtype).eps * exact.norm())
        assert (mine.cpu().double() - exact).norm() <= limit
    gradients = [mine for mine, *_ in results[1:]]
    assert not got[2].any()
    assert all(not g[2].any() and not g[0, 1].any() for g in gradients)
    assert all(not g[mask.to(target.device) == 0].any() for g in gradients)


def test_unit_mean_of_a_text_with_nan(target):
    """That text alone is NaN, its gradient too."""
    states = make_states(1, (3, 4, 8), target)
    states[0][1, 2, 3] = torch.nan
    states[0].requires_grad_()
    got = gather_states(states, torch.ones(3, 4).to(target.device), token_pooling="unit_mean", backend=target.backend)
    (grad,) = torch.autograd.grad(got.sum(), states)
    assert all(t.isnan().all() for t in (got[1], grad[1, 2]))
    assert all(torch.isfinite(t[[0, 2]]).all() for t in (got, grad))


def test_unit_is_for_means():
    with pytest.raises(ValueError, match="unit=True is for a mean"):
        gather(make_states(1, (1, 2, 3)), *spans((1, 2, 3), torch.ones(1, 2)), False, "torch", unit=True)


@pytest.mark.parametrize("packed", [False, True])
def test_mean_of_many_large_float16_states(packed, target):
    """The sum of 512 tokens leaves float16's range, their mean does not: it is accumulated in float32."""
    state = torch.full((1, 512, 8), 200.0, dtype=torch.float16, device=target.device)
    where = {"cu_seqlens": torch.tensor([0, 512])} if packed else {"attention_mask": torch.ones(1, 512)}
    got = gather_states([state], token_pooling="mean", backend=target.backend, **where)
    torch.testing.assert_close(got, torch.full_like(got, 200.0))


def test_mean_is_accumulated_in_float32(target):
    """Within a unit in the last place of the exact mean: a rounding of the sum and one of the mean, no more."""
    for dtype in (torch.bfloat16, torch.float16):
        state = (torch.randn(2, 300, 64) + 1).to(target.device, dtype)
        mask = make_mask(2, 300).to(target.device)
        got = gather_states([state], mask, token_pooling="mean", backend=target.backend)
        want = reference.gather([state.double()], mask, "mean")
        limit = torch.finfo(dtype).eps * want.abs() + 1e-5
        assert ((got.double() - want).abs() <= limit).all(), f"{dtype}: {(got.double() - want).abs().max():.2e}"


# --- nothing uninitialised, no NaN from elsewhere ------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("keys", "values", "memory"), FORMS)
def test_every_output_is_written(keys, values, memory):
    """What torch.empty returns is filled with NaN; none is left in an output or gradient."""
    states = make_states(1, (3, 3, 8))[0].requires_grad_()
    w, *out = weights(keys, values, dtype=torch.float32)
    result = pool([states], None, None, w, *out, 2, Plan(keys, values, memory=memory), "torch", True)[:2]
    given = [t for t in (states, *w, *out) if t is not None]
    for t in (*result, *torch.autograd.grad([r.sum() for r in result], given)):
        assert torch.isfinite(t).all()
    layers = [s.requires_grad_() for s in make_states(2, (3, 4, 8))]
    for how, mask in itertools.product(("last", "mean"), (make_mask(3, 4), make_mask(3, 4, "left"))):
        rows = gather_states(layers, mask, token_pooling=how, backend="torch")
        assert all(torch.isfinite(t).all() for t in (rows, *torch.autograd.grad(rows.sum(), layers)))


# --- GPU only ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["last", "mean"])
def test_offsets_past_2_to_the_31(how):
    """A hidden state of more than 2³¹ numbers: the second text lies past what 32 bits address, forward and backward."""
    tokens, hidden = 2**20 + 8, 2048
    if torch.cuda.mem_get_info()[0] < 12 * tokens * hidden:
        pytest.skip("needs 26 GB of GPU memory")
    state = torch.empty(2, tokens, hidden, dtype=torch.bfloat16, device="cuda")
    state[:, -3:] = torch.randn(2, 3, hidden, device="cuda")
    state.requires_grad_()
    mask = torch.zeros(2, tokens, dtype=torch.bool, device="cuda")
    mask[:, -3:] = True
    got = gather_states([state], mask, token_pooling=how, backend="triton")
    want = state[:, -1].float() if how == "last" else state[:, -3:].float().mean(1)
    torch.testing.assert_close(got[:, 0].float(), want, rtol=8e-3, atol=8e-3)
    grad = torch.autograd.grad(got.float().sum(), state)[0]
    torch.testing.assert_close(grad[:, -1], torch.full_like(grad[:, -1], 1 if how == "last" else 1 / 3))
    assert not grad[:, :-3].any()


def test_index_arithmetic_is_64_bit():
    """The interpreter and the GPU multiply row numbers of int64; the tensors that carry them are int64."""
    for tensor in spans((2, 3, 4), make_mask(2, 3))[:4]:
        assert tensor.dtype == torch.int64
    for tensor in spans((1, 5, 4), cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))[:4]:
        assert tensor.dtype == torch.int64


# --- embed ----------------------------------------------------------------------------------------------------------

Parts = dict[str, torch.Tensor]


def embed_parts(dtype: torch.dtype, base: bool, gate: bool, device: str = "cpu", hidden: int = 40) -> Parts:
    """What an embedding of three texts is made of; the base is a row of X0, so that its rows lie apart."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"product": (3, hidden), "bias": (hidden,), "y_mean": (3, hidden)}
    shapes |= {"x0": (3, 4, hidden)} if base else {}
    shapes |= {"gate": (hidden,)} if gate else {}
    parts = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    return parts | {"y_mean": parts["y_mean"].to(torch.promote_types(dtype, torch.float32))}


def embedded(parts: Parts, normalize: bool, call) -> Parts:
    """e and the gradient of a projection of it by every part; call(product, bias, y_mean, base, gate)."""
    leaves = {name: t.detach().requires_grad_() for name, t in parts.items()}
    base = leaves["x0"][:, -1] if "x0" in leaves else None
    e = call(leaves["product"], leaves["bias"], leaves["y_mean"], base, leaves.get("gate"))
    weights = torch.linspace(-1, 2, e.numel(), device=e.device).view_as(e)
    return {
        "e": e.detach(),
        **dict(zip(leaves, torch.autograd.grad((e * weights).sum(), leaves.values()), strict=True)),
    }


def check_embed(base: bool, gate: bool, normalize: bool, dtype: torch.dtype, target: Target, hidden: int = 40) -> None:
    def equation(product, bias, y_mean, base, gate):
        v = product + bias + y_mean
        v = v if gate is None else v * gate
        v = v if base is None else v + base
        return v / v.norm(dim=1, keepdim=True) if normalize else v

    def by(backend):
        return lambda *tensors: embed(*tensors, normalize, dtype, backend)

    parts = embed_parts(dtype, base, gate, target.device, hidden)
    exact = embedded({name: t.double() for name, t in parts.items()}, normalize, equation)
    plain = embedded(parts, normalize, by("torch"))
    for name, got in embedded(parts, normalize, by(target.backend)).items():
        assert got.dtype == plain[name].dtype
        scale = exact[name].norm()
        error, eager = ((x[name].double() - exact[name]).norm() / scale for x in ({name: got}, plain))
        assert error <= max(2 * eager, 2 * torch.finfo(dtype).eps), (name, error, eager)
        assert eager < 40 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("base", "gate"), [(True, True), (True, False), (False, True), (False, False)])
def test_embed(base, gate, normalize, dtype, target):
    check_embed(base, gate, normalize, dtype, target)


# --- select ---------------------------------------------------------------------------------------------------------


def check_select(target: Target, length: int, skip: int, second: bool, dtype: torch.dtype) -> None:
    """By the kernel as by torch: spans, kept rows, and the row of the text of which nothing is left."""
    generator = torch.Generator().manual_seed(length)
    masks = [torch.randint(0, 2, (5, length + 3), generator=generator).to(dtype)[:, 3:] for _ in range(2)]
    masks[0][:, : skip + 2] = masks[1][:, skip:] = 1
    given = [masks[0], masks[1] if second else None]

    def select(device, backend):
        moved = [None if m is None else m.to(device) for m in given]
        return select_tokens((5, length, 8), torch.device(device), moved[0], None, moved[1], True, skip, backend)

    got, want = select(target.device, target.backend), select("cpu", "torch")
    for name in ("starts", "ends", "last", "count", "keep"):
        mine, right = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(mine.cpu(), right, rtol=0, atol=0)
    given[0] = given[0].clone()
    given[0][3] = 0
    with pytest.raises(ValueError, match=r"row\(s\) \[3\]"):
        select(target.device, target.backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("length", [7, 2500])
def test_select(length, skip, second, dtype):
    check_select(GPU, length, skip, second, dtype)
