"""What every pool shares: reading a batch, finishing an embedding, saving and loading."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from mlpool_kernels import gather as gather_rows
from torch import Tensor, nn

from .tokens import Tokens, select_tokens

logger = logging.getLogger("mlpool")
TOKEN_POOLINGS = ("last", "mean", "unit_mean")
CONFIG_NAME, WEIGHTS_NAME = "config.json", "pool.safetensors"


@lru_cache
def log_once(message: str) -> None:
    logger.warning(message)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


def check_token_pooling(token_pooling: str, skip_tokens: int) -> None:
    """Raises: ValueError for an unknown token pooling, or skip_tokens that is no count or has no mean to act on."""
    check_choice("token_pooling", token_pooling, TOKEN_POOLINGS)
    if not isinstance(skip_tokens, int) or isinstance(skip_tokens, bool) or skip_tokens < 0:
        raise ValueError(f"skip_tokens must be an integer of at least 0, got {skip_tokens!r}")
    if skip_tokens and token_pooling == "last":
        raise ValueError(
            f'skip_tokens={skip_tokens} leaves the first tokens out of a mean, and token_pooling="last" takes none; '
            'choose "mean" or "unit_mean", or leave skip_tokens out'
        )


def check_hidden_states(states: Sequence[Tensor]) -> None:
    """One shape and one floating dtype for all layers; different devices are allowed.

    Raises:
        ValueError: no layers, or layers of different shape. TypeError: not tensors, not floating, mixed dtypes.
    """
    if not states:
        raise ValueError("hidden_states is empty; pass the tuple that output_hidden_states=True returns")
    first = states[0]
    for i, state in enumerate(states):
        if not isinstance(state, Tensor):
            raise TypeError(f"hidden_states[{i}] must be a tensor, got {type(state).__name__}")
        if state.shape != first.shape:
            raise ValueError(
                f"hidden_states must have one shape: [0] is {list(first.shape)}, [{i}] is {list(state.shape)}"
            )
        if state.dtype != first.dtype or not state.dtype.is_floating_point:
            raise TypeError(f"hidden_states must have one floating dtype: [0] is {first.dtype}, [{i}] is {state.dtype}")


def gather(
    hidden_states: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    token_pooling: str = "last",
    token_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    skip_tokens: int = 0,
    backend: str = "auto",
) -> Tensor:
    """One row per text and layer: its last token's state, or a mean over its tokens. X0 of the paper's section 3.3.

    Args:
        hidden_states: L tensors [B, T, D] (packed: [total, D] or [1, total, D]), any floating dtype; taken as they
            are, so leave out the embedding (`hidden_states[1:]`) if it is not to be pooled.
        attention_mask: [B, T], 1 is text; left, right or no padding.
        token_pooling: "last", "mean" (accumulated in float32), or "unit_mean": every token is brought to unit length
            (L2) before the mean, so that no massive activation drowns a text. Tokens of zeros add nothing and get no
            gradient. The rows' norm is then at most 1; a pool that wants another scale multiplies.
        token_mask: like attention_mask; 0 also leaves a token out (BOS, instruction tokens).
        cu_seqlens: [B+1] integer offsets instead of attention_mask, for packed states.
        skip_tokens: how many of each text's first tokens (of those that the model reads, whatever token_mask says) are
            left out of a mean; an attention sink is one.
        backend: "auto" (Triton on a GPU, torch for float64), "triton" or "torch".

    Returns: [B, L, D] of the states' dtype, on the last layer's device. Differentiable, with dense gradients.

    Raises:
        ValueError, TypeError: see `check_token_pooling`, `check_hidden_states` and `select_tokens`.
    """
    check_token_pooling(token_pooling, skip_tokens)
    states = list(hidden_states)
    check_hidden_states(states)
    tokens = select_tokens(
        states[0].shape, states[-1].device, attention_mask, cu_seqlens, token_mask, skip_tokens=skip_tokens
    )
    return gather_tokens(states, tokens, token_pooling, backend)


def gather_tokens(states: Sequence[Tensor], tokens: Tokens, token_pooling: str, backend: str) -> Tensor:
    """`gather` for tokens already selected."""
    if len({s.device for s in states}) > 1:
        log_once("hidden states lie on several devices: gathered layer by layer, which is slower than one launch")
    t = tokens
    spans = (t.starts, t.ends, t.last, t.count, t.keep)
    return gather_rows(states, *spans, token_pooling != "last", backend, unit=token_pooling == "unit_mean")


class Pool(nn.Module):
    """Base of all pools: the constructor's arguments are its config, and it saves to and loads from a folder."""

    normalize: bool

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that rebuild this pool."""
        names = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names if name not in ("self", "device", "dtype")}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `pool.safetensors` into `directory`, made if need be. Needs safetensors."""
        save_file = _safetensors().save_file
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"pool": type(self).__name__, **self.config()}
        tensors = {name: t.detach().contiguous().cpu() for name, t in self.state_dict().items()}
        save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> Self:
        """Load what `save_pretrained` wrote; `changes` replace config entries (say backend="torch").

        Raises:
            FileNotFoundError: a missing folder or file, named. ValueError: another kind of pool, a file that is cut
            short or no safetensors file, missing, unexpected or misshapen tensors, named.
        """
        directory = Path(directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory} has no {name}; expected a folder written by save_pretrained")
        try:
            config = json.loads((directory / CONFIG_NAME).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{directory / CONFIG_NAME} is not valid JSON: {error}") from error
        kind = config.pop("pool", None)
        if kind != cls.__name__:
            raise ValueError(f"{directory} holds a {kind}, not a {cls.__name__}; load it with mlpool.{kind}")
        st = _safetensors()
        try:
            state = st.load_file(directory / WEIGHTS_NAME)
        except Exception as error:
            raise ValueError(f"{directory / WEIGHTS_NAME} cannot be read, is it cut short? ({error})") from error
        pool = cls(**{**config, **changes})
        load_checked(pool, state, str(directory / WEIGHTS_NAME))
        return pool

    def _finish(self, embedding: Tensor) -> Tensor:
        return F.normalize(embedding, dim=-1) if self.normalize else embedding


def load_checked(pool: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load `state` into `pool` with its dtype, or a ValueError that names every missing, extra or misshapen tensor."""
    expected = pool.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(pool).__name__}: " + "; ".join(problems))
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        pool.to(dtypes.pop())
    pool.load_state_dict(state)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("saving and loading need safetensors: pip install safetensors") from error
    return safetensors.torch
