"""The trainable pools against the paper's equations: forward and every gradient, all sizes, forms and precisions."""

import importlib
import itertools

import pytest
import torch
from conftest import (
    TORCH,
    assert_close_to_equations,
    differentiate,
    errors,
    last,
    leaves_of,
    make_mask,
    make_states,
    multi,
    randomise,
    use,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from mlpool_kernels import reference

from mlpool import LastLayerPool, MultiLayerPool

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS, HIDDEN, LATENTS = (1, 6, 24, 28, 36, 80), (64, 384, 896, 1536), (1, 7, 64)
# Every pair of two sizes; 768 latents at a small D.
PAIRWISE = [
    (layers, hidden, LATENTS[(i + j) % 3]) for i, layers in enumerate(LAYERS) for j, hidden in enumerate(HIDDEN)
] + [(layers, 64, 768) for layers in LAYERS]
PLANS = [dict(zip(("keys", "values"), p, strict=True)) for p in itertools.product(
    ("absorbed", "plain"), ("early", "absorbed", "late")
)]  # fmt: skip
MEMORY = ("save", "recompute_ff", "recompute")


@pytest.mark.parametrize(("layers", "hidden", "latents"), PAIRWISE)
def test_multi_layer_sizes(layers, hidden, latents, target):
    pool = multi(hidden, layers, target, num_latents=latents, num_heads=2, head_dim=8)
    assert_close_to_equations(pool, make_states(layers, (2, 3, hidden), target), make_mask(2, 3))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("token_pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", [multi, last])
def test_paper(kind, token_pooling, dtype, target):
    # No kernel computes in float64: torch does.
    backend = "auto" if dtype == torch.float64 else target.backend
    sizes = {"num_latents": 24, "num_heads": 4, "head_dim": 32, "token_pooling": token_pooling, "backend": backend}
    pool = MultiLayerPool.paper(48, 6, **sizes) if kind is multi else LastLayerPool.paper(48, **sizes)
    assert (pool.residual, pool.ff_mult) == (False, 4)
    pool = randomise(pool).to(target.device)
    assert_close_to_equations(pool, make_states(6, (4, 9, 48), target), make_mask(4, 9), dtype)


def test_paper_is_of_the_released_sizes():
    for pool in (MultiLayerPool.paper(8, 4, device="meta"), LastLayerPool.paper(8, device="meta")):
        assert (pool.num_latents, pool.num_heads, pool.head_dim, pool.ff_mult) == (768, 32, 2048, 4)
        assert (pool.latents.shape, pool.query_weight.shape, pool.ff_in_weight.shape) == ((768, 8), (65536, 8), (64, 8))


@pytest.mark.parametrize("kind", [multi, last])
def test_released_latents_and_head_size(kind, target):
    """768 latents and heads of 2048 at a small D, over few heads: float64 queries of all 32 are 0.4 GB a text."""
    options = {"num_latents": 768, "num_heads": 4, "head_dim": 2048, "ff_mult": 4, "residual": False}
    assert_close_to_equations(kind(8, target=target, **options), make_states(4, (1, 2, 8), target), make_mask(1, 2))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: "-".join(p.values()))
