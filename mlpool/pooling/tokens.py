"""Which tokens of a batch are text: the one place where masks and packed offsets are read and checked.

Every pool and every tap asks `select_tokens` once and then works on flat rows: a batch of hidden states
[B, T, D] is seen as [B·T, D], a packed one [total, D] or [1, total, D] as [total, D].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens of B texts as flat rows of [rows, D].

    starts, ends: int64 [B], the rows of text b are starts[b] … ends[b]-1, padding included.
    last: int64 [B], the row of its last kept token.
    count: int64 [B], how many of its tokens are kept, at least 1.
    keep: bool [rows] or None, False for padding and for tokens that `token_mask` leaves out; None keeps all.
    shape: (B, T) of a padded batch, (1, total) of a packed one.
    packed: whether the batch is packed.
    """

    starts: Tensor
    ends: Tensor
    last: Tensor
    count: Tensor
    keep: Tensor | None
    shape: tuple[int, int]
    packed: bool

    @property
    def batch_size(self) -> int:
        return self.starts.shape[0]

    def to(self, device: torch.device) -> Tokens:
        """The same selection with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def select_tokens(
    shape: torch.Size | tuple[int, ...],
    device: torch.device,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tokens:
    """Read a batch's mask or packed offsets.

    Args:
        shape: of one hidden state: [B, T, D], or [total, D] or [1, total, D] with `cu_seqlens`.
        device: of the hidden states; the result's tensors are there.
        attention_mask: [B, T] bool, integer or float of 0 and 1; 1 is text. Left, right or no padding.
        cu_seqlens: [B+1] integer, text b has the rows cu_seqlens[b] … cu_seqlens[b+1]-1.
        token_mask: like attention_mask ([total] or [1, total] when packed); 0 also leaves a token out
            (BOS, instruction tokens).

    Raises:
        ValueError: both or neither of attention_mask and cu_seqlens, a wrong shape, offsets that do not
            increase or pass the end, a text without a kept token (its row is named), an empty batch.
        TypeError: a mask or offsets of a wrong dtype.
    """
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError(
            "got both attention_mask and cu_seqlens; pass attention_mask [B, T] for padded hidden states "
            "or cu_seqlens [B+1] for packed ones"
        )
    if cu_seqlens is not None:
        return _packed(shape, device, cu_seqlens, token_mask)
    if attention_mask is None:
        raise ValueError(
            "got neither attention_mask nor cu_seqlens; pass attention_mask [B, T] (all ones when nothing is "
            "padded), or cu_seqlens [B+1] for packed hidden states"
        )
    return _padded(shape, device, attention_mask, token_mask)


def _padded(shape, device, attention_mask: Tensor, token_mask: Tensor | None) -> Tokens:
    if len(shape) != 3:
        raise ValueError(f"hidden states must be [B, T, D] with attention_mask, got shape {list(shape)}")
    batch, length = shape[0], shape[1]
    if batch == 0:
        raise ValueError(f"got a batch of no texts (hidden states {list(shape)}); B must be at least 1")
    if length == 0:
        raise ValueError(f"got texts of no tokens (hidden states {list(shape)}); T must be at least 1")
    keep = _as_bool("attention_mask", attention_mask, (batch, length), device)
    if token_mask is not None:
        keep = keep & _as_bool("token_mask", token_mask, (batch, length), device)
    position = torch.arange(length, device=device)
    last = torch.where(keep, position, -1).amax(1)
    starts = torch.arange(batch, device=device) * length
    _require_tokens(last >= 0, "attention_mask and token_mask" if token_mask is not None else "attention_mask")
    return Tokens(starts, starts + length, starts + last, keep.sum(1), keep.reshape(-1), (batch, length), False)


def _packed(shape, device, cu_seqlens: Tensor, token_mask: Tensor | None) -> Tokens:
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise ValueError(f"packed hidden states must be [total, D] or [1, total, D], got shape {list(shape)}")
    total = shape[-2]
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor [B+1], got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [B+1] with B at least 1, got shape {list(cu_seqlens.shape)}")
    offsets = cu_seqlens.to(device=device, dtype=torch.int64)
    starts, ends = offsets[:-1], offsets[1:]
    _check_offsets(offsets, total)
    if token_mask is None:
        return Tokens(starts, ends, ends - 1, ends - starts, None, (1, total), True)
    keep = _as_bool("token_mask", token_mask.reshape(1, -1), (1, total), device).reshape(-1)
    row = torch.arange(total, device=device)
    text = torch.searchsorted(ends, row, right=True).clamp(max=starts.shape[0] - 1)
    keep = keep & (row >= starts[0]) & (row < ends[-1])
    last = torch.full_like(starts, -1).scatter_reduce(0, text, torch.where(keep, row, -1), "amax")
    count = torch.zeros_like(starts).index_add(0, text, keep.to(torch.int64))
    _require_tokens(last >= 0, "token_mask")
    return Tokens(starts, ends, last, count, keep, (1, total), True)


def _as_bool(name: str, mask: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor of 0 and 1, got {type(mask).__name__}")
    if mask.dtype.is_complex:
        raise TypeError(f"{name} must be bool, integer or float of 0 and 1, got {mask.dtype}")
    if tuple(mask.shape) != shape:
        hint = " (a 4-dimensional attention mask cannot say which tokens are text)" if mask.dim() == 4 else ""
        raise ValueError(f"{name} must be {list(shape)} like the hidden states, got {list(mask.shape)}{hint}")
    if mask.dtype.is_floating_point and _may_sync(mask) and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"{name} of dtype {mask.dtype} holds values other than 0 and 1; an additive mask (0 and -inf) "
            "cannot be used here, pass 1 for text and 0 for padding"
        )
    return mask.to(device) != 0


def _may_sync(tensor: Tensor) -> bool:
    """Whether a value may be read on the host: not while compiling nor while a CUDA graph records."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _require_tokens(present: Tensor, source: str) -> None:
    if not _may_sync(present):
        torch._assert_async(present.all(), f"a text has no token left by {source}")
        return
    if not bool(present.all()):
        rows = (~present).nonzero().flatten().tolist()
        raise ValueError(f"no token left by {source} in row(s) {rows[:10]}; every text needs at least one token")


def _check_offsets(offsets: Tensor, total: int) -> None:
    lengths = offsets.diff()
    fine = (lengths > 0).all() & (offsets[0] >= 0) & (offsets[-1] <= total)
    if not _may_sync(offsets):
        torch._assert_async(fine, "cu_seqlens must increase and stay within the packed rows")
        return
    if bool(fine):
        return
    values = offsets.tolist()
    if values[0] < 0 or values[-1] > total:
        raise ValueError(f"cu_seqlens runs from {values[0]} to {values[-1]}, but there are {total} packed rows")
    rows = (lengths <= 0).nonzero().flatten().tolist()
    raise ValueError(
        f"cu_seqlens must increase: text(s) {rows[:10]} have no token or a negative length "
        f"(offsets {values[rows[0]]} to {values[rows[0] + 1]})"
    )
