"""The two ops by themselves: torch's own checks, exact gradients in float64, strides, NaN, and the cost model."""

import importlib
import itertools
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import GPU, Target, assert_close_to_equations, last, make_mask, make_states, multi, use
from hypothesis import given, settings
from hypothesis import strategies as st
from mlpool_kernels import (
    Plan,
    Sizes,
    Weights,
    choose,
    embed,
    fold_queries,
    fold_values,
    gather,
    pool,
    reference,
    tiles,
)
from mlpool_kernels import plan as cost_model
from mlpool_kernels.runtime import use_triton

from mlpool.pooling import gather as gather_states
from mlpool.pooling import select_tokens

FORMS = list(itertools.product(cost_model.KEYS, cost_model.VALUES, cost_model.MEMORY))


def spans(shape, mask=None, **options):
    t = select_tokens(torch.Size(shape), torch.device("cpu"), mask, **options)
    return t.starts, t.ends, t.last, t.count, t.keep


def weights(form_keys, form_values, *, keys=3, hidden=8, latents=4, heads=2, head_dim=4, one_key=False, dtype=None):
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
        new(hidden), new(2 * hidden, hidden), new(2 * hidden),
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
@pytest.mark.parametrize(("keys", "values", "memory"), FORMS)
def test_opcheck_pool(keys, values, memory, attentions):
    states, mask = make_states(1, (2, 3, 8))[0].requires_grad_(), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    w, *_ = weights(keys, values, dtype=torch.float32)
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


