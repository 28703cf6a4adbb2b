"""Gather: one row per text out of every layer's hidden states, the last token's or a mean of its tokens.

    last        X0[b, l] = h_l[last_b]
    mean        X0[b, l] = Σ_t keep[t] h_l[t] / count_b            t over the tokens of text b
    unit mean   X0[b, l] = Σ_t keep[t] h_l[t] / ‖h_l[t]‖ / count_b

A token of zeros adds nothing to the unit mean and gets no gradient; the others, with u = h / ‖h‖ and the gradient g of
their text, get (g − u (u·g)) / ‖h‖ / count. The backward reads the hidden states again and takes the lengths from them:
nothing is kept but the states themselves. The unit mean's norm is at most 1; a pool that wants another scale, say that
of a normed layer, √D, multiplies by it.

h_l: L tensors [B, T, D] (or packed [1, total, D] or [total, D]) -> X0 [B, L, D], one launch for all layers, no copy
of the hidden states. Backward writes one dense gradient per layer, each element once.

The layers are passed to the kernel as a tuple of pointers and selected inside it: no table in memory, so no copy to
the device and nothing to keep alive, and the loads stay 16 bytes wide (tried: 24 layers, sm_90).

Source: "Pooling And Attention" (arXiv 2409.02727), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .runtime import ceil_div, direct, jit, tl, untraced, use_triton, wide_dtype
from .tiles import tile, whole_rows

# Programs that fill a large GPU several times over (132 multiprocessors), the fewest rows worth one, and the tile that
# adds up what they leave.
PROGRAMS, PART_ROWS = 1024, 16
CACHED_NUMBERS = 1 << 17
SUM_TILE = {"BLOCK_T": 64, "BLOCK_D": 64, "num_warps": 4}


@jit
def _select(states, index, LAYERS: tl.constexpr):
    """The pointer of layer `index` (a scalar or a block of them) out of a tuple of pointers."""
    pointer = states[0] + index * 0
    for i in tl.static_range(1, LAYERS):
        pointer = tl.where(index == i, states[i], pointer)
    return pointer


@jit
def _inverse_length(x):
    """1 / ‖row‖ of a float32 tile, 0 of a row of zeros; what is no number stays none."""
    square = tl.sum(x * x, 1)
    zero = square == 0
    return tl.where(zero, 0.0, 1.0 / tl.sqrt(tl.where(zero, 1.0, square)))


@jit
def _mean_kernel(
    states, starts, ends, keep, count, out, tokens, stride_text, stride_token, parts, texts_per_count,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [texts, LAYERS, parts, HIDDEN]: a program sums one of `parts` equal parts of a text's tokens.

    Without `count` the sums themselves, else means (parts is 1). Without `starts` every text has `tokens` rows. With
    UNIT the rows are brought to unit length, so BLOCK_D holds all of them.
    """
    text = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    layer = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    if starts is None:
        start, length = text * tokens, tokens
    else:
        start = tl.load(starts + text)
        length = (tl.load(ends + text) - start).to(tl.int32)
    size = (length + parts - 1) // parts
    first = part * size
    stop = tl.minimum(first + size, length)
    # A text's rows lie one stride apart: the only division is outside the loop.
    base = _select(states, layer, LAYERS) + (start // tokens) * stride_text + (start % tokens) * stride_token
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for done in range(first, stop, BLOCK_T):
        row = done + tl.arange(0, BLOCK_T)
        kept = row < stop
        if keep is not None:
            kept = kept & (tl.load(keep + start + row, mask=kept, other=0) != 0)
        # Rows left out are not read at all: NaN in padding stays in padding.
        offset = row.to(tl.int64)[:, None] * stride_token + column[None, :]
        x = tl.load(base + offset, mask=kept[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if UNIT:
            x *= _inverse_length(x)[:, None]
        total += x
    result = tl.sum(total, 0)
    if count is not None:
        result = result / tl.load(count + text // texts_per_count).to(tl.float32)
    target = out + ((text * LAYERS + layer) * parts + part) * HIDDEN + column
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@jit
def _last_kernel(
    states, rows, out, tokens, stride_text, stride_token,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    text = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    base = _select(states, layer, LAYERS)
    row = tl.load(rows + text)
    base += (row // tokens) * stride_text + (row % tokens) * stride_token
    for first in range(0, HIDDEN, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = column < HIDDEN
        x = tl.load(base + column, mask=inside)
        tl.store(out + (text * LAYERS + layer) * HIDDEN + column, x, mask=inside)


@jit
def _backward_kernel(
    grads, states, added, grad_out, starts, ends, count, keep, rows, texts, tokens, stride_text, stride_token, parts,
    LAYERS: tl.constexpr, HIDDEN: tl.constexpr, LAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A kept row gets its text's gradient, divided by the text's tokens, the others zero; every element once.

    A program writes one of `parts` equal parts of a text's rows. The first text's begin at row 0, another's where the
    one before ended, the last text's reach to the end, so that what lies around packed texts is written too.
    With LAST `ends` holds the last tokens themselves. `added` [rows, HIDDEN] or None is a gradient to add to. With
    `states`, for the unit mean, BLOCK_D holds whole rows.
    """
    text = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    layer = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < HIDDEN
    end = tl.load(ends + text)
    begin = tl.where(text == 0, 0, tl.load(ends + text - 1, mask=text > 0, other=0))
    start = end
    if LAST:
        end += 1
        begin = tl.where(text == 0, 0, begin + 1)
    else:
        start = tl.load(starts + text)
    length = (tl.where(text == texts - 1, rows, end) - begin).to(tl.int32)
    size = (length + parts - 1) // parts
    first = part * size
    stop = tl.minimum(first + size, length)
    grad = tl.load(grad_out + (text * LAYERS + layer) * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
    if not LAST:
        grad = grad / tl.load(count + text).to(tl.float32)
    base = _select(grads, layer, LAYERS)
    if states is not None:
        source = _select(states, layer, LAYERS) + (start // tokens) * stride_text + (start % tokens) * stride_token
    for done in range(first, stop, BLOCK_T):
        place = done + tl.arange(0, BLOCK_T)
        row = begin + place
        kept = (row >= start) & (row < end)
        if keep is not None:
            kept = kept & (tl.load(keep + row, mask=kept, other=0) != 0)
        if states is not None:
            # As long as a row that is left out is not read, it counts as zeros, which get no gradient.
            lie = (row - start)[:, None] * stride_token + column[None, :]
            x = tl.load(source + lie, mask=kept[:, None] & inside[None, :], other=0.0).to(tl.float32)
            inverse = _inverse_length(x)[:, None]
            unit = x * inverse
            value = (grad[None, :] - unit * tl.sum(unit * grad[None, :], 1)[:, None]) * inverse
        else:
            value = tl.where(kept[:, None], grad[None, :], 0.0)
        offset = row[:, None] * HIDDEN + column[None, :]
        mask = (place < stop)[:, None] & inside[None, :]
        if added is not None:
            value += tl.load(added + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(base + offset, value.to(grad_out.dtype.element_ty), mask=mask)


def token_strides(state: Tensor) -> tuple[int, int, int]:
    """(T, stride of a text, stride of a token) of a [B, T, D] or packed [total, D] tensor, in elements."""
    if state.dim() == 2:
        return state.shape[0], 0, state.stride(0)
    return state.shape[1], state.stride(0), state.stride(1)


def one_launch(states: Sequence[Tensor]) -> bool:
    """Whether the layers can be read by one launch: same device, dtype and strides, D contiguous."""
    first = states[0]
    device, dtype, strides = first.device, first.dtype, first.stride()
    return strides[-1] == 1 and all(s.device == device and s.dtype == dtype and s.stride() == strides for s in states)


def _forward(
    states: Sequence[Tensor], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str, unit: bool = False,
) -> Tensor:  # fmt: skip
    first = states[0]
    if not (use_triton(backend, first) and one_launch(states)):
        # Layer by layer; what is kept is worked out once.
        if unit:
            kept = kept_rows(starts, ends, last, count, keep)
            pooled = [_unit_mean(s, kept) for s in states]
        else:
            text = text_of_row(first.shape[:-1].numel(), starts, ends, keep) if mean else None
            where = (last,) if first.dim() == 2 else (last // first.shape[-2], last % first.shape[-2])
            pooled = [_pool_torch(s, where, count, text) for s in states]
        return torch.stack([p.to(states[-1].device) for p in pooled], 1)
    if mean:
        return _mean_triton(states, starts, ends, count, keep, unit)
    hidden, layers, batch = first.shape[-1], len(states), len(last)
    out = first.new_empty(batch, layers, hidden)
    t = tile("last", hidden=hidden)
    with torch.cuda.device_of(first):
        _last_kernel[(batch, layers)](tuple(states), last, out, *token_strides(first), layers, hidden, **t)
    return out


def _tile(kernel: str, hidden: int, unit: bool) -> dict[str, int]:
    if not unit:
        return tile(kernel, hidden)
    t, rows, columns = whole_rows("unit_mean", hidden)
    return t | {"BLOCK_T": rows, "BLOCK_D": columns}


def _mean_triton(
    states: Sequence[Tensor], starts: Tensor, ends: Tensor, count: Tensor, keep: Tensor | None, unit: bool
) -> Tensor:
    """Where texts alone are too few programs, each is summed in parts, and the same kernel adds the parts up."""
    first = states[0]
    batch, layers, hidden = len(starts), len(states), first.shape[-1]
    t = _tile("mean", hidden, unit)
    blocks = ceil_div(hidden, t["BLOCK_D"])
    parts = _parts(batch * layers * blocks, first.shape[-2])
    out = first.new_empty(batch, layers, hidden)
    sums = out if parts == 1 else first.new_empty(batch, layers, parts, hidden, dtype=torch.float32)
    with torch.cuda.device_of(first):
        _mean_kernel[(batch * parts, layers, blocks)](
            tuple(states), starts, ends, keep, count if parts == 1 else None, sums, *token_strides(first), parts, 1,
            layers, hidden, unit, **t,
        )  # fmt: skip
        if parts > 1:
            _mean_kernel[(batch * layers, 1, ceil_div(hidden, SUM_TILE["BLOCK_D"]))](
                (sums,), None, None, None, count, out, parts, parts * hidden, hidden, 1, layers, 1, hidden, False,
                **SUM_TILE,
            )  # fmt: skip
    return out


def _parts(programs: int, longest: int) -> int:
    """Into how many parts a text of up to `longest` rows is cut, where there are `programs` without cutting."""
    return max(1, min(ceil_div(longest, PART_ROWS), ceil_div(PROGRAMS, programs)))


def _pool_torch(state: Tensor, last: tuple[Tensor, ...], count: Tensor, text: Tensor | None) -> Tensor:
    """One layer: [B, D]; the mean where `text` [rows] says what each row counts for, else the token at index `last`."""
    device = state.device
    if text is None:
        return state[tuple(i.to(device) for i in last)]
    flat = state.flatten(0, -2)
    # Rows left out are summed apart: a product with a mask would let NaN in the padding through.
    sums = flat.new_zeros(len(count) + 1, flat.shape[1], dtype=torch.promote_types(flat.dtype, torch.float32))
    sums.index_add_(0, text.to(device), flat.to(sums.dtype))
    return (sums[:-1] / count.to(device)[:, None]).to(state.dtype)


def _unit_mean(state: Tensor, kept: Sequence[slice | Tensor]) -> Tensor:
    """One layer's unit mean [B, D], text by text: what comes from memory for the lengths is summed from the cache."""
    flat = state.flatten(0, -2)
    wide, step = wide_dtype(flat), _cached_rows(flat)
    sums = torch.zeros(len(kept), flat.shape[1], dtype=wide, device=flat.device)
    tiny = torch.finfo(wide).tiny  # a row of zeros adds zeros, whatever it is multiplied by
    for total, rows in zip(sums.unbind(), kept, strict=True):
        x = flat[rows]
        for block in (x,) if len(x) <= step else x.split(step):
            block = block if block.dtype == wide else block.to(wide)
            total.addmv_(block.T, torch.linalg.vector_norm(block, dim=1).clamp_min_(tiny).reciprocal_())
    return sums.div_(_counts(kept, sums)).to(state.dtype)


def _cached_rows(flat: Tensor) -> int:
    return max(1, CACHED_NUMBERS // flat.shape[1])


def _inverse_lengths(x: Tensor) -> Tensor:
    """1 / ‖row‖ [rows], 0 of a row of zeros."""
    length = torch.linalg.vector_norm(x, dim=1)
    return length.reciprocal().masked_fill_(length == 0, 0)


def kept_rows(
    starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None
) -> list[slice | Tensor]:  # fmt: skip
    """The kept rows of each text, a slice where they are one run. Reads values: for tensors on a CPU."""
    rows: list[slice | Tensor] = []
    keep = None if keep is None else keep.cpu()
    for start, end, final, n in torch.stack([starts, ends, last, count], 1).tolist():
        run = slice(final - n + 1, final + 1)
        if keep is None or bool(keep[run].all()):
            rows.append(run)
        else:
            rows.append(start + keep[start:end].nonzero().flatten())
    return rows


def text_of_row(rows: int, starts: Tensor, ends: Tensor, keep: Tensor | None) -> Tensor:
    """int64 [rows]: the text that each flat row counts for, B for rows that are left out."""
    row = torch.arange(rows, device=ends.device)
    text = torch.searchsorted(ends, row, right=True)
    left_out = row < starts[0]
    if keep is not None:
        left_out = left_out | ~keep
    return text.masked_fill(left_out, len(ends))


def _backward(
    grad: Tensor, shape: Sequence[int], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor,
    keep: Tensor | None, mean: bool, backend: str, added: Tensor | None = None, states: Sequence[Tensor] = (),
) -> list[Tensor]:  # fmt: skip
    layers, hidden = grad.shape[1:]
    grad = grad.contiguous()
    rows = torch.Size(shape).numel() // hidden
    if use_triton(backend, grad, *states) and (not states or (one_launch(states) and states[0].device == grad.device)):
        return _backward_triton(grad, shape, starts, ends if mean else last, count, keep, mean, added, states)
    flat = None if added is None else added.reshape(rows, hidden)
    if states:
        kept = kept_rows(starts, ends, last, count, keep)
        return [_unit_backward(g, s.to(g), kept, flat).view(shape) for g, s in zip(grad.unbind(1), states, strict=True)]
    if mean:
        text = text_of_row(rows, starts, ends, keep)
        each = torch.cat([grad / count[:, None, None], grad.new_zeros(1, layers, hidden)])
        spread = [each[:, layer].index_select(0, text) for layer in range(layers)]
        return [(s if flat is None else s.add_(flat)).view(shape) for s in spread]
    if flat is not None:
        return [flat.index_add(0, last, grad[:, 0]).view(shape)]
    zeros = [grad.new_zeros(rows, hidden) for _ in range(layers)]
    return [zero.index_copy_(0, last, grad[:, layer]).view(shape) for layer, zero in enumerate(zeros)]


def _unit_backward(grad: Tensor, state: Tensor, kept: Sequence[slice | Tensor], added: Tensor | None) -> Tensor:
    """One layer's gradient [rows, D] from that of its unit mean [B, D]."""
    flat = state.flatten(0, -2)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format) if added is None else added.clone()
    wide, step = wide_dtype(flat), _cached_rows(flat)
    # One block for all: fresh memory for each costs more than the arithmetic.
    work = torch.empty(step, flat.shape[1], dtype=wide, device=flat.device)
    done = 0
    for g, rows in zip(grad.to(wide) / _counts(kept, grad), kept, strict=True):
        run = rows if isinstance(rows, slice) else slice(int(rows[0]), int(rows[-1]) + 1)
        if added is None:  # else what is kept is added to what is there
            out[done : run.start if run is rows else run.stop] = 0
        done = run.stop
        x, place = flat[rows], out[rows]
        for first in range(0, len(x), step):
            block, target = x[first : first + step].to(wide), place[first : first + step]
            inverse = _inverse_lengths(block)
            along = torch.mv(block, g).mul_(inverse).mul_(inverse).mul_(inverse).neg_()
            result = target if added is None and out.dtype == wide else work[: len(block)]
            torch.mul(block, along[:, None], out=result).addr_(inverse, g)
            if result is not target and added is None:
                target.copy_(result)
            elif result is not target:
                target += result
        if run is not rows:
            out[rows] = place
    if added is None:
        out[done:] = 0
    return out


def _counts(kept: Sequence[slice | Tensor], like: Tensor) -> Tensor:
    counts = [rows.stop - rows.start if isinstance(rows, slice) else len(rows) for rows in kept]
    return torch.tensor(counts, device=like.device)[:, None]


def _backward_triton(
    grad: Tensor, shape: Sequence[int], starts: Tensor, ends: Tensor, count: Tensor, keep: Tensor | None, mean: bool,
    added: Tensor | None, states: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    batch, layers, hidden = grad.shape
    rows = torch.Size(shape).numel() // hidden
    grads = [grad.new_empty(shape) for _ in range(layers)]
    t = _tile("gather_backward", hidden, bool(states))
    blocks = ceil_div(hidden, t["BLOCK_D"])
    parts = _parts(batch * layers * blocks, shape[-2])
    strides = token_strides(states[0]) if states else (1, 0, 0)
    with torch.cuda.device_of(grad):
        _backward_kernel[(batch * parts, layers, blocks)](
            tuple(grads), tuple(states) or None, None if added is None else added.contiguous(), grad, starts, ends,
            count, keep if mean else None, rows, batch, *strides, parts, layers, hidden, not mean, **t,
        )  # fmt: skip
    return grads


@torch.library.custom_op("mlpool::gather", mutates_args=())
def _gather_op(
    states: list[Tensor], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str, unit: bool,
) -> Tensor:  # fmt: skip
    return _forward(states, starts, ends, last, count, keep, mean, backend, unit)


@_gather_op.register_fake
def _(states, starts, ends, last, count, keep, mean, backend, unit):
    return states[-1].new_empty(last.shape[0], len(states), states[0].shape[-1])


@torch.library.custom_op("mlpool::gather_backward", mutates_args=())
def _gather_backward_op(
    grad: Tensor, shape: list[int], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str, added: Tensor | None, states: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    return _backward(grad, shape, starts, ends, last, count, keep, mean, backend, added, states)


@_gather_backward_op.register_fake
def _(grad, shape, starts, ends, last, count, keep, mean, backend, added, states):
    return [grad.new_empty(shape) for _ in range(grad.shape[1])]


def _setup(ctx, inputs, output):
    states, *spans, keep, ctx.mean, ctx.backend, unit = inputs
    ctx.save_for_backward(*spans, keep, *(states if unit else ()))
    ctx.shape, ctx.devices = list(states[0].shape), [s.device for s in states]


def _gradient(ctx, grad, backward=_gather_backward_op):
    saved = ctx.saved_tensors  # asked for once: a checkpointed forward is unpacked a single time
    *spans, keep = saved[:5]
    grads = backward(grad, ctx.shape, *spans, keep, ctx.mean, ctx.backend, None, list(saved[5:]))
    return [g.to(device) for g, device in zip(grads, ctx.devices, strict=True)], *(None,) * 8


_gather_op.register_autograd(_gradient, setup_context=_setup)


class _GatherFunction(torch.autograd.Function):
    """`_gather_op` where nothing traces it."""

    @staticmethod
    def forward(ctx, arguments, *states):
        output = _forward(states, *arguments)
        _setup(ctx, (states, *arguments), output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, *_gradient(ctx, grad, _backward)[0]


def gather(
    states: Sequence[Tensor], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str = "auto", unit: bool = False,
) -> Tensor:  # fmt: skip
    """One row per text and layer.

    Args:
        states: L tensors of one shape, [B, T, D], [1, total, D] or [total, D], any floating dtype. Several devices
            work, a layer at a time; the result is on the last layer's.
        starts, ends, last, count: int64 [B], see `mlpool.pooling.tokens.Tokens`; keep: bool [rows] or None.
        mean: the mean of the kept tokens, accumulated in float32, instead of the last kept token.
        backend: "auto", "triton" or "torch". unit: with `mean`, every token is brought to unit length first.

    Returns: X0 [B, L, D] of the states' dtype. Differentiable in `states`, dense gradients.
    """
    if unit and not mean:
        raise ValueError("unit=True is for a mean; the last token alone is brought to unit length by whoever reads it")
    arguments = (starts, ends, last, count, keep, mean, backend, unit)
    if direct(states):
        return _forward(states, *arguments)
    if untraced(states):
        return _GatherFunction.apply(arguments, *states)
    return _gather_op(list(states), *arguments)


def gather_backward(
    grad: Tensor, shape: Sequence[int], starts: Tensor, ends: Tensor, last: Tensor, count: Tensor, keep: Tensor | None,
    mean: bool, backend: str = "auto", added: Tensor | None = None, states: Sequence[Tensor] = (),
) -> list[Tensor]:  # fmt: skip
    """The gradients of the L states, dense and of `shape`, from that of their rows.

    Args:
        grad: [B, L, D]. added: where L is 1, a gradient [rows, D] to which the state's own is added, out of place.
        states: the L states themselves for the unit mean, none for the others. The others are those of `gather`.
    """
    arguments = (grad, list(shape), starts, ends, last, count, keep, mean, backend, added, list(states))
    # Torch's own operations can be traced and differentiated again; a kernel cannot, and its op says so.
    plain = direct([grad, added, *states]) or not use_triton(backend, grad)
    return (_backward if plain else _gather_backward_op)(*arguments)
