"""Attention of a packed batch: the function and the mask function behind `attn_implementation="mlpool_packed"`.

A packed batch of B texts is one row [1, total] with offsets cu_seqlens [B+1]; tokens attend within their own text. What
a layer's tokens may see is taken from the library's own mask, not from flags that families set differently: while a
packed forward runs, the mask function evaluates three rows of that mask within the longest text and hands the layers
its span, int32 [2 + B+1] on the CPU: how many tokens are seen to the left and right of one's own, -1 for all, and the
offsets (StableLM passes no `cu_seq_lens_q` on). So direction and windows (eager and sdpa count |i - j| <= w,
flash-attention w - 1; Gemma3's own mode and ModernBERT count differently again) are those of the padded model, by
construction. A mask that is no such band is refused.

Kernels: on CUDA, in float16 and bfloat16, `torch.nn.attention.varlen` (the FlashAttention inside PyTorch), or
flash-attn where it is installed and needed (soft-capping, dropout). Everywhere else scaled_dot_product_attention, text
by text: batching texts of equal length was measured too and gains nothing on a CPU (forward and backward within 5 %).

A model that has this implementation but is not packed by `pack` runs correctly on padded batches, as on sdpa.
"""

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pooling.base import log_once, running_dtype
from .families import PACKED, require_transformers

_HALF = (torch.float16, torch.bfloat16)


@dataclass
class PackedCall:
    """What both functions need to know of the packed forward that runs now.

    offsets: int32 [B+1]. ends: the same numbers. attended: how often the attention function was called.
    """

    offsets: Tensor
    ends: list[int]
    attended: int = 0

    @property
    def longest(self) -> tuple[int, int]:
        """Start and length of the longest text."""
        lengths = lengths_of(self.ends)
        index = max(range(len(lengths)), key=lengths.__getitem__)
        return self.ends[index], lengths[index]


def lengths_of(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in itertools.pairwise(ends)]


def require_whole(ends: Sequence[int], total: int) -> None:
    """Refuse offsets that leave out tokens of the packed row."""
    if ends[0] != 0 or ends[-1] != total:
        raise ValueError(
            f"cu_seq_lens_q runs from {ends[0]} to {ends[-1]} in a row of {total} tokens; it must cover the row"
        )


running: ContextVar[PackedCall | None] = ContextVar("mlpool_packed_call", default=None)


def register() -> None:
    """Make `attn_implementation="mlpool_packed"` known to transformers; ImportError as of `require_transformers`."""
    transformers = require_transformers()
    # Both: without its mask function padding would be attended to.
    transformers.AttentionInterface.register(PACKED, packed_attention)
    transformers.AttentionMaskInterface.register(PACKED, packed_mask)


# --- the mask ---------------------------------------------------------------------------------------------------------


