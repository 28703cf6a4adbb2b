"""What every pool shares: reading a batch, finishing an embedding, saving and loading."""

import difflib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from mlpool_kernels import gather as gather_rows
from mlpool_kernels.embed import unit
from torch import Tensor, nn

from ..files import read_json, replacing, write_json
from ..quantized import parts
from ..version import need
from .tokens import Tokens, select_tokens

logger = logging.getLogger("mlpool")
TOKEN_POOLINGS = ("last", "mean", "unit_mean")
CONFIG_NAME, WEIGHTS_NAME = "config.json", "pool.safetensors"
LARGEST = 1e17  # of a hidden state; the squares of 10^4 such still sum to a float32


@lru_cache
def log_once(message: str) -> None:
    logger.warning(message)


def running_dtype(tensor: Tensor) -> torch.dtype:
    """The precision of products with a tensor: autocast's where that is on."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


def check_flags(**flags: bool) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, got {flag!r}")


class StatesTooLarge(ValueError):
    """Hidden states whose squares are no numbers of float32; `row` is that of the text."""

    def __init__(self, row: int, largest: float) -> None:
        super().__init__(
            f"row {row}: its hidden states reach {largest:.1e}, and of more than {LARGEST:.0e} the squares are no "
            "numbers of float32; look at the model that made them, or use float64"
        )
        self.row, self.largest = row, largest


def check_range(states: Tensor) -> None:
    """Whether layer norms can take rows [B, n, D]: their squares, summed, are numbers of float32.

    On a CPU, where looking costs next to nothing; elsewhere it would mean to wait, and the kernels give NaN instead.

    Raises:
        StatesTooLarge: a finite value beyond `LARGEST`; the first such row is named.
    """
    if states.device.type != "cpu" or states.dtype == torch.float64 or torch.compiler.is_compiling():
        return
    largest = torch.linalg.vector_norm(states.detach(), torch.inf, dim=(1, 2))
    rows = ((largest > LARGEST) & largest.isfinite()).nonzero().flatten().tolist()
    if rows:
        raise StatesTooLarge(rows[0], float(largest[rows[0]]))


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
    for i, state in enumerate(states):
        if not isinstance(state, Tensor):
            raise TypeError(f"hidden_states[{i}] must be a tensor, got {type(state).__name__}")
        if i == 0:
            shape, dtype = state.shape, state.dtype
        if state.shape != shape:
            raise ValueError(f"hidden_states must have one shape: [0] is {list(shape)}, [{i}] is {list(state.shape)}")
        if state.dtype != dtype or not dtype.is_floating_point:
            raise TypeError(f"hidden_states must have one floating dtype: [0] is {dtype}, [{i}] is {state.dtype}")


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
        attention_mask: [B, T] bool, integer or float of 0 and 1; 1 is text; left, right or no padding.
        token_pooling: "last", "mean" (accumulated in float32), or "unit_mean": every token is brought to unit length
            (L2) before the mean, so that no massive activation drowns a text. Tokens of zeros add nothing and get no
            gradient. The rows' norm is then at most 1; a pool that wants another scale multiplies.
        token_mask: like attention_mask ([total] when packed); 0 also leaves a token out (BOS, instruction tokens).
        cu_seqlens: [B+1] integers instead of attention_mask, for packed states: text b has the rows cu_seqlens[b] …
            cu_seqlens[b+1]-1.
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
        states[0].shape, states[-1].device, attention_mask, cu_seqlens, token_mask, skip_tokens=skip_tokens,
        backend=backend,
    )  # fmt: skip
    return gather_tokens(states, tokens, token_pooling, backend)


def gather_tokens(states: Sequence[Tensor], tokens: Tokens, token_pooling: str, backend: str) -> Tensor:
    """`gather` for tokens already selected."""
    if len({s.device for s in states}) > 1:
        log_once("hidden states lie on several devices: gathered layer by layer, which is slower than one launch")
    t = tokens
    spans = (t.starts, t.ends, t.last, t.count, t.keep)
    return gather_rows(states, *spans, token_pooling != "last", backend, unit=token_pooling == "unit_mean")


class Pool(nn.Module):
    """Base of all pools: the constructor's arguments are its config, and it saves to and loads from a folder.

    Attributes:
        reads_all_layers: whether it reads `layer_states` [B, L, D] and takes num_layers after hidden_size.
        trainable: whether it has parameters. has_latents: whether it is the paper's cross-attention, which has sizes.
        learning_rates: at which its parameters learn best over a backbone that learns slower, by what their names begin
            with, "" for all the rest; empty, the backbone's. `mlpool train` takes them.
        older: what arguments were before they existed, for folders that say nothing of them.
    """

    reads_all_layers: ClassVar[bool] = False
    trainable: ClassVar[bool] = True
    has_latents: ClassVar[bool] = False
    older: ClassVar[Mapping[str, Any]] = {}
    learning_rates: Mapping[str, float] = {}
    normalize: bool

    @property
    def uncalibrated(self) -> bool:
        """Whether `calibrate` is to set this pool by some texts' embeddings before it is used or trained."""
        return False

    def calibrate(self, embeddings: Tensor) -> None:
        """Of pools that have such a start; ValueError of others."""
        raise ValueError(f"this {type(self).__name__} has nothing to calibrate; a MultiLayerPool with whiten=True has")

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
        # Of a pool of somebody's own the package is named, so that a machine without it can say what it lacks.
        origin = {"package": package} if (package := package_of(type(self))) else {}
        config = {"pool": type(self).__name__, **origin, **self.config()}
        tensors = {name: t.detach().contiguous().cpu() for name, t in self.state_dict().items()}
        with replacing(directory / WEIGHTS_NAME) as new:
            save_file(tensors, new, metadata={"format": "pt"})
        write_json(directory / CONFIG_NAME, config)

    def rates(self, learning_rate: float | None) -> dict[str, float]:
        """By what names begin with: `learning_rate` for most, the parts' own in proportion; None: as they are."""
        own = self.learning_rates
        if learning_rate is None:
            return dict(own)
        return {part: learning_rate * rate / own[""] for part, rate in own.items()} or {"": learning_rate}

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The parameters for an optimizer, each at its rate of `rates`."""
        rates = self.rates(learning_rate)
        groups: dict[str, list[nn.Parameter]] = {part: [] for part in rates}
        for name, parameter in self.named_parameters():
            groups[max((part for part in rates if name.startswith(part)), key=len)].append(parameter)
        return [{"params": made, "lr": rates[part]} for part, made in groups.items()]

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> Self:
        """Load what `save_pretrained` wrote; `changes` replace config entries (say backend="torch").

        Raises:
            FileNotFoundError: a missing folder or file, named. ValueError: another kind of pool, unknown or wrong
            entries of its config, a file that is cut short or no safetensors file, missing, unexpected or misshapen
            tensors, tensors that hold NaN or infinity; all named.
        """
        directory = Path(directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory} has no {name}; expected a folder written by save_pretrained")
        config = read_json(directory / CONFIG_NAME)
        kind = config.pop("pool", None)
        config.pop("package", None)
        if kind != cls.__name__:
            raise ValueError(f"{directory} holds a {kind}, not a {cls.__name__}; load it with mlpool.{kind}")
        known = inspect.signature(cls.__init__).parameters
        for name in config:
            if name not in known or name in ("self", "device", "dtype"):
                near = "".join(f"; nearest: {key}" for key in difflib.get_close_matches(name, known, n=1))
                raise ValueError(
                    f"{directory / CONFIG_NAME}: unknown key {name!r}{near}; edited, or written by a newer mlpool"
                )
        state = load_tensors(directory / WEIGHTS_NAME)
        try:
            pool = cls(**{**cls.older, **config, **changes})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{directory / CONFIG_NAME} does not give a {kind}: {error}") from error
        load_checked(pool, state, str(directory / WEIGHTS_NAME))
        return pool

    @contextmanager
    def unnormalized(self) -> Iterator[None]:
        """Embeddings are meanwhile as they are before unit length."""
        normalize, self.normalize = self.normalize, False
        try:
            yield
        finally:
            self.normalize = normalize

    def _finish(self, embedding: Tensor) -> Tensor:
        return unit(embedding, getattr(self, "backend", "auto")) if self.normalize else embedding


def package_of(pool: type[Pool]) -> str | None:
    """The package a pool comes from; None for ours."""
    package = pool.__module__.partition(".")[0]
    return None if package == __name__.partition(".")[0] else package


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
    problems += [f"{name} holds {fault}" for name, tensor in state.items() if (fault := not_finite(tensor))]
    if problems:
        raise ValueError(f"{source} does not fit {type(pool).__name__}: " + "; ".join(problems))
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        pool.to(dtypes.pop())
    pool.load_state_dict(state)


def not_finite(tensor: Tensor) -> str | None:
    """ "NaN" or "infinity" where a tensor holds such; read once, without a copy."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return None
    low, high = tensor.detach().aminmax()
    extremes = torch.stack([low, high])
    if bool(extremes.isnan().any()):
        return "NaN"
    return "infinity" if bool(extremes.isinf().any()) else None


def broken_weights(module: nn.Module) -> list[str]:
    """The weights that hold NaN or infinity, each in words."""
    found = []
    for name, weight in module.named_parameters():
        local = weight.to_local() if hasattr(weight, "to_local") else weight  # this process's part of a sharded one
        if fault := next(filter(None, map(not_finite, parts(local))), None):
            found.append(f"the weight {name} holds {fault}")
    return found


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; ValueError where it is none."""
    module = _safetensors()
    try:
        return module.load_file(path)  # type: ignore[no-any-return]
    except Exception as error:
        raise ValueError(f"{path} cannot be read, is it cut short? ({error})") from error


def _safetensors() -> Any:
    return need("safetensors.torch", "saving and loading need safetensors: pip install safetensors")
