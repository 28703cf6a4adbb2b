"""A bare transformers model with its adapter and its tokenizer, from a folder or the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from ..files import read_json
from ..pooling.base import broken_weights
from ..quantized import prepare_layers, require_package
from ..schema import check
from ..show import some
from .adapters import check_base, load_adapter
from .depth import cut
from .folder import check_index

_T5 = ("t5", "mt5", "umt5")  # of these the encoder alone is loaded


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a `load`'s arguments those that say where on the Hub, and in its cache, a file is."""
    names = ("token", "cache_folder", "revision")
    return {name: options.get(name) for name in names} | {"local_files_only": options.get("local_files_only", False)}


def load_model(
    name: str, hub: dict[str, Any], model_kwargs: dict[str, Any] | None = None, subfolder: str = "",
    tokenizer_kwargs: dict[str, Any] | None = None, config_kwargs: dict[str, Any] | None = None,
    expected: str | None = None, depth: int | None = None,
) -> tuple[nn.Module, Any]:  # fmt: skip
    """A bare model in evaluation mode, in the dtype it was saved in, with its adapter if it has one; its tokenizer.

    Args:
        model_kwargs: of `AutoModel.from_pretrained`; "base" replaces the base model that an adapter names.
        expected: the fingerprint of the base model that an adapter needs. depth: layers to keep, None for all.
    """
    hub = {("cache_dir" if key == "cache_folder" else key): value for key, value in hub.items()}
    options: dict[str, Any] = {"dtype": "auto", **(model_kwargs or {})}
    base = options.pop("base", None)
    shared = {key: hub[key] for key in ("token", "cache_dir", "local_files_only")}
    adapter = find_adapter_config_file(name, revision=hub["revision"], subfolder=subfolder, **shared)
    place: dict[str, Any] = {**hub, "subfolder": subfolder}
    source = name
    if adapter is not None:
        saved = read_json(adapter)
        source = base or check(str, saved.get("base_model_name_or_path"), f"{adapter}.base_model_name_or_path")
        if not Path(source).is_dir() and (Path(source).is_absolute() or str(source).count("/") > 1):
            raise FileNotFoundError(
                f"{name} is an adapter for the base model at {source}, which is not there; pass base= with its folder "
                "or name to mlpool.load"
            )
        revision = None if base else saved.get("revision")
        place = {**shared, "revision": revision, "trust_remote_code": hub["trust_remote_code"]}
    if Path(source).is_dir():
        source = str(Path(source).resolve())  # which an adapter records as its base
    check_index(Path(source) / place.get("subfolder", ""))
    try:
        config = AutoConfig.from_pretrained(source, **place, **(config_kwargs or {}))
        if config_kwargs:
            options["config"] = config
        if (stored := getattr(config, "quantization_config", None)) is not None:
            require_package(stored)
            if options.pop("quantization_config", None) is not None and adapter is None:
                raise ValueError(f"{name} is quantised already: leave quantization out")
        kind: Any = AutoModelForTextEncoding if config.model_type in _T5 else AutoModel
        model = kind.from_pretrained(source, **place, **options)
        prepare_layers(model)
    except Exception as error:
        if damaged := _unreadable(Path(source) / place.get("subfolder", "")):
            raise ValueError(f"{damaged} cannot be read, is it cut short? ({error})") from error
        raise
    if not Path(source).is_dir():
        held = {key: place.get(key) for key in ("cache_dir", "token", "local_files_only", "revision")}
        config_file = cached_file(source, "config.json", subfolder=place.get("subfolder", ""), **held)
        model.config._commit_hash = extract_commit_hash(config_file, None)  # for `add_lora`; not saved
    if depth is not None:
        cut(model, depth)  # an adapter and its fingerprint are of the cut model
    if adapter is not None:
        check_base(model, expected, str(source), name)
        load_adapter(model, name, {**shared, "revision": hub["revision"], "subfolder": subfolder})
    if faults := broken_weights(model):
        raise ValueError(
            f"{name} cannot be used: {some(faults, 3, '; ')}; take an earlier checkpoint, or copy it again"
        )
    tokenizer = AutoTokenizer.from_pretrained(name, **hub, subfolder=subfolder, **(tokenizer_kwargs or {}))
    return model.eval(), tokenizer


def _unreadable(folder: Path) -> Path | None:
    """The first safetensors file of a folder whose header or length is wrong."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return path
    return None
