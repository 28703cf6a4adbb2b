"""Takes layer_states [B, L, D] from a running model and keeps nothing else.

`output_hidden_states=True` keeps L tensors [B, T, D] until the pool has read one row per text of each. A tap takes
that row as the layer ends: in evaluation B·L·D numbers are kept in place of B·L·T·D, in training the row's gradient
is added to the layer's own gradient and no zero-filled [B, T, D] is made. The rows are those of hidden_states[1:],
as the library returns them: raw layer outputs, and the final norm's output in place of the last. So they are too
where the library returns others: Mamba, Mamba2 and FalconMamba leave out the embedding and add the normed last state
(taps are hidden_states[:-2] and [-1]); CLIP and TIPSv2 text keep the last state un-normed (it is `last_hidden_state`);
Mllama leaves out its cross-attention layers, which have taps like all.

How it is attached, and why:
- A tapped layer gets, as an instance, a subclass of its own class whose `__call__` taps the output. It is no
  forward hook because checkpointing wraps a layer's `__call__` in older transformers 5.x, and hooks then run inside
  the recompute (under no_grad when it is reentrant); around `__call__` is outside in every version.
- The trunk's `forward` is replaced, on the instance. It is no hook either: peft calls `trunk.forward` directly.
  Call arguments are read there (masks, packed offsets), and the last state is taken from its output.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Self

import torch
from mlpool_kernels.gather import gather_backward
from torch import Tensor, nn

from .pooling.base import check_token_pooling, gather_tokens
from .pooling.tokens import Tokens, select_tokens
from .trunk import ForwardPatch, argument_names, find_layers, mixed

_MARK = "_mlpool_taps"  # on the trunk: its Taps; on a tapped layer: (its Taps, its index)
_NO_COPY = "a model cannot be copied or pickled while it is tapped; detach the taps first"


class Taps:
    """Taps on the layers of a Hugging Face decoder or encoder.

        with Taps(model, token_pooling="mean") as taps:  # or taps = Taps(...), later taps.detach()
            model(**batch)
            layer_states = taps.take()

    Gradients equal those through `output_hidden_states=True`; checkpointing (both kinds), peft, `device_map`,
    `torch.compile` and FSDP2 may be combined with taps. While tapped, a model cannot be copied or pickled whole
    (`save_pretrained` and `state_dict` are not affected). Rows not taken, with the graph behind them, live until the
    next forward or `detach`.

    Args:
        model: a bare model, one with a head, wrapped by peft, DDP or `torch.compile`, or a SentenceTransformer.
        token_pooling: "last" takes the last kept token of each text, "mean" the mean over its kept tokens, "unit_mean"
            the mean of them brought to unit length; for the backward of that one the hidden states are kept.
        layers: which of the L layers, by index, negatives counting from the end; None is all of them.
        skip_tokens: how many of each text's first tokens are left out of a mean; see `mlpool.gather`.
        final_norm: whether the last layer's row is of the last state, behind the final norm; False: of its raw output,
            as of the layers below.

    Raises:
        ValueError: an unknown token_pooling, skip_tokens without a mean, layers that do not exist or repeat, a model
            whose layers are not found (see `find_layers`).
        RuntimeError: the model is tapped already.
    """

    def __init__(
        self,
        model: nn.Module,
        token_pooling: str = "last",
        layers: Sequence[int] | None = None,
        skip_tokens: int = 0,
        final_norm: bool = True,
    ):
        check_token_pooling(token_pooling, skip_tokens)
        self.token_pooling, self.skip_tokens, self.final_norm = token_pooling, skip_tokens, final_norm
        self.trunk, modules = find_layers(model)
        self.num_layers = len(modules)
        self.layers = _check_indices(layers, self.num_layers)
        self._expected: dict[str, Tensor] = {}
        self._forget()
        self._attach(modules)

    def expect(
        self,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> None:
        """Say which tokens are text in the next forward, and only in that one.

        Args:
            attention_mask: [B, T] of 0 and 1, in place of the call's own (which may be 4-dimensional or absent).
            cu_seqlens: [B+1] integer offsets of a packed batch, in place of the call's `cu_seq_lens_q`.
            token_mask: [B, T], or [total] of a packed batch; 0 leaves a token out of the pooling (BOS, instruction)
                though the model reads it.

        What is wrong with them is raised by that forward, as `select_tokens` says.
        """
        given = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens, "token_mask": token_mask}
        self._expected = {name: value for name, value in given.items() if value is not None}

    def take(self) -> Tensor:
        """Hand over layer_states [B, len(layers), D] of the last forward and forget them.

        The dtype is that of the hidden states, the device that of the last state.

        Raises:
            RuntimeError: no forward has been completed since the taps were attached or last taken from.
            ValueError: the layers are not all of one width.
        """
        if not self._complete:
            raise RuntimeError(
                "there are no layer_states to take: no forward has been completed since the taps were attached or "
                "last taken from; call the model, then take() once"
            )
        device = self._rows[max(self.layers)].device
        rows = [self._rows[index].to(device) for index in self.layers]
        self._forget()
        if len({row.shape[-1] for row in rows}) > 1:
            widths = [row.shape[-1] for row in rows]
            raise ValueError(f"the layers' widths differ: {widths}; choose layers of one width by `layers=`")
        return torch.stack(rows, dim=1)

    def detach(self) -> None:
        """Undo everything; harmless when done already.

        Where a class or `forward` was replaced by someone else after the taps (FSDP2 does so), theirs stays, the taps
        beneath stop doing anything, and a RuntimeWarning names the places.
        """
        if self.trunk.__dict__.get(_MARK) is not self:
            return
        kept = [] if self._forward.restore() else ["forward of the trunk"]
        del self.trunk.__dict__[_MARK]
        for index, layer in self._tapped.items():
            del layer.__dict__[_MARK]
            if type(layer).__bases__[0] is _TappedLayer:
                layer.__class__ = type(layer).__bases__[1]
            else:
                kept.append(f"layer {index} (now {type(layer).__name__})")
        self._forget()
        if kept:
            warnings.warn(
                f"taps are off, but {', '.join(kept)} was replaced by others after they were attached and stays so; "
                "to have everything as before, detach in the opposite order",
                RuntimeWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _attach(self, modules: nn.ModuleList) -> None:
        # The last state is the trunk's output, behind the final norm, not the last layer's.
        self._reads_last = self.final_norm and self.num_layers - 1 in self.layers
        inner = self.layers if not self._reads_last else [i for i in self.layers if i != self.num_layers - 1]
        self._tapped = {index: modules[index] for index in inner}
        if any(_MARK in module.__dict__ for module in (self.trunk, *self._tapped.values())):
            raise RuntimeError(f"this {type(self.trunk).__name__} has taps already; detach them first")
        self.trunk.__dict__[_MARK] = self
        self._forward = _TrunkForward(self)
        for index, layer in self._tapped.items():
            layer.__dict__[_MARK] = (self, index)
            if not isinstance(layer, _TappedLayer):  # it is one when an earlier detach had to leave the class
                cls: type = type(layer)
                layer.__class__ = mixed(_TappedLayer, cls)

    def _forget(self) -> None:
        self._tokens: Tokens | None = None  # of the forward that runs now
        self._rows: dict[int, Tensor] = {}
        self._complete = False

    def _run(self, forward: Any, args: tuple, kwargs: dict) -> Any:
        expected, self._expected = self._expected, {}
        self._forget()
        self._grad = torch.is_grad_enabled()
        try:
            call = {**dict(zip(self._forward.names, args, strict=False)), **kwargs}
            self._tokens = self._select(call, expected)
            output = forward(*args, **kwargs)
            if self._reads_last:
                last = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
                self._tap(self.num_layers - 1, last)
            missing = [index for index in self.layers if index not in self._rows]
            if missing:
                raise RuntimeError(f"layer(s) {missing} did not run in this forward (layer drop, early exit?)")
        except BaseException:
            self._forget()  # the rows hold the failed forward's graph
            raise
        self._tokens = None
        self._complete = True
        return output

    def _select(self, call: dict[str, Any], expected: dict[str, Tensor]) -> Tokens:
        inputs = call.get("inputs_embeds") if call.get("inputs_embeds") is not None else call.get("input_ids")
        if inputs is None:
            raise ValueError(f"taps need input_ids or inputs_embeds in the call; got {sorted(call)}")
        shape = (*inputs.shape[:2], getattr(self.trunk.config, "hidden_size", -1))  # the width only for messages
        offsets, mask = expected.get("cu_seqlens"), expected.get("attention_mask")
        if offsets is None and mask is None:
            offsets, mask = call.get("cu_seq_lens_q"), call.get("attention_mask")
        if offsets is None and mask is None:
            mask = torch.ones(shape[:2], dtype=torch.bool, device=inputs.device)
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(
                f"attention_mask is a {type(mask).__name__}, which does not say which tokens are text; "
                "call taps.expect(attention_mask=...) with the [B, T] mask before the model"
            )
        token_mask = expected.get("token_mask")
        return select_tokens(shape, inputs.device, mask, offsets, token_mask, skip_tokens=self.skip_tokens)

    def _tap_output(self, index: int, output: Any) -> Any:
        if self._tokens is None:  # the layer was called alone
            return output
        if type(output) is tuple:
            return (self._tap(index, output[0]), *output[1:])
        return self._tap(index, output)

    def _tap(self, index: int, hidden: Tensor) -> Tensor:
        """Keep the rows of one hidden state [B, T, D] and return it for the model to go on with."""
        tokens = self._tokens
        assert tokens is not None
        if index in self._rows:
            raise RuntimeError(f"layer {index} ran twice in one forward; taps need every layer to run once")
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != tokens.shape:
            given = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise RuntimeError(
                f"layer {index} returned {given}, expected {[*tokens.shape, 'D']} as the call's inputs are; "
                "a model that removes padding inside cannot be tapped (turn its unpadding off)"
            )
        if self._grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {index} runs under no_grad inside a forward with gradients (a reentrant checkpoint around the "
                "whole layer call?): its row would have no gradient; checkpoint with use_reentrant=False"
            )
        if tokens.last.device != hidden.device:  # once where a model passes from device to device
            tokens = self._tokens = tokens.to(hidden.device)
        if self._grad and hidden.requires_grad:
            hidden, self._rows[index] = _Tap.apply(hidden, tokens, self.token_pooling)
        else:
            self._rows[index] = _pool_rows(hidden, tokens, self.token_pooling)
        return hidden


class _TrunkForward(ForwardPatch):
    """The trunk's `forward` while tapped; an object, so that copying the model can be refused."""

    def __init__(self, taps: Taps):
        self.taps, self.original = taps, taps.trunk.forward  # on a packed trunk a view of `below`
        self.names = argument_names(taps.trunk)
        super().__init__(taps.trunk)
        functools.update_wrapper(self, self.original)  # callers read the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.trunk.__dict__.get(_MARK) is not self.taps:  # detached beneath someone else's patch
            return self.original(*args, **kwargs)
        return self.taps._run(self.original, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(_NO_COPY)


class _TappedLayer:
    """Mixed in before a layer's own class; knows its taps by the instance alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        mark = getattr(self, _MARK, None)
        return output if mark is None else mark[0]._tap_output(mark[1], output)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if _MARK in self.__dict__:
            raise RuntimeError(_NO_COPY)
        return super().__reduce_ex__(protocol)


class _Tap(torch.autograd.Function):
    """hidden [B, T, D] → the same hidden, and its rows [B, D]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tokens, token_pooling: str) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.tokens, ctx.token_pooling = tokens, token_pooling
        if token_pooling == "unit_mean":
            ctx.save_for_backward(hidden)
        # detach: an input returned as it is would be a view, which models may not change in place
        return hidden.detach(), _pool_rows(hidden, tokens, token_pooling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        grad_hidden, grad_rows = grads
        if grad_rows is None:
            return grad_hidden, None, None
        flat = None if grad_hidden is None else grad_hidden.flatten(0, 1)
        grad = _add_rows(flat, grad_rows, ctx.tokens, ctx.token_pooling, ctx.saved_tensors)
        return grad.unflatten(0, ctx.tokens.shape), None, None


def _pool_rows(hidden: Tensor, tokens: Tokens, token_pooling: str) -> Tensor:
    """hidden [B, T, D] (packed [1, total, D]) → the rows of its texts, [B, D], same dtype."""
    return gather_tokens([hidden], tokens, token_pooling, "auto")[:, 0]


def _add_rows(
    grad_hidden: Tensor | None, grad_rows: Tensor, tokens: Tokens, token_pooling: str, states: Sequence[Tensor] = ()
) -> Tensor:
    """The gradient of `_pool_rows`, added to grad_hidden [rows, D] (None is zero) out of place; states: of unit means.

    In place would change gradients that autograd shares with other operands.
    """
    t, shape = tokens, (tokens.shape[0] * tokens.shape[1], grad_rows.shape[1])
    spans = (t.starts, t.ends, t.last, t.count, t.keep)
    return gather_backward(grad_rows[:, None], shape, *spans, token_pooling != "last", "auto", grad_hidden, states)[0]


def _check_indices(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(num_layers))
    wrong = [i for i in layers if not isinstance(i, int) or isinstance(i, bool) or not -num_layers <= i < num_layers]
    if wrong or not layers:
        raise ValueError(f"layers must be indices from {-num_layers} to {num_layers - 1}, got {list(layers)}")
    indices = tuple(i % num_layers for i in layers)
    if len(set(indices)) < len(indices):
        raise ValueError(f"layers must differ from each other, got {list(layers)} of {num_layers} layers")
    return indices
