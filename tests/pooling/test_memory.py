"""What a pool allocates beside weights, their gradients and inputs, and what it does not copy.

Peaks are read from the profiler's record of every allocation and release, so they are exact and the same every time.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from conftest import GPU, last, make_states, multi, peak, use
from mlpool_kernels import reference
from torch import Tensor

# The released proportions at a small scale: inner width 16·D, feed-forward 4·D, many latents.
D, L, B, T = 64, 8, 64, 2
SIZES = {"num_latents": 192, "num_heads": 2, "head_dim": 512, "ff_mult": 4}


def test_the_measure():
    def run():
        a = torch.empty(1000, 1000)
        del a
        return torch.empty(500, 1000)

    assert 4_000_000 <= peak(run) < 4_100_000


def step(pool, embed: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward into gradients that are there already, so that they do not count."""
    for p in pool.parameters():
        p.grad = torch.zeros_like(p)
    return lambda: embed().sum().backward()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks scaled down with the sizes; the released sizes meet the full ones."""
    for module, limits, size in (("pool", "WORKSPACE_BYTES", 2 << 20), ("feed_forward", "CHUNK_BYTES", 1 << 19)):
        limits = getattr(importlib.import_module(f"mlpool_kernels.{module}"), limits)
        monkeypatch.setitem(limits, "cpu", size)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("memory", "share"), [("save", 1 / 4), ("recompute_ff", 1 / 5), ("recompute", 1 / 10)])
def test_forward_and_backward(memory, share):
    pool = multi(D, L, **SIZES, choices={"memory": memory})
    states, mask = make_states(L, (B, T, D)), torch.ones(B, T)
    eager = peak(
        step(pool, lambda: reference.multi_layer_pool(states, mask, dict(pool.named_parameters()), pool.num_heads))
    )
    ours = peak(step(pool, lambda: use(pool, states, mask)))
    assert ours <= share * eager, f"{ours / 1e6:.1f} MB of eager's {eager / 1e6:.1f} MB, {ours / eager:.3f}"


@pytest.mark.usefixtures("small_chunks")
def test_evaluation_does_not_grow_with_the_batch():
    """Chunks of texts: eight times the texts take far less than eight times the memory; eager takes all of it."""
    pool = multi(D, L, **SIZES).eval()
    parameters = dict(pool.named_parameters())

    def peaks(batch: int) -> tuple[int, int]:
        states, mask = make_states(L, (batch, T, D)), torch.ones(batch, T)
        use(pool, states, mask)
        eager = peak(lambda: reference.multi_layer_pool(states, mask, parameters, pool.num_heads))
        return peak(lambda: use(pool, states, mask)), eager

    with torch.no_grad():
        few, _ = peaks(B // 8)
        many, eager = peaks(B)
    assert many <= 2.5 * few
    assert many <= eager / 20


@pytest.mark.parametrize("how", ["last", "mean"])
def test_hidden_states_are_not_copied(how):
    """Of the size of one layer's [B, T, D] at most, for all layers, where `torch.stack` takes L times that."""
    pool = multi(D, L, token_pooling=how)
    states = make_states(L, (B, 64, D))
    mask, layer = torch.ones(B, 64), B * 64 * D * 4
    with torch.no_grad():
        assert peak(lambda: use(pool, states, mask)) < layer
    assert peak(lambda: reference.gather(states, mask, how)) >= L * layer


@pytest.mark.parametrize("how", ["last", "mean"])
def test_frozen_backbone_gets_no_gradient(how):
    """Without gradients for the hidden states none of their size is made."""
    pool = multi(D, L, token_pooling=how)
    states = make_states(L, (B, 64, D))
    run = step(pool, lambda: use(pool, states, torch.ones(B, 64)))
    run()
    assert peak(run) < 2 * B * 64 * D * 4
    assert all(s.grad is None for s in states)


def test_evaluation_keeps_nothing_but_the_cache():
    for kind in (multi, last):
        pool, states, mask = kind(D).eval(), make_states(4, (B, T, D)), torch.ones(B, T)
        with torch.inference_mode():
            use(pool, states, mask)
            kept = pool._cache
            use(pool, states, mask)
            assert pool._cache is kept
        assert {name for name, value in vars(pool).items() if isinstance(value, Tensor)} == set()


@pytest.mark.gpu
@pytest.mark.parametrize(("memory", "share"), [("save", 1 / 4), ("recompute", 1 / 10)])
def test_forward_and_backward_on_the_gpu(memory, share):
    """The design's limits, at a size where eager takes 15 GB."""
    sizes = {"num_latents": 768, "num_heads": 16, "head_dim": 512, "ff_mult": 4}
    pool = multi(512, 24, GPU, **sizes, choices={"memory": memory}).bfloat16()
    states = make_states(24, (256, 4, 512), GPU, dtype=torch.bfloat16)
    mask = torch.ones(256, 4, device="cuda")
    peaks = []
    for run in (
        step(pool, lambda: reference.multi_layer_pool(states, mask, dict(pool.named_parameters()), pool.num_heads)),
        step(pool, lambda: use(pool, states, mask)),
    ):
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= share * peaks[0], f"{peaks[1] / peaks[0]:.3f} of eager's {peaks[0] / 1e9:.2f} GB"
