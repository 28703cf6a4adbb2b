"""Packed execution: a padded batch goes in and comes out, and in between no layer computes padding.

`pack(model)` makes the model's trunk unpad a batch once, to one row [1, total] with offsets, run every layer on it and
pad the result again. The attention is `attn_implementation="mlpool_packed"` (see varlen.py); loading a model with that
alone works too, with padding, once `from mlpool.attention import pack` has registered it.

How it is attached, and why: the trunk becomes, as an instance, a subclass of its own class whose `forward` is a data
descriptor. Whatever others put on the instance as `forward`, before or after (taps, `bidirectional`, accelerate), is
found beneath it and so sees the packed call, as the layers do; an override of `__call__` would be missed by peft, which
calls `trunk.forward`. A call that is packed already goes through.
"""

import contextlib
import inspect
import itertools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..pooling.tokens import held, note_offsets, read_offsets, require, select_tokens
from ..trunk import argument_names, family_name, find_layers, mixed, no_cache
from .families import PACKED, backend_of, require_text_model
from .trial import compare, try_packed
from .varlen import PackedCall, has_flash_attn, lengths_of, register, require_no_softcap, require_whole, running

_MARK = "_mlpool_packed"  # on the trunk: its Packing
_ROWS = ("input_ids", "inputs_embeds", "token_type_ids")  # [B, T, ...], packed with the batch
_OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k")
_LENGTHS = ("max_length_q", "max_length_k")


