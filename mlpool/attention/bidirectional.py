"""Makes a decoder read in both directions, on the instance, and back again.

`config.is_causal = False` makes transformers (5.17 and later) build bidirectional masks for eager, sdpa and flex and
pass `causal=False` to flash-attention. That alone is not enough, and what is missing is silent:
- Some attentions read `is_causal` from the module (StableLM): set there too.
- A forward with a cache counts positions and masks from the cache's length: no cache is kept or taken.
- Learned positions of GPT-2 count left padding: position_ids are made from the mask.
- Families with a bidirectional mode of their own (Gemma3) get that one, as if constructed with it.

What a reload keeps. `save_pretrained` writes the config's changes, and `from_pretrained` reads them: Llama, Mistral,
Qwen, Phi3, Gemma, OLMo2, Granite, GPT-NeoX, OPT, Falcon are bidirectional again by themselves. Call
`bidirectional(model)` after every load all the same, because these need it (`is_bidirectional(model)` measures it):
- StableLM: on sdpa, unpadded batches are causal until then.
- GPT-2: left padding is wrong without its position_ids.
- Adapters (peft): their save holds no base config, so an adapter that was trained bidirectional and is loaded by plain
  peft stands on a causal model, silently. `mlpool.load` of a saved embedder sets the design's attention itself.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from ..pooling.base import check_choice, log_once
from ..trunk import ForwardPatch, argument_names, family_name, find_layers, no_cache
from .check import check_attention, claims_bidirectional, is_encoder, measure
from .families import (
    NO_LIMIT,
    Family,
    attentions,
    check_backend,
    family_of,
    flagged,
    require_text_model,
    require_transformers,
    varies_by_layer,
    warning_of,
)
from .probe import text_positions

_MARK = "_mlpool_attention"  # on the trunk: its patch
_WINDOWS = ("keep", "full")


class bidirectional:  # called like a function; an object so that `with` can undo it
    """Make a Hugging Face decoder bidirectional, in place.

        bidirectional(model)             # until causal(model)
        with bidirectional(model):       # until the block's end
            model(**batch)

    Only this instance changes; a config object shared by several models is shared in this too. With gradient
    checkpointing the backward belongs inside the block: the recompute reads the flags anew. While patched, a forward
    keeps no cache, whatever `use_cache` says; the model may be saved, copied and pickled. Calling it again on a
    patched model only repeats the self-test. The end of a `with` block brings back what was before, a model that its
    saved config makes bidirectional included; `causal(model)` makes that one causal too. A LoRA save does not hold the
    change, and some families need the call after every load: see the module's docstring.

    Windows: eager, sdpa and flex_attention count a bidirectional window of w as |i - j| <= w, flash-attention as
    |i - j| < w; this is the library's choice and is kept. Gemma3's own mode (window w // 2 + 1) is < on all of them.

    Args:
        model: a bare decoder, one with a head, wrapped by peft or DDP, or a SentenceTransformer. Encoders are left
            as they are, and this is said once.
        sliding_window: "keep" leaves sliding layers their window, on both sides; "full" lets them see all tokens. The
            choice is written into the config.
        check: run `check_attention` at once and, if it fails, undo the change. Two forwards of a few tokens.

    Attributes:
        model: what was passed; also what `with ... as` gives.

    Raises:
        ValueError: an unknown sliding_window or attention backend, a backend that the family cannot use, a family
            that cannot be bidirectional, an encoder-decoder, a multimodal model, a model patched already with the
            other sliding_window, weights on the meta device (with check=True).
        AttentionCheckError: the self-test failed (the model is unchanged then).
        ImportError: transformers is missing or older than 5.17.
    """

    def __init__(self, model: nn.Module, sliding_window: str = "keep", check: bool = True):
        self.model = model
        self._owner = False  # whether leaving `with` undoes it
        check_choice("sliding_window", sliding_window, _WINDOWS)
        require_transformers()
        trunk, layers = find_layers(model)
        _refuse(model, trunk)
        patch: _Patch | None = trunk.__dict__.get(_MARK)
        if patch is not None and patch.sliding_window != sliding_window:
            raise ValueError(
                f"this {type(trunk).__name__} is bidirectional already, with sliding_window="
                f"{patch.sliding_window!r}; call causal(model) before choosing {sliding_window!r}"
            )
        if patch is None and is_encoder(trunk, layers):
            log_once(f"{trunk.config.model_type} reads both directions by itself: nothing is changed")
        elif patch is None:
            self._owner = True
            if warning := warning_of(trunk.config):
                log_once(f"{trunk.config.model_type} made bidirectional: {warning}")
            patch = _Patch(model, trunk, layers, sliding_window)
        try:
            if check:
                check_attention(model, "bidirectional")
        except BaseException:
            if self._owner and patch is not None:
                patch.undo()
            raise

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *error: object) -> None:
        if self._owner:
            patch: _Patch | None = find_layers(self.model)[0].__dict__.get(_MARK)
            if patch is not None:  # else causal(model) was called inside
                patch.undo()


def causal(model: nn.Module) -> nn.Module:
    """Undo `bidirectional`, exactly; return the model.

    A model that is bidirectional by its config (saved patched, then loaded, whether `bidirectional` was called again
    or not) becomes causal too; a window that was saved as "full" stays so. A causal decoder is left as it is.

    Raises:
        ValueError: an encoder, which has no causal form to go back to; an encoder-decoder.
        ImportError: transformers is missing or older than 5.17.
    """
    require_transformers()
    trunk, layers = find_layers(model)
    patch: _Patch | None = trunk.__dict__.get(_MARK)
    if patch is not None:
        patch.undo()
        if flagged(trunk.config):  # it was saved bidirectional: what was before the patch is not causal either
            _clear_flags(model, trunk, layers)
    elif is_encoder(trunk, layers):
        raise ValueError(
            f"{trunk.config.model_type} is an encoder: it reads both directions by design and was not patched, so "
            "there is no causal form to go back to"
        )
    elif claims_bidirectional(trunk, layers):
        _clear_flags(model, trunk, layers)
    return model


def is_bidirectional(model: nn.Module) -> bool:
    """Whether every layer reads both directions as the model stands: measured by two short forwards, flags aside.

    False also for a model that is bidirectional in some layers or some batches only; `check_attention` says which. So
    also for an adapter that was trained bidirectional and loaded by plain peft, whose base is causal again.

    Raises:
        AttentionCheckError: the forward fails, or a weight is NaN. ValueError: see `check_attention`.
    """
    return measure(*find_layers(model)).bidirectional


class _Patch:
    """All that was changed on one model, and how it was before."""

    def __init__(self, model: nn.Module, trunk: nn.Module, layers: nn.ModuleList, sliding_window: str):
        self.trunk, self.sliding_window = trunk, sliding_window
        self.saved: list[tuple[Any, str, Any]] = []
        family = family_of(trunk.config)
        self.text_positions = family.text_positions
        # constructed in the family's own mode: the windows are halved already
        self.halved = family.own_mode and bool(getattr(trunk.config, "use_bidirectional_attention", None))
        for config in _configs(model, trunk):
            self._set_config(config, family)
        for module in attentions(layers):
            self._set(module, "is_causal", False)
            self._set_window(module, family, layers_own=True)
        self.forward = _Forward(trunk)
        trunk.__dict__[_MARK] = self

    def _set_config(self, config: Any, family: Family) -> None:
        if not family.own_mode:
            self._set(config, "is_causal", False)
        if family.serving_flag is not None:
            self._set(config, "use_bidirectional_attention", family.serving_flag)
        self._set_window(config, family)

    def _set_window(self, holder: Any, family: Family, layers_own: bool = False) -> None:
        """Of the config, or the copy of it that a sliding attention keeps for flash-attention."""
        if varies_by_layer(holder, "sliding_window"):
            if self.sliding_window == "full":
                raise ValueError(f"the windows of {holder.model_type} differ by layer; they can only be kept")
            return
        window = getattr(holder, "sliding_window", None)
        if window is None:
            return
        if self.sliding_window == "full":
            # With layer_types the library builds the sliding mask in any case, which needs a number.
            named = layers_own or getattr(holder, "layer_types", None)
            self._set(holder, "sliding_window", NO_LIMIT if named else None)
        elif family.halves_window and not self.halved:
            self._set(holder, "sliding_window", window // 2 + 1)

    def _set(self, holder: Any, name: str, value: Any) -> None:
        self.saved.append((holder, name, holder.__dict__.get(name, _Missing)))
        setattr(holder, name, value)

    def undo(self) -> None:
        del self.trunk.__dict__[_MARK]
        self.forward.restore()
        for holder, name, value in reversed(self.saved):
            if value is _Missing:
                delattr(holder, name)
            else:
                setattr(holder, name, value)


class _Missing:
    """Stands for "was not set"; a class, because copies and pickles of a class are itself."""


class _Forward(ForwardPatch):
    """The trunk's `forward` while patched: no cache, and positions where the family needs them."""

    __slots__ = ()

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.trunk).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        patch = self.trunk.__dict__.get(_MARK)
        if patch is not None and patch.forward is self:  # else undone beneath someone else's patch
            args, kwargs = (), self._arguments(patch, args, kwargs)
        if self.below is not None:
            return self.below(*args, **kwargs)
        return type(self.trunk).forward(self.trunk, *args, **kwargs)

    def _arguments(self, patch: _Patch, args: tuple, kwargs: dict) -> dict[str, Any]:
        call = {**dict(zip(argument_names(self.trunk), args, strict=False)), **kwargs}
        if call.get("past_key_values") is not None:
            raise ValueError(
                f"past_key_values were passed to a bidirectional {type(self.trunk).__name__}: states of earlier tokens "
                "would have to change with every later one, so there is no cache (nor generation, nor prefix tuning); "
                "call causal(model) first"
            )
        call |= no_cache(self.trunk)
        mask = call.get("attention_mask")
        if patch.text_positions and call.get("position_ids") is None and isinstance(mask, Tensor) and mask.dim() == 2:
            call["position_ids"] = text_positions(mask)
        return call


