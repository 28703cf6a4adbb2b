"""The authors' released checkpoints (`attn_pool.pt`): their names, in and out.

Source: the released module of arXiv 2409.02727. LN1 norms the keys, LN2 the latents; one matrix holds Wk over Wv.
"""

import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .base import Pool, load_checked, load_tensors

P = TypeVar("P", bound=Pool)
ATTENTION, FEED_FORWARD = "cross_attend_blocks.0", "cross_attend_blocks.1"
KEY_VALUE = f"{ATTENTION}.fn.to_kv.weight"
RELEASED = {
    "latents": "latents",
    "layer_weights": "pos_emb.weight",
    "key_norm_weight": f"{ATTENTION}.norm.weight",
    "key_norm_bias": f"{ATTENTION}.norm.bias",
    "latent_norm_weight": f"{ATTENTION}.norm_context.weight",
    "latent_norm_bias": f"{ATTENTION}.norm_context.bias",
    "query_weight": f"{ATTENTION}.fn.to_q.weight",
    "output_weight": f"{ATTENTION}.fn.to_out.weight",
    "ff_norm_weight": f"{FEED_FORWARD}.norm.weight",
    "ff_norm_bias": f"{FEED_FORWARD}.norm.bias",
    "ff_in_weight": f"{FEED_FORWARD}.fn.net.0.weight",
    "ff_in_bias": f"{FEED_FORWARD}.fn.net.0.bias",
    "ff_out_weight": f"{FEED_FORWARD}.fn.net.2.weight",
    "ff_out_bias": f"{FEED_FORWARD}.fn.net.2.bias",
}


def to_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> the authors'."""
    released = {RELEASED[name]: tensor.detach() for name, tensor in state.items() if name in RELEASED}
    released[KEY_VALUE] = torch.cat([state["key_weight"], state["value_weight"]]).detach()
    return released


def from_released(released: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names -> ours. The key-value matrix must be there."""
    state = {name: released[theirs] for name, theirs in RELEASED.items() if theirs in released}
    state["key_weight"], state["value_weight"] = released[KEY_VALUE].chunk(2)
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A torch or safetensors file of dense floating-point tensors by name, and nothing else.

    Raises: ValueError for a broken file, and for anything but such tensors.
    """
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's own message advises to load it all the same; that advice is not passed on.
        raise ValueError(
            f"{path} is damaged or holds more than plain tensors, and is not loaded; expected a dict of tensors"
        ) from error
    except Exception as error:
        raise ValueError(f"{path} cannot be read, is it cut short? ({error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(tensors).__name__}")
    if wrong := [n for n, t in tensors.items() if t.layout != torch.strided or not t.is_floating_point()]:
        raise ValueError(f"{path} must hold dense tensors of floating-point numbers; others are {', '.join(wrong[:3])}")
    return tensors


def read_released(path: str | Path, multi_layer: bool) -> dict[str, Tensor]:
    """The file's tensors under the authors' names, complete and nothing else.

    Raises: FileNotFoundError; ValueError for a broken file, anything but plain tensors, missing or extra keys.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no released checkpoint at {path}; expected the authors' attn_pool.pt")
    released = read_tensors(path)
    expected = {*RELEASED.values(), KEY_VALUE}
    if not multi_layer:
        expected.discard(RELEASED["layer_weights"])
    missing, extra = sorted(expected - set(released)), sorted(set(released) - expected)
    if missing or extra:
        hint = ""
        if extra == [RELEASED["layer_weights"]]:
            hint = "; it has layer weights: load it with MultiLayerPool.from_released"
        elif missing == [RELEASED["layer_weights"]]:
            hint = "; it has no layer weights: load it with LastLayerPool.from_released"
        raise ValueError(f"{path} does not fit: missing keys {missing}, unexpected keys {extra}{hint}")
    return released


def load_released(cls: type[P], path: str | Path, num_heads: int, *, multi_layer: bool, **options: Any) -> P:
    """A pool of the sizes that the file's shapes give, with its tensors.

    Args:
        options: of the pool. num_layers of them: the first so many rows of the file's layer weights are taken, as the
            authors' module does, whose table has 32 rows whatever the depth of the base model; by default all.
    """
    released = read_released(path, multi_layer)
    for name in ("latents", KEY_VALUE, RELEASED["query_weight"], RELEASED["ff_in_weight"]):
        if released[name].dim() != 2:
            raise ValueError(f"{path}: {name} must be a matrix, got shape {list(released[name].shape)}")
    num_latents, hidden = released["latents"].shape
    inner, width = released[RELEASED["query_weight"]].shape[0], released[RELEASED["ff_in_weight"]].shape[0] // 2
    if num_heads < 1 or inner % num_heads:
        raise ValueError(f"{path} has an inner width of {inner}, which {num_heads} heads do not divide; pass num_heads")
    if width % hidden:
        raise ValueError(f"{path} has a feed-forward width of {width}, not a multiple of D = {hidden}")
    sizes: dict[str, Any] = {
        "num_latents": num_latents, "num_heads": num_heads, "head_dim": inner // num_heads, "ff_mult": width // hidden,
        "residual": False,
    }  # fmt: skip
    if multi_layer:
        rows = released[RELEASED["layer_weights"]]
        sizes["num_layers"] = count = options.pop("num_layers", None) or len(rows)
        if count > len(rows):
            raise ValueError(f"{path} has layer weights of {len(rows)} layers, {count} are asked for")
        released[RELEASED["layer_weights"]] = rows[:count]
    pool = cls(hidden, **sizes, **options)  # type: ignore[call-arg]
    load_checked(pool, from_released(released), str(path))
    return pool
