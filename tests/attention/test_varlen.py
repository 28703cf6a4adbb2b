"""The kernels behind packed attention: against the equations, their arguments, and the choice of one."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from models import WINDOWED, V, build, pad, texts
from packing import (
    embed,
    real,
)
from torch import nn

from mlpool.attention import bidirectional, varlen
from mlpool.attention.packed import pack


# --- kernels ----------------------------------------------------------------------------------------------------------
def states(lengths, heads=4, kv_heads=2, d=16, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, sum(lengths), d) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def by_equations(q, k, v, lengths, left, right, scale):
    """Attention of every text in float64, softmax written out → [1, total, H, d]."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    outputs, start = [], 0
    for n in lengths:
        here = slice(start, start + n)
        scores = q[:, :, here] @ k[:, :, here].mT * scale
        i, j = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)
        hidden = ((j < i - left) & (left >= 0)) | ((j > i + right) & (right >= 0))
        outputs.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, :, here])
        start += n
    return torch.cat(outputs, 2).transpose(1, 2)


SPANS = [(-1, -1), (-1, 0), (3, 0), (3, 3), (0, 0), (100, 100), (2, -1)]


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_text_by_text_against_the_equations(span):
    lengths = [5, 1, 9, 5]
    inputs = states(lengths)
    exact = by_equations(*inputs, lengths, *span, 0.3)
    got = varlen.text_by_text(*inputs, lengths, *span, 0.3)
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=0)
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(got, inputs, weights), torch.autograd.grad(exact, inputs, weights.double()), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("takes_gqa", [True, False])
def test_arguments_of_the_varlen_kernel(monkeypatch, takes_gqa):
    calls = []
    if takes_gqa:

        def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
            calls.append((key, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa))
            return query
    else:

        def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
            calls.append((key, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, None))
            return query

    monkeypatch.setattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "torch")
    lengths = [5, 1, 9]
    q, k, v = states(lengths, dtype=torch.bfloat16)
    span = torch.tensor([3, 0, 0, 5, 6, 15], dtype=torch.int32)
    module = nn.Module()
    for offsets in (torch.tensor([0, 5, 6, 15]), None):  # as StableLM calls it
        out, weights = varlen.packed_attention(module, q, k, v, span, scaling=0.3, cu_seq_lens_q=offsets)
        assert weights is None
        assert torch.equal(out, q.transpose(1, 2))
        key, cu_q, cu_k, max_q, max_k, scale, window, gqa = calls.pop()
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert cu_q.tolist() == cu_k.tolist() == [0, 5, 6, 15]
        assert (max_q, max_k, scale, window) == (9, 9, 0.3, (3, 0))
        if takes_gqa:
            assert gqa is True
            assert key.shape == (15, 2, 16)
        else:
            assert torch.equal(key, k[0].transpose(0, 1).repeat_interleave(2, 1))
    varlen.packed_attention(module, q, k, v, span)
    assert calls.pop()[5] == 16**-0.5


def test_arguments_of_flash_attn(monkeypatch):
    calls = []

    def flash_attn_varlen_func(q, *args, **options):
        calls.append(options)
        return q

    stand_in = type(sys)("flash_attn")
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(varlen, "choose_kernel", lambda *_: "flash-attn")
    span = torch.tensor([-1, 0, 0, 5, 6], dtype=torch.int32)
    varlen.packed_attention(nn.Module(), *states([5, 1], dtype=torch.bfloat16), span, dropout=0.1, softcap=50.0)
    expected = {"dropout_p": 0.1, "softmax_scale": 0.25, "causal": False, "window_size": (-1, 0), "softcap": 50.0}
    assert calls == [expected]


def test_the_kernel_that_is_chosen(monkeypatch):
    class Query:
        is_cuda, device = True, "cuda"

        def __init__(self, dtype, d=64):
            self.dtype, self.shape = dtype, (1, 2, 10, d)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(varlen, "has_flash_attn", lambda: False)
    half = Query(torch.bfloat16)
    assert varlen.choose_kernel(half, half, 0.0, None) == "torch"
    assert varlen.choose_kernel(half, half, 0.1, None) == "sdpa"
    assert varlen.choose_kernel(Query(torch.float32), half, 0.0, None) == "sdpa"
    assert varlen.choose_kernel(half, Query(torch.bfloat16, 32), 0.0, None) == "sdpa"
    assert varlen.choose_kernel(Query(torch.bfloat16, 20), Query(torch.bfloat16, 20), 0.0, None) == "sdpa"
    monkeypatch.setattr(varlen, "has_flash_attn", lambda: True)
    assert varlen.choose_kernel(half, half, 0.0, 50.0) == "flash-attn"
    assert varlen.choose_kernel(half, half, 0.0, None) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert varlen.choose_kernel(half, half, 0.0, None) == "sdpa"


@pytest.mark.parametrize(("name", "value"), [("position_bias", "adds a bias"), ("s_aux", "has attention sinks")])
def test_what_no_kernel_has(name, value):
    span = torch.tensor([-1, 0, 0, 5, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=value):
        varlen.packed_attention(nn.Module(), *states([5, 1]), span, **{name: torch.zeros(1)})


# --- on a GPU ---------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_varlen_kernel_against_the_equations(dtype, span, kv_heads):
    lengths = [5, 1, 130, 64, 300]
    inputs = states(lengths, kv_heads=kv_heads, d=64, dtype=dtype, device="cuda")
    assert varlen.choose_kernel(inputs[0], inputs[2], 0.0, None) == "torch"
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    mask = torch.tensor([*span, *offsets.tolist()], dtype=torch.int32)
    got, _ = varlen.packed_attention(nn.Module(), *inputs, mask, scaling=0.125, cu_seq_lens_q=offsets.cuda())
    eager = varlen.text_by_text(*inputs, lengths, *span, 0.125)
    exact = by_equations(*inputs, lengths, *span, 0.125)
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for out in (got, eager, exact):
        grads = torch.autograd.grad(out, inputs, weights.to(out))
        results.append([out.detach().double(), *(g.double() for g in grads)])
    for ours, low, truth in zip(*results, strict=True):
        error, bound = (ours - truth).norm(), (low - truth).norm()
        assert error <= 2 * bound + 1e-3 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("both_ways", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["Qwen2", "Mistral", "Gemma3", "StableLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_on_a_gpu(name, both_ways, dtype):
    lengths = (60, 33, 1, 7)
    sizes = {"max_position_embeddings": 64}
    model = build(name, "sdpa", among=WINDOWED if name in WINDOWED else None, **sizes).cuda()
    if both_ways:
        bidirectional(model, check=False)
    batch = {key: value.cuda() for key, value in pad(texts(lengths), "mixed").items()}
    with torch.no_grad():
        exact = model.double()(**batch).last_hidden_state[real(batch)]
        model.to(dtype)
        low = model(**batch).last_hidden_state[real(batch)].double()
        got = pack(model)(**batch).last_hidden_state[real(batch)].double()
    limit = 1e-5 * exact.norm() if dtype == torch.float32 else 2 * (low - exact).norm()
    assert (got - exact).norm() <= limit
    model.train()
    call = embed(model, batch)
    model(**call).last_hidden_state.float().square().mean().backward()
    grad = call["inputs_embeds"].grad
    assert grad[real(batch)].isfinite().all()
    assert not grad[~real(batch)].any()
    # bitwise when the neighbours change and the lengths do not
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][1:] = (other["input_ids"][1:] + 7) % V
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(**batch).last_hidden_state[0], model(**other).last_hidden_state[0])
