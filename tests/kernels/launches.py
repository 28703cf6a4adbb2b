"""What the launchers launch, without launching it: recorders stand in place of the kernels. Needs no GPU."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mlpool_kernels import tiles

# By name: the package exports functions called as their modules.
NAMES = (
    "attend", "contrast", "contrast_kernels", "embed", "feed_forward", "gather", "gather_kernels", "mix", "rows",
    "select", "sums",
)  # fmt: skip
MODULES = {name: importlib.import_module(f"mlpool_kernels.{name}") for name in NAMES}
attend, contrast, embed, feed_forward, gather, gather_kernels, mix, rows_of, select, sums = (
    module for name, module in MODULES.items() if name != "contrast_kernels"
)


class Launch(NamedTuple):
    """kernel, grid, and what it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass
class Recorder:
    kernel: Any
    launches: list[Launch]

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(Launch(self.kernel, grid, args, options))


class Sizes(NamedTuple):
    dtype: torch.dtype
    layers: int
    hidden: int
    latents: int
    heads: int
    batch: int = 2
    tokens: int = 32


def record(monkeypatch: Any, name: str, tile: dict[str, int] | None, sizes: Sizes, device: str = "cpu") -> list[Launch]:
    """The launches of the kernel `name` of `tiles.TILES`, at `tile` or at its own; device "meta" needs no memory."""
    launches: list[Launch] = []
    for module in MODULES.values():
        for attribute in [a for a in vars(module) if a.endswith("_kernel")]:
            monkeypatch.setattr(module, attribute, Recorder(getattr(module, attribute), launches))
    for module in (contrast, embed, gather):
        monkeypatch.setattr(module, "use_triton", lambda *_: True)
    if tile is not None:
        monkeypatch.setattr(tiles, "_overrides", lambda: {name: tile})
    with torch.device(device):
        _launch(name, sizes, every=tile is None)
    assert launches
    return launches


