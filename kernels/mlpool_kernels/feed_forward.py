"""Feed-forward and mean over latents: the gated width is never kept.

    [a|g] = N W1ᵀ + b1        ū = mean_r(a ⊙ gelu(g))         exact gelu, a and g of width F

N [B,R,D] -> ū [B,F]. The mean commutes with W2, which then acts on one row per text (`pool.py`). Two forms:

    fused     one launch: both halves of W1, gate and mean; a program holds a block of F and sums over all latents.
              From sm_90 on the tiles come by tensor descriptors (the copy engine), which leaves registers for larger
              ones; elsewhere, and for rows that do not start every 16 bytes, by pointers
    chunked   the product W1 in chunks of texts, then one launch that gates and reduces; on a CPU the same in torch

The backward computes [a|g] again chunk by chunk (or reads it, where it was saved) and turns it into its gradient.

Source: arXiv 2409.02727, section 3.3, equation 6; GEGLU with the exact gelu as in the released module.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .runtime import capability, ceil_div, dot_options, jit, tl, triton, wide_dtype
from .tiles import tile

TensorDescriptor: Any = None
if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[no-redef]

# The chunk of [a|g] that is alive at once; large enough for products at full speed.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
# On a CPU without saving: units of F in a block, and numbers of its product.
CPU_UNITS, CACHED_NUMBERS = 1024, 1 << 20


@jit
def _gelu(x):
    """Exact gelu and its derivative."""
    normal = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return x * normal, normal + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@jit
def _feed_forward_kernel(
    normed, weight, bias, out, B, R,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """ū of TEXTS texts and BLOCK_F units. normed and weight are pointers, or with DESCRIPTORS tensor descriptors."""
    # ROWS = R where several texts fill a tile; else a tile is ROWS = BLOCK_R latents of one text.
    TEXTS: tl.constexpr = BLOCK_R // ROWS
    # GROUP tiles of texts go through all of W1 together: what one program reads of either, the others find in L2.
    blocks = (WIDTH + BLOCK_F - 1) // BLOCK_F
    group = tl.program_id(0) // (GROUP * blocks)
    place = tl.program_id(0) % (GROUP * blocks)
    size = tl.minimum(tl.cdiv(B, TEXTS) - group * GROUP, GROUP)
    first_text = (group * GROUP + place % size) * TEXTS
    first_unit = place // size * BLOCK_F
    unit = first_unit + tl.arange(0, BLOCK_F)
    valid = unit < WIDTH
    bias_a = tl.load(bias + unit, mask=valid, other=0.0).to(tl.float32)
    bias_g = tl.load(bias + WIDTH + unit, mask=valid, other=0.0).to(tl.float32)
    total = tl.zeros([TEXTS, BLOCK_F], tl.float32)
    for start in range(0, R, ROWS):
        index = tl.arange(0, BLOCK_R)
        own = (start + index % ROWS < R) & (first_text + index // ROWS < B)
        row = (first_text.to(tl.int64) * R + start + index)[:, None] * HIDDEN
        a = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
        g = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
        for first in range(0, HIDDEN, BLOCK_D):
            if DESCRIPTORS:
                # Rows of the next text and units of the other half are read too, and left out below.
                x = normed.load([first_text * R + start, first])
                wa = weight.load([first_unit, first]).T
                wg = weight.load([WIDTH + first_unit, first]).T
            else:
                column = first + tl.arange(0, BLOCK_D)
                inside = column < HIDDEN
                x = tl.load(normed + row + column[None, :], mask=own[:, None] & inside[None, :], other=0.0)
                half = weight + unit[None, :].to(tl.int64) * HIDDEN + column[:, None]
                mask = valid[None, :] & inside[:, None]
                wa = tl.load(half, mask=mask, other=0.0)
                wg = tl.load(half + WIDTH * HIDDEN, mask=mask, other=0.0)
            if UPCAST:
                x, wa, wg = x.to(tl.float32), wa.to(tl.float32), wg.to(tl.float32)
            a = tl.dot(x, wa, a, input_precision=PRECISION)
            g = tl.dot(x, wg, g, input_precision=PRECISION)
        gated, _ = _gelu(g + bias_g[None, :])
        u = tl.where(own[:, None], (a + bias_a[None, :]) * gated, 0.0)
        total += tl.sum(tl.reshape(u, [TEXTS, ROWS, BLOCK_F]), 1)
    text = first_text + tl.arange(0, TEXTS)
    target = out + text.to(tl.int64)[:, None] * WIDTH + unit[None, :]
    tl.store(target, (total / R).to(out.dtype.element_ty), mask=(text < B)[:, None] & valid[None, :])


@jit
def _gate_kernel(
    both, grad_mean, out, bias_grad, R,
    WIDTH: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Of [a|g] [B,R,2F]: the mean over latents of a ⊙ gelu(g), or its gradient and that gradient's sum over latents."""
    text = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    valid = unit < WIDTH
    total = tl.zeros([BLOCK_F], tl.float32)
    total_g = tl.zeros([BLOCK_F], tl.float32)
    if BACKWARD:
        du = tl.load(grad_mean + text * WIDTH + unit, mask=valid, other=0.0).to(tl.float32) / R
    for start in range(0, R, BLOCK_R):
        latent = start + tl.arange(0, BLOCK_R)
        mask = (latent < R)[:, None] & valid[None, :]
        offset = (text * R + latent)[:, None] * (2 * WIDTH) + unit[None, :]
        a = tl.load(both + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(both + offset + WIDTH, mask=mask, other=0.0).to(tl.float32)
        gated, slope = _gelu(g)
        if BACKWARD:
            da = tl.where(mask, du[None, :] * gated, 0.0)
            dg = tl.where(mask, du[None, :] * a * slope, 0.0)
            tl.store(out + offset, da.to(out.dtype.element_ty), mask=mask)
            tl.store(out + offset + WIDTH, dg.to(out.dtype.element_ty), mask=mask)
            total += tl.sum(da, 0)
            total_g += tl.sum(dg, 0)
        else:
            total += tl.sum(tl.where(mask, a * gated, 0.0), 0)
    if BACKWARD:
        tl.store(bias_grad + text * 2 * WIDTH + unit, total, mask=valid)
        tl.store(bias_grad + text * 2 * WIDTH + WIDTH + unit, total_g, mask=valid)
    else:
        tl.store(out + text * WIDTH + unit, (total / R).to(out.dtype.element_ty), mask=valid)


def gate_mean(both: Tensor, triton: bool) -> Tensor:
    """[a|g] [B,R,2F] -> ū [B,F], summed in float32 at least."""
    if not triton:
        a, g = both.chunk(2, dim=-1)
        return F.gelu(g).mul_(a).mean(1, dtype=wide_dtype(both)).to(both.dtype)
    batch, num_latents, width = both.shape[0], both.shape[1], both.shape[2] // 2
    out = both.new_empty(batch, width)
    t = tile("gate")
    with torch.cuda.device_of(both):
        grid = (batch, ceil_div(width, t["BLOCK_F"]))
        _gate_kernel[grid](both, None, out, None, num_latents, width, False, **t)
    return out


def gate_backward(both: Tensor, grad: Tensor, triton: bool, overwrite: bool) -> tuple[Tensor, Tensor]:
    """[a|g] [B,R,2F] and dū [B,F] -> d[a|g] (in place of it where `overwrite`) and parts of db1 [·,2F]."""
    batch, num_latents, width = both.shape[0], both.shape[1], both.shape[2] // 2
    out = both if overwrite else torch.empty_like(both)
    if triton:
        bias_grad = both.new_empty(batch, 2 * width, dtype=torch.float32)
        t = tile("gate")
        with torch.cuda.device_of(both):
            grid = (batch, ceil_div(width, t["BLOCK_F"]))
            _gate_kernel[grid](both, grad, out, bias_grad, num_latents, width, True, **t)
        return out, bias_grad
    (a, g), (da, dg) = both.chunk(2, dim=-1), out.chunk(2, dim=-1)
    du = (grad / num_latents).to(both.dtype)[:, None]
    # Fresh memory costs a CPU more than the arithmetic. Where da takes the place of a, a has been read before.
    dgated = a * du if overwrite else torch.mul(a, du, out=dg)
    torch.ops.aten.gelu(g, out=da).mul_(du)
    torch.ops.aten.gelu_backward(dgated, g, grad_input=dg)
    return out, out.sum((0, 1), dtype=wide_dtype(both))[None]


def _expand(normed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[a|g] [B,R,2F]."""
    both = torch.addmm(bias.to(normed.dtype), normed.flatten(0, 1), weight.T)
    return both.view(*normed.shape[:2], -1)


def _texts_per_chunk(normed: Tensor, weight: Tensor) -> int:
    size = normed.shape[1] * weight.shape[0] * normed.element_size()
    return max(1, CHUNK_BYTES.get(normed.device.type, CHUNK_BYTES["cpu"]) // size)


def feed_forward(
    normed: Tensor, weight: Tensor, bias: Tensor, form: str, triton: bool, save: bool
) -> tuple[Tensor, Tensor | None]:
    """N [B,R,D], W1 [2F,D], b1 [2F] -> ū [B,F] of N's dtype, and [a|g] [B,R,2F] where `save`."""
    if triton and form == "fused" and not save:
        return _feed_forward_triton(normed, weight, bias), None
    step = _texts_per_chunk(normed, weight)
    if save:
        both = _expand(normed, weight, bias)
        return _joined([gate_mean(c, triton) for c in both.split(step)]), both
    if normed.is_cuda or triton:
        return _joined([gate_mean(_expand(c, weight, bias), triton) for c in normed.split(step)]), None
    return _feed_forward_cpu(normed, weight, bias), None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _feed_forward_cpu(normed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Blocks of units and of texts: what a block makes stays in the cache, and its memory is used again."""
    batch, num_latents, _ = normed.shape
    width = weight.shape[0] // 2
    out = normed.new_empty(batch, width, dtype=wide_dtype(normed))
    step = max(1, CACHED_NUMBERS // (num_latents * CPU_UNITS))
    for unit in range(0, width, CPU_UNITS):
        part = slice(unit, min(unit + CPU_UNITS, width))
        (wa, wg), (ba, bg) = ((t[:width][part], t[width:][part]) for t in (weight, bias.to(normed.dtype)))
        for first in range(0, batch, step):
            x = normed[first : first + step].flatten(0, 1)
            u = F.gelu(torch.addmm(bg, x, wg.T)).mul_(torch.addmm(ba, x, wa.T))
            out[first : first + step, part] = u.view(-1, num_latents, u.shape[1]).mean(1, dtype=out.dtype)
    return out.to(normed.dtype)


def takes_descriptors(normed: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine of sm_90 and later can read the tiles: 16-bit rows that start every 16 bytes."""
    found = capability(normed)
    if found is None or found < 90 or normed.element_size() != 2 or normed.shape[2] % 8:
        return False
    # The engine's coordinates are of 32 bits.
    return len(normed) * normed.shape[1] < 2**31 and all(t.data_ptr() % 16 == 0 for t in (normed, weight))


def _feed_forward_triton(normed: Tensor, weight: Tensor, bias: Tensor, descriptors: bool | None = None) -> Tensor:
    """descriptors: read by tensor descriptors or by pointers; None is by descriptors where they can be used."""
    batch, num_latents, hidden = normed.shape
    width = weight.shape[0] // 2
    out = normed.new_empty(batch, width)
    descriptors = takes_descriptors(normed, weight) if descriptors is None else descriptors
    name = "feed_forward_tma" if descriptors else "feed_forward"
    t = tile(name, hidden, wide=normed.dtype == torch.float32, capability=capability(normed))
    rows = num_latents if t["BLOCK_R"] % num_latents == 0 else t["BLOCK_R"]
    tiles = ceil_div(batch, t["BLOCK_R"] // rows) * ceil_div(width, t["BLOCK_F"])
    x, w = normed.contiguous(), weight.contiguous()
    if descriptors:
        if num_latents % 64:
            # Rows of several texts in a tile are told apart by more registers than two programs leave each other.
            t["maxnreg"] = min(255, 65_536 // (32 * t["num_warps"]))
        x = TensorDescriptor.from_tensor(x.flatten(0, 1), [t["BLOCK_R"], t["BLOCK_D"]])
        w = TensorDescriptor.from_tensor(w, [t["BLOCK_F"], t["BLOCK_D"]])
    with torch.cuda.device_of(normed):
        _feed_forward_kernel[(tiles,)](
            x, w, bias, out, batch, num_latents, hidden, width, rows, **t, DESCRIPTORS=descriptors,
            **dot_options(normed.dtype),
        )  # fmt: skip
    return out


def feed_forward_backward(
    grad: Tensor, normed: Tensor, weight: Tensor, bias: Tensor, both: Tensor | None, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dū [B,F] -> dN [B,R,D], dW1 [2F,D], parts of db1 [·,2F]; both: the saved [a|g], None to compute it again."""
    step = _texts_per_chunk(normed, weight)
    if step >= len(normed):
        both, overwrite = (_expand(normed, weight, bias), True) if both is None else (both, False)
        dboth, dbias = gate_backward(both, grad, triton, overwrite)
        dboth = dboth.flatten(0, 1)
        return (dboth @ weight).view_as(normed), dboth.T @ normed.flatten(0, 1), dbias
    dnormed = torch.empty_like(normed, memory_format=torch.contiguous_format)
    dweight, parts = torch.zeros_like(weight), []
    for first in range(0, len(normed), step):
        part = slice(first, first + step)
        chunk = _expand(normed[part], weight, bias) if both is None else both[part]
        dboth, db = gate_backward(chunk, grad[part], triton, overwrite=both is None)
        dboth = dboth.flatten(0, 1)
        torch.mm(dboth, weight, out=dnormed[part].flatten(0, 1))
        dweight.addmm_(dboth.T, normed[part].flatten(0, 1))
        parts.append(db.sum(0))
    return dnormed, dweight, torch.stack(parts)