def pack(model: nn.Module, padded_output: bool = True, check: bool = True) -> nn.Module:
    """Make a Hugging Face decoder or encoder run packed, in place; return the model.

        pack(model)
        model(input_ids=..., attention_mask=...)  # as before: padding is neither computed nor stored
        unpack(model)

    The call and its results stay as they were: `last_hidden_state` (and `hidden_states`) [B, T, D], zero at padding.
    Positions count from each text's first token, whichever side is padded. Causal or bidirectional, windows, heads,
    taps, peft, checkpointing and autocast are as on the padded model; taps and pools read the packed states themselves.
    A batch that the caller packed (input_ids [1, total], `cu_seq_lens_q`) is run and returned as it is. While packed
    there is no cache, whatever `use_cache` says. The model may be saved, copied and pickled. With gradient
    checkpointing the backward belongs before `unpack`: the recompute asks the config for the attention anew.

    Args:
        model: a bare model, one with a head, wrapped by peft or DDP, or a SentenceTransformer. For FSDP pack first.
        padded_output: False returns [1, total, D] with the offsets as `output.cu_seqlens`, int32 [B+1], for pools
            that take `cu_seqlens`. For calls of the bare model; a head or SentenceTransformer expects padding.
        check: run a padded batch of two short texts before and after, and undo the change if they differ. Needs the
            weights: on the meta device pack with check=False.

    Raises:
        ValueError: an encoder-decoder, a model whose layers are not found (see `find_layers`), a multimodal model,
            attention that does not go through the library's registry or sees chunks, soft-capping where no kernel has
            it, and whatever else makes the trial fail, with that error (the model is unchanged then).
        AttentionCheckError: packed and padded results differ (the model is unchanged then).
        ImportError: transformers is missing or older than 5.17.

    A call raises ValueError for past_key_values, position_ids, output_attentions, encoder states, a mask that is not
    [B, T], has no token in a row or a gap within one, or 2³¹ tokens and more.
    """
    register()
    trunk, layers = find_layers(model)
    packing: Packing | None = trunk.__dict__.get(_MARK)
    if packing is not None:
        packing.padded_output = padded_output
        return model
    _refuse(trunk)
    require_text_model(model, trunk)
    expected = try_packed(trunk) if check else None
    packing = Packing(len(layers), backend_of(trunk.config), _position_offset(trunk))
    trunk.set_attn_implementation(PACKED)
    trunk.__dict__[_MARK] = packing
    if not isinstance(trunk, _PackedTrunk):  # it is one when an earlier unpack had to leave the class
        cls: type = type(trunk)
        trunk.__class__ = mixed(_PackedTrunk, cls)
    try:
        if expected is not None:
            compare(trunk, try_packed(trunk), expected, packing.backend)
    except BaseException:
        unpack(model)
        raise
    packing.padded_output = padded_output
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Undo `pack`, with the attention implementation of before; return the model. Harmless when not packed.

    Where the trunk's class was replaced by others after `pack` (FSDP2 does so), theirs stays, packing stops all the
    same, and a RuntimeWarning says so.
    """
    trunk, _ = find_layers(model)
    packing: Packing | None = trunk.__dict__.pop(_MARK, None)
    if packing is None:
        return model
    if backend_of(trunk.config) == PACKED:
        trunk.set_attn_implementation(packing.backend)
    if type(trunk).__bases__[0] is _PackedTrunk:
        trunk.__class__ = type(trunk).__bases__[1]
    else:
        warnings.warn(
            f"packing is off, but the class of the trunk (now {type(trunk).__name__}) was replaced by others after it "
            "and stays so; to have everything as before, unpack in the opposite order",
            RuntimeWarning,
            stacklevel=2,
        )
    return model


def is_packed(model: nn.Module) -> bool:
    """Whether `pack` has been applied to this model."""
    return _MARK in find_layers(model)[0].__dict__


class Packing:
    """What is known of one packed trunk, and its forward.

    Attributes:
        layers: how many. backend: the attention implementation of before. position_offset: the position_id of a text's
        first token (RoBERTa starts behind its padding index). padded_output: see `pack`. seen: whether a forward has
        shown that every layer attends through the registry.
    """

    def __init__(self, layers: int, backend: str, position_offset: int):
        self.layers, self.backend, self.position_offset = layers, backend, position_offset
        self.padded_output, self.seen = True, False

    def run(self, trunk: Any, below: Any, args: tuple, kwargs: dict) -> Any:
        """One forward of the trunk, by what is beneath the packing."""
        call = {**dict(zip(argument_names(trunk), args, strict=False)), **kwargs}
        packed, active = call.get("cu_seq_lens_q"), running.get()
        if packed is not None and active is not None and active.offsets is packed:
            return below(*args, **kwargs)  # others hold the packed forward beneath their own
        _refuse_arguments(trunk, call)
        call |= no_cache(trunk)
        if packed is not None:
            call, packed_call = self._given(call)
            return self._forward(trunk, below, call, packed_call)
        call, packed_call, rows, shape = self._pack(call)
        given = call.pop("return_dict", None)
        as_tuple = not (trunk.config.return_dict if given is None else given)
        call["return_dict"] = True
        output = self._forward(trunk, below, call, packed_call)
        hidden = output["last_hidden_state"]
        if output.get("pooler_output") is not None:  # it pooled the first text alone
            if not isinstance(getattr(trunk, "pooler", None), nn.Module):
                raise ValueError(
                    f"{type(trunk).__name__} pools each text by code of its own, which would take the row for one text"
                )
            first = hidden[:, packed_call.offsets[:-1].long()].transpose(0, 1)
            output["pooler_output"] = trunk.pooler(first)
        if self.padded_output:
            for name, value in list(output.items()):
                output[name] = _pad(value, rows, shape)
        else:
            output["cu_seqlens"] = packed_call.offsets
        return output.to_tuple() if as_tuple else output

    def _forward(self, trunk: nn.Module, below: Any, call: dict[str, Any], packed_call: PackedCall) -> Any:
        before = running.set(packed_call)
        try:
            output = below(**call)
        finally:
            running.reset(before)
        if not self.seen and not (trunk.training and getattr(trunk, "layerdrop", False)):
            if packed_call.attended < self.layers:
                raise RuntimeError(
                    f"of {self.layers} layers of {type(trunk).__name__}, {packed_call.attended} attend by "
                    f"{PACKED}; the others mix the texts of a packed batch; call mlpool.attention.unpack(model)"
                )
            self.seen = True
        return output

    def _pack(self, call: dict[str, Any]) -> tuple[dict[str, Any], PackedCall, Tensor, tuple[int, int]]:
        """A padded call → the packed one, and the rows of its tokens among the B·T."""
        inputs = _inputs(call)
        if call.get("position_ids") is not None:
            raise ValueError(
                "position_ids were given to a packed model, which counts positions from each text's first token; leave "
                "them out (or pack the batch yourself: input_ids [1, total], position_ids and cu_seq_lens_q)"
            )
        shape, device = (inputs.shape[0], inputs.shape[1]), inputs.device
        mask = call.get("attention_mask")
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=device)
        elif not isinstance(mask, Tensor):
            raise TypeError(f"attention_mask must be [B, T] of 0 and 1 on a packed model, got {type(mask).__name__}")
        tokens = select_tokens((*shape, 1), device, mask, check=False)
        counts = tokens.count
        starts = tokens.last - counts + 1
        # kept tokens are one run if the first of them is where the last one and their number say
        assert tokens.keep is not None
        first = tokens.starts + tokens.keep.view(shape).int().argmax(1)
        fine = held(tokens.checks).to(counts)
        values = torch.cat([counts, first - starts, fine[None]]).tolist()  # the one wait for the device
        lengths, gaps = values[: shape[0]], values[shape[0] : -1]
        if not values[-1]:
            require(tokens.checks)
        if any(gaps):
            rows = [i for i, gap in enumerate(gaps) if gap]
            raise ValueError(f"attention_mask has a gap within the text of row(s) {rows[:10]}; packing needs one run")
        total = _check_total(sum(lengths))
        offsets = nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        begins = offsets[:-1].long()
        # the text's own first row, less its place in the packed row, then counted on
        shift = torch.repeat_interleave(torch.stack([starts - begins, -begins]), counts, 1, output_size=total)
        rows, positions = shift + torch.arange(total, device=device)
        packed = {name: value for name, value in call.items() if name not in ("attention_mask", "position_ids")}
        for name in _ROWS:
            if isinstance(value := call.get(name), Tensor):
                packed[name] = value.expand(shape + value.shape[2:]).flatten(0, 1).index_select(0, rows)[None]
        packed |= {"position_ids": positions[None] + self.position_offset, "attention_mask": None}
        packed |= dict.fromkeys(_OFFSETS, offsets) | dict.fromkeys(_LENGTHS, max(lengths))
        ends = [0, *itertools.accumulate(lengths)]
        note_offsets(offsets, ends)
        return packed, PackedCall(offsets, ends), rows, shape

    def _given(self, call: dict[str, Any]) -> tuple[dict[str, Any], PackedCall]:
        """A call that the caller packed, completed."""
        inputs, offsets = _inputs(call), call["cu_seq_lens_q"]
        if call.get("attention_mask") is not None:
            raise ValueError("got both attention_mask and cu_seq_lens_q; a packed row has no padding, leave it out")
        if inputs.shape[0] != 1:
            raise ValueError(f"with cu_seq_lens_q the batch must be one row [1, total], got {list(inputs.shape[:2])}")
        total = _check_total(inputs.shape[1])
        ends = read_offsets(offsets, total)
        require_whole(ends, total)
        lengths = lengths_of(ends)
        call = dict(call)
        if call.get("position_ids") is None:
            positions = torch.cat([torch.arange(n) for n in lengths]) + self.position_offset
            call["position_ids"] = positions[None].to(inputs.device)
        # A copy, whose values nobody changes, so that they need not be read again.
        offsets = offsets.to(inputs.device, torch.int32, copy=True)
        note_offsets(offsets, ends)
        call |= dict.fromkeys(_OFFSETS, offsets) | dict.fromkeys(_LENGTHS, max(lengths))
        return call, PackedCall(offsets, ends)


class _Forward:
    """`forward` of a packed trunk: a data descriptor, so that it stands before the instance's own attribute."""

    def __get__(self, trunk: Any, owner: type) -> Any:
        if trunk is None:
            return super(_PackedTrunk, owner).forward  # type: ignore[arg-type, misc]
        below = trunk.__dict__.get("forward")
        return _BoundForward(trunk, super(_PackedTrunk, trunk).forward if below is None else below)  # type: ignore[misc]

    def __set__(self, trunk: Any, value: Any) -> None:
        trunk.__dict__["forward"] = value

    def __delete__(self, trunk: Any) -> None:
        if "forward" not in trunk.__dict__:
            raise AttributeError("forward")
        del trunk.__dict__["forward"]