def packed_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Callable | None = None, attention_mask: Tensor | None = None, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """In a packed forward the span, int32 [2 + B+1]; otherwise what sdpa gets.

    Raises:
        ValueError: a packed forward whose mask is no band (attention in chunks or blocks).
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = mask_function or causal_mask_function
    call = running.get()
    if call is not None:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        start, length = call.longest
        places = (0, length // 2, length - 1)
        rows: list[Any] = [
            sdpa_mask(
                batch_size=1, q_length=1, kv_length=length, q_offset=start + place, kv_offset=start,
                mask_function=mask_function, **kwargs,
            )
            for place in places
        ]  # fmt: skip
        reach = _reach(torch.cat([row.flatten()[None] for row in rows]).cpu(), places)
        return torch.tensor([*reach, *call.ends], dtype=torch.int32)
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **kwargs,
    )  # fmt: skip
    if mask is not None and attention_mask is not None:
        log_once(f"{PACKED} runs with the padding, as sdpa does, until mlpool.attention.pack(model) is called")
    return mask


def _reach(rows: Tensor, places: Sequence[int]) -> list[int]:
    """What the tokens at `places` see, bool [len(places), n] → how far they see to the left and right."""
    n = rows.shape[1]
    left, right = int(rows[-1].sum()) - 1, int(rows[0].sum()) - 1
    at = torch.arange(n)
    band = torch.stack([(at >= place - left) & (at <= place + right) for place in places])
    if left < 0 or right < 0 or not torch.equal(rows, band):
        raise ValueError(
            "this model's attention mask is no window around each token (it attends in chunks or blocks), which packed "
            "execution has no kernel for; call mlpool.attention.unpack(model)"
        )
    return [-1 if reach >= n - 1 else reach for reach in (left, right)]


# --- the attention ----------------------------------------------------------------------------------------------------


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [1, H, total, d], key and value [1, H_kv, total, d], with a span or `cu_seq_lens_q` → [1, total, H, d].

    Without either the batch is padded and goes to the library's sdpa.

    Raises:
        ValueError: soft-capping that no kernel here has, a position bias, attention sinks, cross-attention, offsets
            that do not cover the row.
    """
    offsets: Tensor | None = kwargs.get("cu_seq_lens_q")
    is_span = attention_mask is not None and attention_mask.dim() == 1
    softcap: float | None = kwargs.get("softcap")
    if offsets is None and not is_span:
        require_no_softcap(softcap)  # which the library's sdpa ignores before 5.23
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name, what in (("position_bias", "adds a bias of positions"), ("s_aux", "has attention sinks")):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} {what}, which no packed kernel has; call mlpool.attention.unpack(model)"
            )
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{type(module).__name__}: packed attention is among the tokens of one row [1, total], got queries "
            f"{list(query.shape)} and keys {list(key.shape)} (cross-attention, a cache?)"
        )
    if (call := running.get()) is not None:
        call.attended += 1
    mask, left, right = None, -1, -1
    if is_span:
        left, right, *ends = attention_mask.tolist()  # type: ignore[union-attr]
    else:  # of a batch that the caller packed, on a model that is not
        assert offsets is not None
        ends = offsets.tolist()
        if attention_mask is None:
            causal = kwargs.get("is_causal")
            right = 0 if (getattr(module, "is_causal", True) if causal is None else causal) else -1
        else:
            mask = attention_mask
            log_once(f"{PACKED} builds a mask of [total, total] tokens until mlpool.attention.pack(model) is called")
    require_whole(ends, query.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _as_autocast(query, key, value)
    kernel = "sdpa" if mask is not None else choose_kernel(query, value, dropout, softcap)
    if kernel == "sdpa":
        require_no_softcap(softcap)
        return text_by_text(query, key, value, lengths_of(ends), left, right, scale, dropout, mask), None
    offsets = torch.tensor(ends) if offsets is None else offsets
    offsets, longest = offsets.to(query.device, torch.int32), max(lengths_of(ends))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if kernel == "torch":
        return torch_varlen(q, k, v, offsets, longest, (left, right), scale)[None], None
    return flash_attn(q, k, v, offsets, longest, (left, right), scale, dropout, softcap)[None], None


def choose_kernel(query: Tensor, value: Tensor, dropout: float, softcap: float | None) -> str:
    """ "torch" (torch.nn.attention.varlen), "flash-attn" or "sdpa"."""
    d = query.shape[-1]
    if not query.is_cuda or query.dtype not in _HALF or value.shape[-1] != d or d > 256 or d % 8:
        return "sdpa"
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "sdpa"
    if not softcap and not dropout:
        return "torch"
    return "flash-attn" if has_flash_attn() else "sdpa"


@functools.cache
def has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def require_no_softcap(softcap: float | None) -> None:
    if softcap:
        raise ValueError(
            f"this model soft-caps its attention (softcap={softcap}), which neither scaled_dot_product_attention nor "
            "torch.nn.attention.varlen can do; run it packed on CUDA in float16 or bfloat16 with flash-attn "
            "(pip install 'mlpool[flash]'), or padded with attn_implementation='eager'"
        )


def _as_autocast(*tensors: Tensor) -> list[Tensor]:
    """In autocast's dtype where that is on, as scaled_dot_product_attention does; the other kernels do not."""
    return [t if t.dtype == torch.float64 else t.to(running_dtype(t)) for t in tensors]


def text_by_text(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], left: int, right: int, scale: float,
    dropout: float = 0.0, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention of each text alone → [1, total, H, d]; texts of one length in a row in one call.

    Args:
        left, right: the span, -1 for all. mask: bool [1, 1, total, total] in its place; only the blocks on its
            diagonal are read.
    """
    # split, whose backward is one concatenation: a slice's backward would fill the whole batch with zeros per text
    groups = itertools.groupby(lengths) if mask is None else ((n, [n]) for n in lengths)
    runs = [(n, len(list(texts))) for n, texts in groups]  # of a length, and how many
    sizes = [n * count for n, count in runs]
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    bands: dict[int, Tensor] = {}  # of each length
    outputs, start = [], 0
    for (n, count), part in zip(runs, parts, strict=True):
        q, k, v = (t[0].unflatten(1, (count, n)).transpose(0, 1) for t in part)  # [count, H, n, d]
        causal, allowed = False, None
        if mask is not None:
            allowed = mask[:, :, start : start + n, start : start + n]
        elif 0 <= left < n - 1 or 0 < right < n - 1:
            allowed = bands[n] = bands[n] if n in bands else band(n, left, right, query.device)
        else:
            causal = right == 0 and n > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal, **options)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start += n
    return torch.cat(outputs)[None]


def band(n: int, left: int, right: int, device: torch.device) -> Tensor:
    """bool [n, n]: whether token i sees token j, i - left <= j <= i + right; -1 is no limit."""
    distance = torch.arange(n, device=device)[None] - torch.arange(n, device=device)[:, None]
    allowed = torch.ones(n, n, dtype=torch.bool, device=device)
    if left >= 0:
        allowed &= distance >= -left
    if right >= 0:
        allowed &= distance <= right
    return allowed


Span = tuple[int, int]


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, span: Span, scale: float) -> Tensor:
    """q [total, H, d], k and v [total, H_kv, d] → [total, H, d], by PyTorch's own FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": span}
    if q.shape[1] != k.shape[1]:
        if _takes(varlen_attn, "enable_gqa"):
            options["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    out: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
    return out


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, span: Span, scale: float, dropout: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """The same by flash-attn, which has dropout and soft-capping."""
    from flash_attn import flash_attn_varlen_func

    out: Any = flash_attn_varlen_func(
        q, k, v, offsets, offsets, longest, longest, dropout_p=dropout, softmax_scale=scale, causal=False,
        window_size=span, softcap=softcap or 0.0,
    )  # fmt: skip
    return out


@functools.cache
def _takes(function: Callable, argument: str) -> bool:
    return argument in inspect.signature(function).parameters