def _launch(name: str, sizes: Sizes, every: bool) -> None:
    """every: also forms whose code is part of another's, which add nothing at each tile."""
    dtype, layers, hidden, latents, heads, batch, tokens = sizes
    width, columns = hidden, heads * latents
    if name == "attend_text":
        batch = max(batch, attend.MANY_TEXTS)
    states = [torch.zeros(batch, tokens, hidden, dtype=dtype) for _ in range(layers)]
    rows = torch.arange(1, batch + 1) * tokens - 1
    starts, ends, count = rows - tokens + 1, rows + 1, rows * 0 + tokens
    keep = torch.ones(batch * tokens, dtype=torch.bool)
    spans = (starts, ends, rows, count, keep)
    vector, bias = torch.zeros(hidden), torch.zeros(2 * width)
    x0 = torch.zeros(batch, layers, hidden, dtype=dtype)
    scores = torch.zeros(batch, layers, columns, dtype=dtype)
    both = torch.zeros(batch, latents, 2 * width, dtype=dtype)
    if name in ("mean", "last"):
        gather._forward(states, *spans, name == "mean", "triton")
    elif name == "gather_backward":
        gather._backward(x0, states[0].shape, *spans, True, "triton", None)
        gather._backward(x0, states[0].shape, *spans, False, "triton", None)
        gather._backward(x0[:, :1], states[0].shape, *spans, True, "triton", states[0])
    elif name == "unit_mean":
        gather._forward(states, *spans, True, "triton", True)
        gather._backward(x0, states[0].shape, *spans, True, "triton", None, states)
        gather._backward(x0[:, :1], states[0].shape, *spans, True, "triton", states[0], states[:1])
    elif name in ("attend", "attend_text", "norm"):
        new, mixing = (states, rows), torch.zeros(layers)
        most, least = (*new, _norm(sizes, mixing)), ([x0], None, rows_of.Norm(None, None, vector, vector))
        between = (*new, _norm(sizes, None)), ([x0], None, rows_of.Norm(mixing, None, vector, vector))
        for given in (most, least, *(between if every else ())):
            if name == "norm":
                rows_of.norm_rows_triton(*given, dtype)
            else:
                attend.attend_one_launch(*given, torch.zeros(columns, hidden, dtype=dtype), dtype)
    elif name == "norm_backward":
        added = torch.zeros(batch, hidden)
        rows_of.norm_rows_backward_triton(x0, x0, _norm(sizes, torch.zeros(layers)), added, summed=True)
        rows_of.norm_rows_backward_triton(x0, x0, _norm(sizes, None), None, summed=True)
        rows_of.norm_rows_backward_triton(x0, x0, rows_of.Norm(None, None, vector, vector), None, summed=False)
        for shared in (False, True):
            rows_of.norm_rows_backward_triton(
                x0, x0, rows_of.Norm(None, None, vector, vector), added, summed=True, shared=shared
            )
    elif name == "sum":
        sums.sum_parts({"one": torch.zeros(batch, hidden), "two": torch.zeros(512, 3 * hidden)}, batch, dtype)
    elif name == "softmax":
        attend.softmax_(scores, torch.ones(batch, layers, dtype=torch.bool), True)
        attend.softmax_backward_(scores, scores, True)
    elif name == "embed":
        product, gate = torch.zeros(batch, hidden, dtype=dtype), torch.zeros(hidden, dtype=dtype, requires_grad=True)
        arguments = (product, vector, torch.zeros(batch, hidden))
        embed.embed(*arguments, x0[:, -1], gate, True, dtype).backward(product)
        embed.embed(*arguments, None, None, False, torch.float32)
    elif name == "select":
        mask = torch.ones(batch, tokens, dtype=torch.int64)
        select.select_padded(mask, None, 0)
        select.select_padded(mask.bool(), mask, 2)
    elif name == "mix":
        values = torch.zeros(batch * layers, heads, hidden, dtype=dtype)
        for base in (None, torch.zeros(batch, hidden)):
            mix._mix_triton(scores, mix.Values(None, values), None, torch.zeros(latents, hidden), vector, vector, base)
    elif name == "mix_heads":
        values, weight = (
            torch.zeros(*size, dtype=dtype) for size in ((batch * layers, heads, 64), (hidden, heads * 64))
        )
        for base in (None, torch.zeros(batch, hidden)):
            mix._mix_triton(
                scores, mix.Values(values, None), weight, torch.zeros(latents, hidden), vector, vector, base
            )
    elif name == "mix_backward":
        values, grad = (
            torch.zeros(batch * layers, heads, 64, dtype=dtype),
            torch.zeros(batch, latents, heads * 64, dtype=dtype),
        )
        for given, scored in ((None, True), (scores, True), (None, False)):
            mix.mix_heads_backward(grad, scores, values, latents, given, scored)
    elif name.startswith("contrast"):
        _launch_contrast(sizes, name == "contrast_stages")
    elif name.startswith("feed_forward"):
        normed, weight = (torch.zeros(*size, hidden, dtype=dtype) for size in ((batch, latents), (2 * width,)))
        feed_forward._feed_forward_triton(normed, weight, bias, name == "feed_forward_tma")
    else:
        feed_forward.gate_mean(both, True)
        feed_forward.gate_backward(both, torch.zeros(batch, width), True, True)


def _norm(sizes: Sizes, mixing: torch.Tensor | None) -> Any:
    vector = torch.zeros(sizes.hidden)
    return rows_of.Norm(mixing, torch.zeros(sizes.layers, sizes.hidden), vector, vector)


def _launch_contrast(sizes: Sizes, stages: bool) -> None:
    """A text a token, as many as memory is for: with nothing hidden and with all masks, or with all and prefixes."""
    most = 20_000 if torch.empty(0).is_meta else 64
    texts, hidden = min(sizes.batch * sizes.tokens, most), sizes.hidden
    rows, others = (torch.zeros(n, hidden, dtype=sizes.dtype) for n in (texts, 2 * texts))
    keys = torch.zeros(2 * texts, 2, dtype=torch.int64)
    masks = [(keys[:texts], keys, torch.zeros(texts))]
    for given in masks if stages else [(None, None, None), *masks]:
        dims = [hidden // 4, hidden // 2] if stages else [hidden]
        arguments = (rows, others, torch.arange(texts), *given, dims, 0.05, "triton")
        logs, positives = contrast.forward(*arguments)
        contrast.backward(logs, positives, logs, *arguments)