def test_every_form(plan, dtype, memory, target):
    pool = multi(40, 6, target, num_latents=12, num_heads=4, head_dim=16, choices={**plan, "memory": memory})
    assert_close_to_equations(pool, make_states(6, (4, 5, 40), target), make_mask(4, 5), dtype)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: "-".join(p.values()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_with_padded_keys(plan, dtype, target):
    pool = last(40, target, num_latents=12, num_heads=4, head_dim=16, choices=plan)
    assert_close_to_equations(pool, make_states(1, (4, 7, 40), target), make_mask(4, 7), dtype)


@pytest.mark.parametrize("memory", MEMORY)
def test_small_chunks(memory, target, monkeypatch):
    """The same with room for three texts at a time: seven of them, the last chunk shorter."""
    for module, limits, size in (("pool", "WORKSPACE_BYTES", 10_000), ("feed_forward", "CHUNK_BYTES", 2_000)):
        limits = getattr(importlib.import_module(f"mlpool_kernels.{module}"), limits)
        monkeypatch.setitem(limits, target.device, size)
    for make in (multi, last):
        net = make(16, target=target, choices={"memory": memory})
        assert_close_to_equations(net, make_states(4, (7, 5, 16), target), make_mask(7, 5))


@pytest.mark.parametrize("residual", ["mix", True, False])
@pytest.mark.parametrize("kind", [multi, last])
@pytest.mark.parametrize("token_pooling", ["last", "mean"])
def test_autocast(kind, token_pooling, residual, target):
    """float32 parameters and states, products in bfloat16."""
    pool = kind(48, target=target, residual=residual, token_pooling=token_pooling, num_latents=16)
    # Many texts: of a few the errors' ratio scatters.
    assert_close_to_equations(
        pool, make_states(4, (24, 6, 48), target), make_mask(24, 6), torch.float32, autocast=torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_whitened(dtype, target):
    backend = "auto" if dtype == torch.float64 else target.backend
    pool = randomise(MultiLayerPool(48, 6, 16, 2, 8, token_pooling="mean", whiten=True, backend=backend))
    states, mask = make_states(6, (24, 6, 48), target), make_mask(24, 6)
    assert_close_to_equations(pool.to(target.device), states, mask, dtype)
    if dtype == torch.float32:
        assert_close_to_equations(pool, states, mask, dtype, autocast=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_and_float32_parameters(dtype, target):
    """States as a backbone in low precision gives them: they are widened, not the parameters narrowed."""
    pool, mask = multi(target=target), make_mask(3, 4).to(target.device)
    states = make_states(4, (3, 4, 16), target, dtype=dtype)
    out = use(pool, states, mask)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, use(pool, [s.float() for s in states], mask), atol=1e-6, rtol=0)


SIZES = {name: st.integers(1, most) for name, most in {
    "hidden": 40, "layers": 9, "num_latents": 9, "num_heads": 3, "head_dim": 9, "ff_mult": 3, "batch": 5, "tokens": 7,
}.items()}  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    **SIZES, kind=st.sampled_from([multi, last]), token_pooling=st.sampled_from(["last", "mean"]),
    padding=st.sampled_from(["left", "right", "none"]), residual=st.sampled_from(["mix", True, False]),
    memory=st.sampled_from(MEMORY), plan=st.sampled_from(PLANS), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size(kind, hidden, layers, batch, tokens, padding, seed, plan, memory, **options):
    # LayerNorm over one or two entries has no useful derivative.
    hidden += 3
    if kind is multi:
        options["layers"] = layers
    pool = kind(hidden, choices={**plan, "memory": memory}, **options)
    randomise(pool, seed)
    states = make_states(layers, (batch, tokens, hidden), TORCH, seed)
    assert_close_to_equations(pool, states, make_mask(batch, tokens, padding, seed))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: "-".join(p.values()))
@pytest.mark.parametrize("kind", [multi, last])
def test_gradient_through_the_attention_weights(kind, plan, memory, target):
    """output_attentions gives the equations' weights, and a loss on them reaches every parameter behind them."""
    pool = kind(target=target, choices={**plan, "memory": memory})
    mask = make_mask(3, 4).to(target.device)
    states = [s.requires_grad_() for s in make_states(4 if kind is multi else 1, (3, 4, 16), target)]
    _, attention = use(pool, states, mask, output_attentions=True)

    parameters = {name: p.detach().double().requires_grad_() for name, p in pool.named_parameters()}
    wide = [s.detach().double().requires_grad_() for s in states]
    x0 = reference.rows(reference.gather(wide, mask), parameters) if kind is multi else wide[0]
    _, exact = reference.cross_attention(x0, parameters, 2, None if kind is multi else mask != 0)

    behind = ("latent", "layer_weights", "key", "query", "states")
    got, want = (
        differentiate(out, {name: t for name, t in all_leaves.items() if name.startswith(behind)})
        for out, all_leaves in (
            (attention, leaves_of(pool, states)),
            (exact, {**leaves_of(pool, wide), **parameters}),
        )
    )
    wrong = {name: error for name, error in errors(got, want).items() if not error <= 1e-4}
    assert not wrong, wrong