def _refuse(model: nn.Module, trunk: nn.Module) -> None:
    if refused := family_of(trunk.config).refused:
        raise ValueError(f"{family_name(trunk)} cannot be made bidirectional: {refused}")
    require_text_model(model, trunk)
    check_backend(trunk.config)


def _configs(model: nn.Module, trunk: nn.Module) -> list[Any]:
    """The trunk's config and any copies that heads or layers hold, which are what is saved or read."""
    kind = getattr(trunk.config, "model_type", None)
    held = (getattr(module, "config", None) for module in (trunk, *model.modules()))
    return list({id(c): c for c in held if c is not None and getattr(c, "model_type", None) == kind}.values())


def _clear_flags(model: nn.Module, trunk: nn.Module, layers: nn.ModuleList) -> None:
    """For a model that was saved patched and is not patched now."""
    family = family_of(trunk.config)
    own = family.own_mode and bool(getattr(trunk.config, "use_bidirectional_attention", None))
    for config in _configs(model, trunk):
        if getattr(config, "is_causal", None) is False:
            config.is_causal = True
        if getattr(config, "use_bidirectional_attention", None):
            # False where that is the family's default or it declares none; Gemma 4 takes None, "all" or "vision".
            default = getattr(type(config), "use_bidirectional_attention", False)
            config.use_bidirectional_attention = False if default is False else None
            _double_window(config, own)
    for module in attentions(layers):
        module.is_causal = True  # type: ignore[assignment]
        _double_window(module, own)


def _double_window(holder: Any, own: bool) -> None:
    window = getattr(holder, "sliding_window", None) if own else None
    if own and window not in (None, NO_LIMIT):
        holder.sliding_window = 2 * (window - 1)  # as the library's own to_dict does