class _BoundForward:
    """What `trunk.forward` is. Slots, so that wrappers which copy a function's `__dict__` take nothing from it."""

    __slots__ = ("below", "trunk")

    def __init__(self, trunk: nn.Module, below: Any):
        self.trunk, self.below = trunk, below

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.below)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        packing: Packing | None = self.trunk.__dict__.get(_MARK)
        if packing is None:  # undone beneath someone else's patch
            return self.below(*args, **kwargs)
        return packing.run(self.trunk, self.below, args, kwargs)


class _PackedTrunk:
    """Mixed in before a trunk's own class."""

    forward = _Forward()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__mro__[type(self).__mro__.index(_PackedTrunk) + 1],), self.__dict__


def _rebuild(cls: type) -> Any:
    """An empty packed trunk, for copies and pickles."""
    register()
    packed: Any = mixed(_PackedTrunk, cls)
    return packed.__new__(packed)


def _refuse(trunk: Any) -> None:
    config = trunk.config
    parameters = inspect.signature(type(trunk).forward).parameters
    reason = ""
    if not hasattr(trunk, "set_attn_implementation") or not trunk._can_set_attn_implementation():
        reason = "its attention does not go through transformers' AttentionInterface, so no other function reaches it"
    elif "position_ids" not in parameters:
        reason = "it takes no position_ids, so texts in one row cannot start anew"
    elif not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        reason = f"{type(trunk).__name__}.forward takes no further arguments, so the offsets do not reach its attention"
    elif "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        reason = "some of its layers attend in chunks, as no packed kernel does (short texts alone would come through)"
    if reason:
        raise ValueError(f"{family_name(trunk)} cannot run packed: {reason}")
    if not (has_flash_attn() and torch.cuda.is_available()):
        require_no_softcap(getattr(config, "attn_logit_softcapping", None))


