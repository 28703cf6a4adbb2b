"""Which model a score belongs to: a hash of everything that makes its embeddings.

mteb files the results of every local model under one name, so that a second model is given the first one's scores. Here
results are filed under this hash instead.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from ..pooling.base import Pool
from ..quantized import parts

_CHUNK = 1 << 24  # bytes hashed at once by one thread
# Where a model lies and how it is run, not what it computes: attention flags and windows are counted, and dtypes are
# with the weights.
_NOT_COUNTED = {
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "torch_dtype", "dtype",
    "use_cache", "gradient_checkpointing", "output_hidden_states", "output_attentions", "return_dict", "id2label",
    "label2id", "attn_implementation", "_attn_implementation", "training", "max_seq_len_cached", "layer_idx",
    "base_name",
}  # fmt: skip


def identity(model: SentenceTransformer | nn.Module) -> str:
    """16 hexadecimal digits of a sha256 over weights, attention, pooling, tokenizer, lengths and prompts.

    Weights: name, shape, dtype and bytes of every parameter and buffer. Attention: the backbone's config and the plain
    attributes of its modules, so `is_causal` and windows wherever they are kept. Pooling: the config of each module.
    Prompts: those stored in the model. Not in it: the device, the path, whether it runs packed or by which attention
    kernel, and training mode.

    Args:
        model: any SentenceTransformer, or a bare module.

    Returns: the same for the same model in every process and on every device; about a second a GB.
    """
    digest = hashlib.sha256(json.dumps(_describe(model), sort_keys=True).encode())
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        for part in threads.map(_hash_chunk, _chunks(model)):
            digest.update(part)
    return digest.hexdigest()[:16]


def with_settings(identity: str, settings: Any) -> str:
    """The identity of a model used in a certain way, say with a prompt policy; None leaves it as it is."""
    if settings is None:
        return identity
    return hashlib.sha256(json.dumps([identity, settings], sort_keys=True).encode()).hexdigest()[:16]


def _chunks(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in order of name, in flat pieces of at most `_CHUNK` bytes; tied weights once."""
    seen: dict[tuple, str] = {}
    tensors = [(name, t) for name, t in sorted(model.state_dict().items()) if isinstance(t, Tensor)]
    for name, tensor in ((name, part) for name, whole in tensors for part in parts(whole)):
        header = f"{name} {tensor.dtype} {list(tensor.shape)}"
        storage = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and (first := seen.setdefault(storage, name)) != name:
            yield f"{header} = {first}", tensor.new_empty(0)
            continue
        flat = tensor.detach().reshape(-1)
        for start in range(0, max(1, flat.numel()), step := max(1, _CHUNK // tensor.element_size())):
            yield f"{header} from {start}", flat[start : start + step]


def _hash_chunk(piece: tuple[str, Tensor]) -> bytes:
    header, flat = piece
    digest = hashlib.sha256(header.encode())
    digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().data)  # releases the GIL: threads run at once
    return digest.digest()


def _describe(model: nn.Module) -> dict[str, Any]:
    described: dict[str, Any] = {}
    configs: set[int] = set()  # one config is held by many modules
    for name, module in model.named_modules():
        own: dict[str, Any] = {"class": type(module).__qualname__ if name else ""}  # the root may be a subclass
        config = getattr(module, "config", None)
        if isinstance(module, Pool):
            own["config"] = _plain(_counted(module, module.config()))
        elif hasattr(module, "get_config_dict"):  # sentence-transformers' modules
            own["config"] = _plain(_counted(module, module.get_config_dict()))
        else:
            own["attributes"] = _plain_attributes(module)
        if hasattr(config, "to_dict") and id(config) not in configs:
            configs.add(id(config))
            own["backbone"] = _plain(config.to_dict())  # type: ignore[union-attr]
        described[name] = own
    # What sentence-transformers keeps on the model, and what counts at encoding without being in any config.
    for name in ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "max_seq_length"):
        described[f"model.{name}"] = _plain(getattr(model, name, None))
    described["tokenizer"] = tokenizer_rules(getattr(model, "tokenizer", None))
    return described


def _counted(module: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """What embeddings depend on: not where a pool started, nor an argument that says what was so before it was one."""
    absent, older = object(), getattr(module, "older", {})
    return {name: v for name, v in config.items() if name != "start" and v != older.get(name, absent)}


def tokenizer_rules(tokenizer: Any) -> Any:
    """Vocabulary, merges, special tokens and what is put around a text; not the padding and truncation of a call."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(backend.to_str())
        return {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _NOT_COUNTED and isinstance(value, bool | int | float | str)
    }


def _plain(value: Any) -> Any:
    """What JSON can hold, the same in every process: no addresses, no order of sets."""
    if isinstance(value, dict):
        return {str(name): _plain(v) for name, v in value.items() if name not in _NOT_COUNTED}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool | int | float | str | torch.dtype | None):
        return str(value) if isinstance(value, torch.dtype) else value
    return getattr(value, "__qualname__", type(value).__qualname__)
