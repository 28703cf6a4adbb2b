"""Which tokens of a batch are text: the one place where masks and packed offsets are read and checked.

Every pool and every tap asks `select_tokens` once and then works on flat rows: a batch of hidden states
[B, T, D] is seen as [B·T, D], a packed one [total, D] or [1, total, D] as [total, D].

On a GPU the host waits for the device once, for all checks together, and not at all where the masks lie on the CPU or
where the offsets' values are known already (`note_offsets`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from mlpool_kernels.runtime import INTERPRETED, untraced, use_triton
from mlpool_kernels.select import select_padded
from torch import Tensor


class Check(NamedTuple):
    """Something that must hold of a batch, and the error if it does not.

    fine: numbers on the device of which none may be 0. message: said by the device where the host may not wait. error:
    makes the exception, which may read the device to name the rows.
    """

    fine: Tensor
    message: str
    error: Callable[[], Exception]


@dataclass(frozen=True)
class Tokens:
    """The tokens of B texts as flat rows of [rows, D].

    starts, ends: int64 [B], the rows of text b are starts[b] … ends[b]-1, padding included.
    last: int64 [B], the row of its last kept token.
    count: int64 [B], how many of its tokens are kept, at least 1.
    keep: bool [rows] or None, False for padding and for tokens that `token_mask` leaves out; None keeps all.
    shape: (B, T) of a padded batch, (1, total) of a packed one.
    packed: whether the batch is packed.
    longest: the rows of the longest text, or None of a packed batch whose offsets the host has not read.
    checks: what `select_tokens` left to its caller to check; see there.
    """

    starts: Tensor
    ends: Tensor
    last: Tensor
    count: Tensor
    keep: Tensor | None
    shape: tuple[int, int]
    packed: bool
    longest: int | None
    checks: tuple[Check, ...] = ()

    @property
    def batch_size(self) -> int:
        return self.starts.shape[0]

    def to(self, device: torch.device) -> Self:
        """The same selection with its tensors on `device`."""
        if self.starts.device == device:
            return self
        # To a GPU without waiting for it; from one the values must have arrived.
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=device.type == "cuda")
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def select_tokens(
    shape: torch.Size | tuple[int, ...],
    device: torch.device,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_mask: Tensor | None = None,
    check: bool = True,
    skip_tokens: int = 0,
    backend: str = "auto",
) -> Tokens:
    """Read a batch's mask or packed offsets.

    Args:
        shape: of one hidden state: [B, T, D], or [total, D] or [1, total, D] with `cu_seqlens`.
        device: of the hidden states; the result's tensors are there.
        attention_mask, cu_seqlens, token_mask, skip_tokens: see `mlpool.gather`.
        check: False of a padded batch leaves the values unchecked, for a caller that waits for the device anyway: it
            reads `checks` together with what it wants and calls `require` where one does not hold.
        backend: "auto", "triton" or "torch"; Triton reads a padded batch's masks on a GPU in one launch.

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
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens must be an int32 or int64 tensor [B+1], got {type(cu_seqlens).__name__}")
        cu_seqlens, token_mask = _together(device, cu_seqlens, token_mask)
        return _packed(shape, cu_seqlens, token_mask, skip_tokens).to(device)
    if attention_mask is None:
        raise ValueError(
            "got neither attention_mask nor cu_seqlens; pass attention_mask [B, T] (all ones when nothing is "
            "padded), or cu_seqlens [B+1] for packed hidden states"
        )
    attention_mask, token_mask = _together(device, attention_mask, token_mask)
    tokens = _padded(shape, attention_mask, token_mask, skip_tokens, backend)
    if check:
        require(tokens.checks)
        tokens = replace(tokens, checks=())
    return tokens.to(device)


def _together(device: torch.device, *tensors: Any) -> Any:
    """What may be masks as they lie if they lie together, else all on `device`; what is no tensor is refused later."""
    given = [t for t in tensors if isinstance(t, Tensor)]
    if len({t.device for t in given}) < 2:
        return tensors
    return [t.to(device, non_blocking=device.type == "cuda") if isinstance(t, Tensor) else t for t in tensors]


