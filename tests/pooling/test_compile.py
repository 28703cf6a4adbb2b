"""torch.compile without graph breaks, forward and backward; CUDA graphs."""

import pytest
import torch
from conftest import GPU, differentiate, last, leaves_of, make_mask, make_states, multi, use
from mlpool_kernels import Rates

from mlpool import EosPool, LayerWeightsPool, MeanPool
from mlpool.pooling import folding

D, L, B, T = 16, 4, 3, 5


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


POOLS = {
    "multi-last": lambda target: multi(D, L, target),
    "multi-mean": lambda target: multi(D, L, target, token_pooling="mean", choices={"memory": "recompute"}),
    "multi-plain": lambda target: multi(D, L, target, num_heads=1, residual=False, choices={"keys": "plain"}),
    "last-mean": lambda target: last(D, target),
    "last-last": lambda target: last(D, target, token_pooling="last"),
    "eos": lambda target: EosPool(D, backend=target.backend).to(target.device),
    "mean": lambda target: MeanPool(D, backend=target.backend).to(target.device),
    "scalar": lambda target: LayerWeightsPool(D, L, backend=target.backend).to(target.device),
}


def call(pool, states, mask):
    return use(pool, states, mask) if not isinstance(pool, LayerWeightsPool) else pool(
        states, mask, includes_embedding=False
    )  # fmt: skip


def check(name, target, compiler, shapes=((B, T),), **options):
    pool = POOLS[name](target)
    compiled = torch.compile(call, fullgraph=True, backend=compiler, **options)
    reads_all = name.startswith(("multi", "scalar"))
    for batch, tokens in shapes:
        states = make_states(L if reads_all else 1, (batch, tokens, D), target)
        states = [s.requires_grad_() for s in states]
        mask = make_mask(batch, tokens, "left").to(target.device)
        want = differentiate(call(pool, states, mask), leaves_of(pool, states))
        got = differentiate(compiled(pool, states, mask), leaves_of(pool, states))
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, atol=1e-5, rtol=1e-4)
        pool.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(pool, states, mask), want["output"], atol=1e-5, rtol=1e-4)
        pool.train()


SIZED = ("multi-last", "last-mean", "mean")  # the first of their batches is test_fullgraph's


@pytest.mark.parametrize("name", [name for name in POOLS if name not in SIZED])
def test_fullgraph(name, target):
    check(name, target, "aot_eager")


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", SIZED)
def test_batches_of_different_size(name, dynamic, target):
    """The second size makes torch.compile's sizes symbolic by itself; `dynamic=True` asks for it at once."""
    check(name, target, "aot_eager", shapes=((3, 5), (4, 7), (2, 9)), dynamic=dynamic)


def test_fitted_rates_are_traced(target, monkeypatch):
    """Seconds over symbolic sizes, batch and keys, are compared without a graph break."""
    rates = Rates(2e11, 1e11, 1e11, 1e11, 1e9, 1e10, 1e-5, "fitted for a test")
    monkeypatch.setattr(folding, "fitted_rates", lambda device: {torch.float32: rates})
    check("last-mean", target, "aot_eager", dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi-last"])
def test_inductor(name, target):
    check(name, target, "inductor")


def test_layer_states_and_attention_weights(target):
    pool = multi(D, L, target)
    rows = torch.randn(B, L, D, device=target.device, requires_grad=True)
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    got, want = (p(layer_states=rows, output_attentions=True) for p in (compiled, pool))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    grads = [torch.autograd.grad(e.sum() + (a * a).sum(), [rows, *pool.parameters()]) for e, a in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_autocast(target):
    pool, states, mask = multi(D, L, target), make_states(L, (B, T, D), target), make_mask(B, T).to(target.device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast(target.device, torch.bfloat16):
        torch.testing.assert_close(compiled(pool, states, mask), call(pool, states, mask), atol=1e-2, rtol=0)


def test_folded(target):
    folded, states = multi(D, L, target).fold(), make_states(L, (B, T, D), target)
    mask = make_mask(B, T).to(target.device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(folded, states, mask), call(folded, states, mask), atol=1e-6, rtol=0)


def test_compiling_leaves_no_stale_weights(target):
    """Compiled evaluation, a step, compiled evaluation again."""
    pool, states, mask = multi(D, L, target), make_states(L, (B, T, D), target), make_mask(B, T).to(target.device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in pool.parameters():
                p.data.add_(0.2 * torch.randn_like(p))
            torch.testing.assert_close(
                compiled(pool.eval(), states, mask), call(pool.eval(), states, mask), atol=1e-5, rtol=0
            )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["multi-last", "multi-mean", "last-last", "eos", "mean", "scalar"])
def test_cuda_graph(name):
    """An evaluation forward is captured, replayed on new states and masks, and follows them."""
    pool = POOLS[name](GPU).eval()
    count = L if name.startswith(("multi", "scalar")) else 1
    states, mask = make_states(count, (B, T, D), GPU), make_mask(B, T).to("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(3):
                call(pool, states, mask)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(pool, states, mask)
        for seed in (1, 2):
            for old, new in zip(states, make_states(count, (B, T, D), GPU, seed), strict=True):
                old.copy_(new)
            mask.copy_(make_mask(B, T, "left", seed))
            graph.replay()
            torch.testing.assert_close(captured, call(pool, states, mask), atol=1e-6, rtol=0)