@pytest.mark.parametrize(("keys", "values", "memory"), FORMS)
def test_gradcheck_pool(keys, values, memory):
    """Every input of the op, both outputs, in the form that the plan names."""
    states = make_states(1, (2, 3, 4), dtype=torch.float64)[0].requires_grad_()
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]]).bool()
    w, *out = weights(keys, values, hidden=4, latents=2, head_dim=2)
    given = [t for t in (states, *w, *out) if t is not None]

    def run(*tensors):
        left = iter(tensors)
        x, *rest = (None if t is None else next(left) for t in (states, *w, *out))
        embedding, attention, _ = pool(
            [x], None, mask, Weights(*rest[:12]), *rest[12:], 2, Plan(keys, values, memory=memory), "torch", True
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


# --- backend and tiles ---------------------------------------------------------------------------------------------


def test_backends(monkeypatch):
    tensor = torch.zeros(1)
    with pytest.raises(ValueError, match=r"backend must be one of .*'auto'.* got 'cuda'"):
        use_triton("cuda", tensor)
    monkeypatch.setattr("mlpool_kernels.runtime.INTERPRETED", False)
    with pytest.raises(ValueError, match=r'backend="triton" needs CUDA tensors, got cpu.*TRITON_INTERPRET=1'):
        use_triton("triton", tensor)
    monkeypatch.setattr("mlpool_kernels.runtime.HAS_TRITON", False)
    with pytest.raises(ModuleNotFoundError, match='pip install "triton'):
        use_triton("triton", tensor)
    assert not use_triton("auto", tensor)


def test_float64_is_torch_s(monkeypatch):
    """Kernels accumulate in float32: "auto" leaves float64 to torch, whichever tensor has it; "triton" refuses it."""
    runtime = importlib.import_module("mlpool_kernels.runtime")
    monkeypatch.setattr(runtime, "triton", runtime.triton or object())
    monkeypatch.setattr(runtime, "HAS_TRITON", True)
    single, double = (SimpleNamespace(is_cuda=True, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert use_triton("auto", single, None)
    assert not use_triton("auto", double)
    assert not use_triton("auto", single, None, double)
    with pytest.raises(ValueError, match=r'backend="triton" accumulates in float32, got float64; use backend="auto"'):
        use_triton("triton", single, double)


@pytest.mark.parametrize("which", ["pool", "states"])
def test_the_pool_asks_for_float64_everywhere(which, monkeypatch):
    """Kernels are asked for where neither states nor weights are float64, in the forward, backward and the gather."""
    asked = []

    def ask(_, *given):
        asked.append({t.dtype for t in given if t is not None})
        return False

    for name in ("mlpool_kernels.pool", "mlpool.pooling.multi_layer"):
        module = importlib.import_module(name)
        monkeypatch.setattr(
            module, "use_triton", lambda _, *given: bool(asked.append({t.dtype for t in given if t is not None}))
        )
    # Of raw rows, which the pool itself gathers.
    net, states = multi(8, 3, residual=True), [s.requires_grad_() for s in make_states(3, (2, 3, 8))]
    if which == "pool":
        net = net.double()
    else:
        states = [s.double() for s in states]
    use(net, states, make_mask(2, 3)).sum().backward()
    assert len(asked) == 3
    assert all(torch.float64 in dtypes for dtypes in asked)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [multi, last])
def test_float64_runs_on_a_gpu(kind):
    pool = kind(8, target=GPU._replace(backend="auto")).double()
    assert_close_to_equations(pool, make_states(4, (2, 3, 8), GPU), make_mask(2, 3), torch.float64)


@pytest.mark.gpu
def test_auto_means_triton_on_a_gpu():
    assert use_triton("auto", torch.zeros(1, device=GPU.device))
    assert not use_triton("torch", torch.zeros(1, device=GPU.device))


@pytest.fixture
def tuned_file(tmp_path, monkeypatch):
    """Call with what MLPOOL_TILES is to hold, a text or what becomes JSON."""
    path = tmp_path / "tiles.json"

    def write(content) -> str:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("MLPOOL_TILES", str(path))
        tiles.tuned.cache_clear()
        return str(path)

    yield write
    tiles.tuned.cache_clear()


RATES = {
    "product": 2e11, "attend": 1e11, "mix": 1e11, "feed_forward": 1e11, "gate": 1e9, "memory": 1e10, "launch": 1e-5,
}  # fmt: skip
TUNED = {
    "device": tiles.device_here(), **tiles.versions_here(),
    "tiles": {"softmax": {"BLOCK_K": 8, "BLOCK_N": 16, "num_warps": 2}}, "rates": {"float32": RATES},
}  # fmt: skip


def test_tuned_file(tuned_file):
    tuned_file(TUNED)
    assert tiles.tile("softmax") == TUNED["tiles"]["softmax"]
    assert tiles.tile("mix", hidden=20)["BLOCK_D"] == 32
    fitted = tiles.fitted_rates(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert fitted == {torch.float32: cost_model.Rates(**RATES, source=f"fitted for {tiles.device_here()}")}
    assert tiles.fitted_rates(torch.device("meta")) == {}
    # As written before rates were: the tiles alone, without the fields of today.
    tuned_file({"feed_forward": {"BLOCK_R": 128, "BLOCK_F": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}})
    assert tiles.tile("feed_forward") == tiles.TILES["feed_forward"][1]
    assert tiles.tuned().rates == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file that can be read"),
        ([1], "must be a JSON object, got list"),
        ({"softmix": {}}, "kernel 'softmix' is unknown; known: .*softmax"),
        ({**TUNED, "tile": {}}, "field 'tile' is unknown"),
        ({**TUNED, "tiles": {"softmax": {"BLOCK_M": 8}}}, "'softmax': field 'BLOCK_M' is unknown; known: BLOCK_K"),
        ({**TUNED, "tiles": {"softmax": {"BLOCK_K": 48}}}, "BLOCK_K must be a power of two, got 48"),
        ({**TUNED, "tiles": {"softmax": {"num_warps": "4"}}}, "num_warps must be a positive integer, got '4'"),
        ({**TUNED, "tiles": {"softmax": 4}}, "'softmax' must be a JSON object, got int"),
        ({**TUNED, "rates": {"int8": RATES}}, "dtype of rates 'int8' is unknown"),
        ({**TUNED, "rates": {"float32": {**RATES, "launch": 0}}}, "launch must be a positive number, got 0"),
        ({**TUNED, "rates": {"float32": {"product": 1e9}}}, "attend must be a positive number, got None"),
        ({**TUNED, "device": "NVIDIA Z9"}, f"was tuned on 'NVIDIA Z9', this is '{tiles.device_here()}'"),
        ({"tiles": {}}, "does not say its device"),
    ],
)
def test_tuned_file_that_cannot_be_used(tuned_file, content, message):
    path = tuned_file(content)
    with pytest.raises(ValueError, match=f"MLPOOL_TILES={path}.*{message}"):
        tiles.tile("softmax")


def test_tuned_file_that_is_missing(tuned_file, monkeypatch):
    tuned_file(TUNED)
    monkeypatch.setenv("MLPOOL_TILES", "/nowhere/tiles.json")
    with pytest.raises(ValueError, match=r"MLPOOL_TILES=/nowhere/tiles\.json is no JSON file"):
        tiles.tile("softmax")


def test_tuned_file_of_another_version(tuned_file):
    """Said once, and used."""
    tuned_file({**TUNED, "triton": "3.2.0"})
    with pytest.warns(UserWarning, match=r"was tuned with triton 3.2.0, here is") as warned:
        first = tiles.tile("softmax")
    assert len(warned) == 1
    assert first["BLOCK_K"] == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.tile("softmax") == first


# --- cost model ----------------------------------------------------------------------------------------------------

RELEASED = {"D=4096": Sizes(1, 32, 4096, 768, 32, 2048, 4 * 4096), "D=896": Sizes(1, 24, 896, 768, 32, 2048, 4 * 896)}


@pytest.mark.parametrize(("name", "reference_gflop", "here"), [("D=4096", 1175, 254), ("D=896", 206, 17.6)])
def test_flops_of_the_released_sizes(name, reference_gflop, here):
    """No more than the design's own table."""
    s = RELEASED[name]
    assert sum(cost_model.reference_flops(s).values()) / 1e9 == pytest.approx(reference_gflop, rel=0.01)
    plan = choose(s, training=False, cached=True, triton=True, itemsize=2, memory_bytes=1 << 37)
    cost = cost_model.key_flops(s, plan.keys)[0] + cost_model.value_flops(s, plan.values)[0]
    assert (cost + cost_model.feed_forward_flops(s)) / 1e9 <= 1.01 * here


@settings(max_examples=60, deadline=None)
@given(
    s=st.builds(
        Sizes, *(st.integers(1, most) for most in (256, 600, 4096, 768, 32, 2048, 16384))
    ), training=st.booleans(), triton=st.booleans(), memory=st.sampled_from([1 << 28, 1 << 33, 1 << 37]),
)  # fmt: skip
def test_the_cheapest_form_is_chosen(s, training, triton, memory):
    cached = not training
    plan = choose(s, training=training, cached=cached, triton=triton, itemsize=2, memory_bytes=memory)

    def cost(flops):
        return s.batch * flops[0] + (0 if cached else flops[1])

    for chosen, forms, flops in (
        (plan.keys, cost_model.KEYS, cost_model.key_flops), (plan.values, cost_model.VALUES, cost_model.value_flops)
    ):  # fmt: skip
        assert cost(flops(s, chosen)) == min(cost(flops(s, form)) for form in forms)
    if not training:
        assert plan.memory == "recompute"
    elif plan.memory == "save":
        assert s.batch * cost_model.saved_bytes(s, plan, 2) <= 0.1 * memory
    assert triton or (plan.launches, plan.feed_forward) == ("two", "chunked")
    assert Plan.parse(str(plan)) == plan


def exact_plans(triton, one):
    """Every plan that a call can run as, memory aside."""
    for keys, values, launches, form, mix in itertools.product(
        cost_model.KEYS, cost_model.VALUES, cost_model.LAUNCHES, cost_model.FEED_FORWARD, cost_model.MIX
    ):
        impossible = launches == "one" and (keys == "plain" or not one)
        if not impossible and (triton or (form, mix) == ("chunked", "product")) and (values, mix) != ("late", "kernel"):
            yield Plan(keys, values, launches, form, "recompute", mix)


@settings(max_examples=60, deadline=None)
@given(
    s=st.builds(Sizes, *(st.integers(1, most) for most in (256, 300, 4096, 128, 32, 2048, 16384))),
    rates=st.builds(
        cost_model.Rates, *(st.floats(1e9, 1e15) for _ in range(6)), st.floats(1e-7, 1e-3), st.just("fitted for a test")
    ), triton=st.booleans(), masked=st.booleans(), cached=st.booleans(),
)  # fmt: skip
def test_rates_choose_the_fastest(s, rates, triton, masked, cached):
    def time(plan):
        return sum(cost_model.predict(s, plan, rates, itemsize=2, cached=cached).values())

    plan = choose(
        s, training=False, cached=cached, triton=triton, itemsize=2, memory_bytes=1 << 37, masked=masked, rates=rates
    )
    plans = list(exact_plans(triton, triton and not masked and s.keys <= 128))
    assert plan in plans
    assert time(plan) <= min(map(time, plans)) / cost_model.GAIN * (1 + 1e-9)


def test_predicted_seconds_are_those_of_the_rates():
    """With one rate at work at a time: FLOP over FLOP/s, launches, and what the backward and recomputing add."""
    s, never = Sizes(3, 24, 896, 64, 8, 64, 896), 1e30
    plan = Plan("absorbed", "early", "two", "chunked", "recompute")
    alone = cost_model.Rates(1e9, never, never, never, never, never, 1e-30, "")
    times = cost_model.predict(s, plan, alone, itemsize=2)
    flops = [
        cost_model.key_flops(s, "absorbed")[0],
        cost_model.value_flops(s, "early")[0],
        cost_model.feed_forward_flops(s),
    ]
    assert list(times.values()) == pytest.approx([3 * f / 1e9 for f in flops])
    assert list(times) == list(cost_model.STEPS)
    launches = cost_model.predict(s, plan, alone._replace(product=never, launch=1.0), itemsize=2)
    assert list(launches.values()) == pytest.approx([3, 5, 3])
    one = Plan("absorbed", "early", "one", "fused", "recompute", "kernel")
    launches = cost_model.predict(s, one, alone._replace(product=never, launch=1.0), itemsize=2)
    assert list(launches.values()) == pytest.approx([1, 3, 2])
    # What is computed and what is moved go on side by side.
    both = cost_model.predict(s, plan, alone._replace(memory=1e3), itemsize=2)
    moved = cost_model.predict(s, plan, alone._replace(product=never, memory=1e3), itemsize=2)
    assert both == pytest.approx(moved)
    assert all(both[step] > times[step] for step in times)
    for memory, passes in {"save": (3, 3, 3), "recompute_ff": (3, 3, 4), "recompute": (4, 4, 4)}.items():
        kept = cost_model.predict(s, Plan("absorbed", "early", memory=memory), alone, itemsize=2, training=True)
        assert list(kept.values()) == pytest.approx([n * t for n, t in zip(passes, times.values(), strict=True)])


def test_one_launch_takes_no_padding_mask():
    s, options = Sizes(4, 32, 896, 64, 8, 64, 896), {"training": False, "cached": True, "triton": True, "itemsize": 2}
    assert choose(s, memory_bytes=1 << 37, **options).launches == "one"
    assert choose(s, memory_bytes=1 << 37, masked=True, **options).launches == "two"


def test_plan_overrides():
    assert Plan().override({"keys": "plain"}) == Plan(keys="plain")
    with pytest.raises(ValueError, match=r"unknown plan entry 'key'; known: keys, values"):
        Plan().override({"key": "plain"})
    with pytest.raises(ValueError, match=r"plan entry 'keys' must be one of .*'absorbed', 'plain'.* got 'late'"):
        Plan().override({"keys": "late"})


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