def require(checks: Sequence[Check]) -> None:
    """Raise the error of the first check that does not hold; one wait for the device, where there are any."""
    if not checks:
        return
    if not _may_sync(checks[0].fine):
        for check in checks:
            torch._assert_async(held([check]), check.message)
    # Read as they are: to ask on a GPU whether all hold is two launches more.
    elif 0 in (checks[0].fine if len(checks) == 1 else _entries(checks)).flatten().tolist():
        raise next(check.error() for check in checks if not bool(held([check])))


def held(checks: Sequence[Check]) -> Tensor:
    """Whether all checks hold, bool [] on the device."""
    return (_entries(checks) != 0).all()


def _entries(checks: Sequence[Check]) -> Tensor:
    return torch.cat([check.fine.flatten() for check in checks])


def note_offsets(cu_seqlens: Tensor, values: Sequence[int]) -> None:
    """Note the values of valid offsets that the host knows already, so that `select_tokens` does not wait for them."""
    cu_seqlens._mlpool_values = (_version(cu_seqlens), list(values))  # type: ignore[attr-defined]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _padded(
    shape, attention_mask: Tensor, token_mask: Tensor | None, skip_tokens: int, backend: str
) -> Tokens:  # fmt: skip
    """On the mask's own device: what lies on the CPU is checked there."""
    if len(shape) != 3:
        raise ValueError(f"hidden states must be [B, T, D] with attention_mask, got shape {list(shape)}")
    batch, length = shape[0], shape[1]
    if batch == 0:
        raise ValueError(f"got a batch of no texts (hidden states {list(shape)}); B must be at least 1")
    if length == 0:
        raise ValueError(f"got texts of no tokens (hidden states {list(shape)}); T must be at least 1")
    checks: list[Check] = []
    _check_mask("attention_mask", attention_mask, (batch, length), checks)
    if token_mask is not None:
        _check_mask("token_mask", token_mask, (batch, length), checks)
    source = _source(token_mask, skip_tokens, "attention_mask")
    if _one_launch(backend, attention_mask, token_mask):
        starts, ends, last, count, keep = select_padded(attention_mask, token_mask, skip_tokens)
        checks.append(_any_token(count, source))
        return Tokens(starts, ends, last, count, keep, (batch, length), False, length, tuple(checks))
    keep = _as_bool(attention_mask)
    if skip_tokens:
        keep = keep & (keep.cumsum(1) > skip_tokens)
    if token_mask is not None:
        keep = keep & _as_bool(token_mask)
    # Of a text of which nothing is kept the first place: a row all the same, which may be read before the host knows.
    final = (keep * torch.arange(length, device=keep.device)).amax(1)
    starts, count = torch.arange(batch, device=keep.device) * length, keep.sum(1)
    checks.append(_any_token(count, source))
    flat = (count, keep.reshape(-1))
    return Tokens(starts, starts + length, starts + final, *flat, (batch, length), False, length, tuple(checks))


def _packed(shape, cu_seqlens: Tensor, token_mask: Tensor | None, skip_tokens: int) -> Tokens:
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise ValueError(f"packed hidden states must be [total, D] or [1, total, D], got shape {list(shape)}")
    total = shape[-2]
    _check_form(cu_seqlens)
    offsets = cu_seqlens.to(torch.int64)
    starts, ends = offsets[:-1], offsets[1:]
    tokens = Tokens(starts, ends, ends - 1, ends - starts, None, (1, total), True, None)
    if token_mask is not None or skip_tokens:
        tokens = _leave_out(tokens, token_mask, skip_tokens)
    return replace(tokens, longest=_check_offsets(cu_seqlens, total, tokens.checks), checks=())


def _source(token_mask: Tensor | None, skip_tokens: int, *names: str) -> str:
    """What leaves tokens out, for messages."""
    others = ["token_mask"] * (token_mask is not None) + [f"skip_tokens={skip_tokens}"] * (skip_tokens > 0)
    return " and ".join([*names, *others])