def _refuse_arguments(trunk: nn.Module, call: dict[str, Any]) -> None:
    if call.get("past_key_values") is not None:
        raise ValueError(
            f"past_key_values were passed to a packed {type(trunk).__name__}, which keeps no cache (so no generation, "
            "no prefix tuning); call mlpool.attention.unpack(model) first"
        )
    if call.get("output_attentions"):
        raise ValueError("output_attentions=True: packed attention has no weights to return; use eager, unpacked")
    if call.get("encoder_hidden_states") is not None:
        raise ValueError("encoder_hidden_states were passed: packed execution has no cross-attention")


def _inputs(call: dict[str, Any]) -> Tensor:
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    inputs = ids if embeds is None else embeds
    if inputs is None:
        raise ValueError(f"a packed model needs input_ids or inputs_embeds in the call; got {sorted(call)}")
    if inputs.dim() != (2 if embeds is None else 3):
        raise ValueError(f"input_ids must be [B, T] and inputs_embeds [B, T, D], got {list(inputs.shape)}")
    return inputs


def _check_total(total: int) -> int:
    if total >= 2**31:
        raise ValueError(f"{total} tokens in one batch: packed offsets are int32, up to {2**31 - 1}; split the batch")
    return total


def _pad(value: Any, rows: Tensor, shape: tuple[int, int]) -> Any:
    """Hidden states [1, total, D] → [B, T, D], zero at padding; also in tuples."""
    if isinstance(value, tuple):
        return tuple(_pad(each, rows, shape) for each in value)
    if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[:2] != (1, rows.shape[0]):
        return value
    empty = value.new_zeros(shape[0] * shape[1], value.shape[2])
    return empty.index_copy(0, rows.to(value.device), value[0]).unflatten(0, shape)


def _position_offset(trunk: nn.Module) -> int:
    """The position_id of a text's first token: 0, or in RoBERTa and its kin the one behind the padding index."""
    for name, module in trunk.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1  # type: ignore[arg-type]
    return 0


with contextlib.suppress(ImportError):  # which pack says
    register()  # so that attn_implementation="mlpool_packed" is known from here on
