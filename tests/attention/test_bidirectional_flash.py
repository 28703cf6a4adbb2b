"""What reaches flash-attention, by a stand-in for it, and the backends of a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types

import models
import pytest
import torch
from both_ways import apart, lone, outputs, run
from models import DECODERS, REFUSED, WINDOWED, L, alone, build, pad, texts
from torch import nn

from mlpool.attention import bidirectional, causal, check_attention

flex_uncompiled = models.flex_uncompiled
pytestmark = pytest.mark.usefixtures("flex_uncompiled")


# --- flash-attention, by a stand-in -----------------------------------------------------------------------------------
def attend(q, k, v, causal=False, window_size=(-1, -1), softmax_scale=None, softcap=0.0):
    """What flash-attention computes, [B, T, H, d], step by step."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = ((left >= 0) & (-ahead > left)) | ((right >= 0) & (ahead > right))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def flash(monkeypatch):
    """A flash_attn package that records the arguments of every call: [(function, causal, window_size)]."""
    import transformers.modeling_flash_attention_utils as utils

    calls: list[tuple] = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        calls.append(("fixed", causal, window_size))
        return attend(q, k, v, causal, window_size, softmax_scale, softcap)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append(("varlen", causal, window_size))
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_k
        parts = [
            attend(a[None], b[None], c[None], causal, window_size, softmax_scale, softcap)[0]
            for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
        return torch.cat(parts)

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    # The library keeps what it loaded; it must load ours now and forget it afterwards.
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(utils, name, None)
    for name in ("_flash_with_kvcache_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(utils, name, None, raising=False)
    return calls


def on_flash(name: str, among=None) -> nn.Module:
    """Built on eager, since the library looks for the package when it builds; then switched."""
    model = build(name, among=among, dtype=flash_dtype(name))
    model.config._attn_implementation = "flash_attention_2"
    return model


def flash_dtype(name: str) -> torch.dtype:
    """float32 is never flash-attention's, but exact here; the library cannot pass it from GPT-2's Conv1D layers."""
    return torch.float16 if name == "GPT-2" else torch.float32


FLASH = [name for name in DECODERS if name != "Falcon"]  # chooses its attention class when it is built


@pytest.mark.parametrize("name", FLASH)
def test_arguments_that_reach_flash_attention(name, flash):
    rows = texts()
    model = on_flash(name)
    run(model, alone(rows[0]))
    assert {call[1] for call in flash} == {True}, "the stand-in is not in the way"
    flash.clear()
    bidirectional(model)
    assert flash
    assert not any(is_causal for _, is_causal, _ in flash)
    reference = build(name, dtype=flash_dtype(name))
    bidirectional(reference)
    expected = lone(reference, rows)
    tolerance = 1e-5 if flash_dtype(name) == torch.float32 else 2e-2
    flash.clear()
    assert apart(lone(model, rows), expected) <= tolerance
    assert set(flash) == {("fixed", False, (-1, -1))}
    flash.clear()
    error = max(apart(outputs(model, rows, side), expected) for side in ("left", "right"))
    assert error <= tolerance
    assert set(flash) == {("varlen", False, (-1, -1))}
    assert len(flash) == 2 * L


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_flash_attention_in_the_recompute(name, reentrant, flash):
    model = on_flash(name)
    bidirectional(model, check=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for batch in (alone(texts()[0]), pad(texts())):
        flash.clear()
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        out = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
        assert len(flash) == L
        out.sum().backward()
        assert len(flash) == 2 * L
        assert not any(is_causal for _, is_causal, _ in flash)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_that_reach_flash_attention(name, flash):
    """One token less to each side than the other backends see; Gemma3's own mode is the same on all."""
    rows = texts((9, 9))
    for choice in ("keep", "full"):
        model = on_flash(name, WINDOWED)
        bidirectional(model, sliding_window=choice)
        flash.clear()
        got = lone(model, rows)
        side = 2 if name == "Gemma3" else 3
        windows = {window for _, _, window in flash}
        everywhere = name in ("Mistral", "Phi3")
        expected = {(side, side)} if everywhere else {(side, side), (-1, -1)}
        assert windows == (expected if choice == "keep" else {(-1, -1)})
        if choice == "full" or name == "Gemma3":
            reference = build(name, among=WINDOWED)
            bidirectional(reference, sliding_window=choice)
            assert apart(got, lone(reference, rows)) <= 1e-5


# --- on a GPU ---------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in DECODERS if (name, "sdpa") not in REFUSED])
def test_torch_flash_attention_on_a_gpu(name):
    """Unpadded batches run on nothing but FlashAttention; then everything runs on what the library chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = build(name, "sdpa", dtype=torch.bfloat16).cuda()
    bidirectional(model)
    batch = {key: value.cuda() for key, value in alone(texts()[0]).items()}
    always_masked = name in ("Gemma3", "Falcon")  # they build a mask for unpadded batches too
    with contextlib.nullcontext() if always_masked else sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = run(model, batch)
    exact = build(name, "eager").cuda()
    bidirectional(exact)
    assert (got.float() - run(exact, batch)).norm() <= 3e-2 * run(exact, batch).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2"])
def test_compiled_and_packaged_backends_on_a_gpu(backend):
    if backend == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    with torch.compiler.set_stance("default"):
        model = build("Llama", backend, dtype=torch.bfloat16).cuda()
        bidirectional(model)
        report = check_attention(model)
        assert report.bidirectional
        assert report.backend == backend
        causal(model)
        check_attention(model, "causal")