def _leave_out(tokens: Tokens, token_mask: Tensor | None, skip_tokens: int) -> Tokens:
    """Packed tokens less those that are left out; harmless where the offsets, not checked yet, are wrong."""
    starts, ends, total, device = tokens.starts, tokens.ends, tokens.shape[1], tokens.starts.device
    checks: list[Check] = []
    row = torch.arange(total, device=device)
    text = torch.searchsorted(ends, row, right=True).clamp(max=starts.shape[0] - 1)
    keep = (row >= starts[text] + skip_tokens) & (row < ends[-1])
    if token_mask is not None:
        flat = token_mask.reshape(1, -1)
        _check_mask("token_mask", flat, (1, total), checks)
        keep = keep & _as_bool(flat[0])
    last = torch.full_like(starts, -1).scatter_reduce(0, text, torch.where(keep, row, -1), "amax")
    count = torch.zeros_like(starts).index_add(0, text, keep.to(torch.int64))
    checks.append(_any_token(count, _source(token_mask, skip_tokens)))
    return replace(tokens, last=last, count=count, keep=keep, checks=tuple(checks))


def _as_bool(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0


def _one_launch(backend: str, mask: Tensor, token_mask: Tensor | None) -> bool:
    """Masks that lie on the CPU are read there, whatever reads the states."""
    masks = (mask,) if token_mask is None else (mask, token_mask)
    return (mask.is_cuda or INTERPRETED) and use_triton(backend, *masks) and untraced(masks)


def _check_mask(name: str, mask: Tensor, shape: tuple[int, int], checks: list[Check]) -> None:
    """A mask's form; what must hold of a floating one's values is added to `checks`."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor of 0 and 1, got {type(mask).__name__}")
    if mask.dtype.is_complex:
        raise TypeError(f"{name} must be bool, integer or float of 0 and 1, got {mask.dtype}")
    if tuple(mask.shape) != shape:
        hint = " (a 4-dimensional attention mask cannot say which tokens are text)" if mask.dim() == 4 else ""
        raise ValueError(f"{name} must be {list(shape)} like the hidden states, got {list(mask.shape)}{hint}")
    if mask.dtype.is_floating_point:
        message = (
            f"{name} of dtype {mask.dtype} holds values other than 0 and 1; an additive mask (0 and -inf) "
            "cannot be used here, pass 1 for text and 0 for padding"
        )
        checks.append(Check(((mask == 0) | (mask == 1)).all(), message, lambda: ValueError(message)))


def _may_sync(tensor: Tensor) -> bool:
    """Whether a value may be read on the host: not while compiling nor while a CUDA graph records."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _any_token(count: Tensor, source: str) -> Check:
    """That every text has a token; count: [B], 0 where it has none."""

    def error() -> Exception:
        rows = (count == 0).nonzero().flatten().tolist()
        return ValueError(f"no token left by {source} in row(s) {rows[:10]}; every text needs at least one token")

    return Check(count, f"a text has no token left by {source}", error)


def _check_form(cu_seqlens: Tensor) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [B+1] with B at least 1, got shape {list(cu_seqlens.shape)}")


def read_offsets(cu_seqlens: Tensor, total: int, checks: Sequence[Check] = ()) -> list[int]:
    """The offsets' values, if they are right and `checks` hold; one wait at most for all of it. See `select_tokens`."""
    _check_form(cu_seqlens)
    version, values = getattr(cu_seqlens, "_mlpool_values", (None, None))
    fine = 0
    if values is None or version != _version(cu_seqlens):
        seen = torch.cat([cu_seqlens, held(checks)[None].to(cu_seqlens)]) if checks else cu_seqlens
        values = seen.tolist()
        fine = values.pop() if checks else 1
    if values[0] < 0 or values[-1] > total:
        raise ValueError(f"cu_seqlens runs from {values[0]} to {values[-1]}, but there are {total} packed rows")
    rows = [row for row, (start, end) in enumerate(pairwise(values)) if end <= start]
    if rows:
        raise ValueError(
            f"cu_seqlens must increase: text(s) {rows[:10]} have no token or a negative length "
            f"(offsets {values[rows[0]]} to {values[rows[0] + 1]})"
        )
    if checks and not fine:
        require(checks)
    return values


def _check_offsets(cu_seqlens: Tensor, total: int, checks: Sequence[Check]) -> int | None:
    """The longest text's rows, where the host may know it."""
    if _may_sync(cu_seqlens):
        return max(end - start for start, end in pairwise(read_offsets(cu_seqlens, total, checks)))
    fine = (cu_seqlens.diff() > 0).all() & (cu_seqlens[0] >= 0) & (cu_seqlens[-1] <= total)
    message = "cu_seqlens must increase and stay within the packed rows"
    require([Check(fine, message, lambda: ValueError(message)), *checks])
    return None
