"""`mlpool.load`: a base model and a design, or a folder that was saved before, as an embedder."""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sentence_transformers import CrossEncoder, SentenceTransformer

from ..attention.check import is_encoder
from ..files import confined, read_json
from ..options import check_place, near
from ..pooling.base import check_choice
from ..pooling.layers import select_layers
from ..quantized import quantization_config
from ..schema import check
from ..trunk import find_layers
from .backbone import PACKING, Backbone
from .base_model import load_model
from .depth import resolve_depth
from .designs import build_pool, find_design
from .embedder import Embedder
from .folder import check_folder
from .pooler import Pooler

_OURS = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in (Backbone, Pooler)}


def load(
    model: str | Path,
    design: str | int | None = None,
    pooler: str | Mapping[str, Any] = "default",
    *,
    layers: Sequence[int] | None = None,
    depth: int | Literal["auto"] = "auto",
    max_seq_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
    append_eos: bool = True,
    include_prompt: bool = True,
    include_bos: bool = True,
    packing: str = "auto",
    sliding_window: str = "keep",
    base: str | Path | None = None,
    quantization: str | Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_folder: str | None = None,
    local_files_only: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Embedder:
    """Make an embedder of a base model, or load a saved one.

        embedder = mlpool.load("Qwen/Qwen3-0.6B-Base", design="multi-layer-bidirectional")
        embedder.encode(["a text", "another"])  # numpy [2, D], unit length
        embedder = mlpool.load("folder-saved-before")

    Args:
        model: a folder or Hub name: a base model, a sentence-transformers model (its transformer is the base), or what
            an embedder saved.
        design: a name of DESIGNS or the paper's number, for a base model.
        pooler: "default", "paper" (the released sizes and equations) or a dict of the pool's arguments. The default of
            multi-layer designs starts at the even mix of all layers on a language model as it was pretrained, to be
            whitened by `Embedder.calibrate` (training does so), and at exactly EOS or mean pooling on an encoder or a
            sentence-transformers model; {"start": "last"} is the latter, whatever the base.
        layers: indices of the layers to read, increasing, for designs that read all.
        depth: how many layers to keep, from the bottom; those above are not computed, trained or saved. "auto": up to
            the highest that is read, so that `layers` implies it. What a cut model's top is: see `depth.py`.
        max_seq_length: tokens, EOS counted. None: what was saved, or the model's own limit.
        prompts: texts put before queries, documents or others, e.g. {"query": "Instruct: ...\\nQuery: "}; stored.
        append_eos: append EOS where the tokenizer does not. include_prompt, include_bos: whether they are pooled.
        packing: run without padding. "auto" where it is at least as fast (a CPU; a GPU in half precision) and the model
            can; "always" or an error; "never". Of a saved embedder "auto" is what was saved.
        sliding_window: see `mlpool.bidirectional`.
        base: the base model of a saved adapter, where it is no longer at the place it was trained from.
        quantization: of a base model's weights, to be trained with LoRA or not at all: "int8" (torchao), "nf4"
            (bitsandbytes) or what transformers takes as `quantization_config`, as a mapping. A saved embedder knows.
        device, dtype, attn_implementation, model_kwargs: as of `AutoModel.from_pretrained`; dtype "auto" is the saved.
        verify: hash every weight file of a saved folder, however large.
        trust_remote_code: for base models whose own code is on the Hub; a saved embedder needs none.

    Raises:
        ValueError: no or an unknown design, a causal design on an encoder, a depth of 0, above the model's or below
            one of `layers`, options that a saved folder has decided, a damaged file (named), another adapter's base.
        FileNotFoundError: no such folder (nearest names) nor Hub model, a missing file (named).
        ModuleNotFoundError: the package of a quantisation is missing (named).
    """
    name = os.path.expanduser(model)
    check_place(name)
    check_folder(name, whole=verify)
    hub: dict[str, Any] = {
        "token": token, "cache_folder": cache_folder, "revision": revision, "local_files_only": local_files_only,
    }  # fmt: skip
    _check_hub(name, hub)
    kwargs: dict[str, Any] = {"dtype": dtype, **(model_kwargs or {})}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if quantization is not None:
        if "quantization_config" in kwargs:
            raise ValueError("quantization and model_kwargs' quantization_config are the same; pass one of them")
        kwargs["quantization_config"] = quantization_config(quantization)
    modules = read_modules(name, hub)
    if modules is not None and is_ours(modules):
        decided = {
            "pooler": pooler != "default", "layers": layers is not None, "depth": depth != "auto",
            "append_eos": not append_eos, "include_prompt": not include_prompt, "include_bos": not include_bos,
            "sliding_window": sliding_window != "keep", "quantization": "quantization_config" in kwargs,
        }  # fmt: skip
        if wrong := [option for option, given in decided.items() if given]:
            raise ValueError(f"{name} is a saved embedder, which has decided {', '.join(wrong)}; leave it out")
        if base is not None:
            kwargs["base"] = str(base)
        settings = _read_json(name, "config_sentence_transformers.json", hub, dict) or {}
        check(dict[str, str], settings.get("prompts") or {}, f"{name}'s prompts")
        embedder: Embedder = Embedder._load_with_module_classes(
            name, _OURS, device=device, prompts=dict(prompts or {}), trust_remote_code=trust_remote_code,
            model_kwargs=kwargs, **hub,
        )  # fmt: skip
        loaded = embedder.backbone
        if design is not None and (asked := find_design(design).name) != loaded.design:
            raise ValueError(f"{name} was saved as {loaded.design}, not as {asked}; leave design out")
        if max_seq_length is not None:
            loaded.max_seq_length = max_seq_length
        if packing != "auto":
            check_choice("packing", packing, PACKING)
            loaded.packing = packing
        embedder.cache_folder = cache_folder
        return embedder
    if base is not None:
        raise ValueError(f"base={str(base)!r} is for saved adapters, and {name} is a base model itself")
    chosen = find_design(design)
    subfolder = "" if modules is None else modules[0]["path"]
    if max_seq_length is None and modules is not None:
        limits = _read_json(name, "sentence_bert_config.json", hub, dict) or {}
        max_seq_length = check(int | None, limits.get("max_seq_length"), f"{name}'s max_seq_length")
    try:
        transformer, tokenizer = load_model(name, {**hub, "trust_remote_code": trust_remote_code}, kwargs, subfolder)
    except OSError as error:
        if Path(name).is_dir():
            raise
        reason = str(error).partition("\n")[0]
        here = f"{name} is no folder here{near(Path(name))}"
        raise FileNotFoundError(f"{here} and no model on the Hub: {reason}") from error
    count = len(find_layers(transformer)[1])
    if layers is not None and chosen.reads_all_layers:
        layers = select_layers(layers, count)  # counted in the whole model, also where the end of it is cut off
    kept = resolve_depth(depth, count, layers if chosen.reads_all_layers else None)
    backbone = Backbone(
        transformer, tokenizer, chosen.name, layers, max_seq_length, append_eos, include_prompt, include_bos, packing,
        sliding_window, pooler.get("skip_tokens", 0) if isinstance(pooler, Mapping) else 0, kept,
    )  # fmt: skip
    backbone.untuned = modules is None and not is_encoder(*find_layers(backbone.model))
    pool = build_pool(chosen, backbone.hidden_size, backbone.num_layers, pooler, layers, backbone.untuned)
    made: Any = OrderedDict(backbone=backbone, pooler=Pooler(pool))
    embedder = Embedder(modules=made, device=device, prompts=dict(prompts or {}), trust_remote_code=trust_remote_code)
    if Path(name).exists():
        embedder.base_name = Path(name).resolve().name
    else:
        embedder.model_card_data.base_model = name
    embedder.cache_folder = cache_folder
    return embedder


def open_model(
    name: str, design: str | None = None, device: str | None = None, dtype: Any = "auto",
    max_seq_length: int | None = None,
) -> Any:  # fmt: skip
    """Whatever embeds texts, for the commands: an embedder, any other SentenceTransformer as it is, or with `design` a
    new embedder on a base model; cut at `max_seq_length` tokens, None for its own limit.

    Raises:
        FileNotFoundError: no such folder. ValueError: a base model without a design, a folder of another design, a
        folder without a model.
    """
    modules = check_model(name)
    if design is None and modules and not is_ours(modules):
        model = SentenceTransformer(name, device=device, model_kwargs={"dtype": dtype})
        if max_seq_length is not None:
            model.max_seq_length = max_seq_length
        return model
    return load(name, design, device=device, dtype=dtype, max_seq_length=max_seq_length)


def check_model(name: str) -> list[dict[str, Any]] | None:
    """The `modules.json` of a model that is to be opened, None for a base model.

    Raises:
        FileNotFoundError: neither here nor on the Hub. ValueError: a folder without a model.
    """
    check_place(name)
    _check_hub(name, {})
    modules = read_modules(name, {})
    if not modules and Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        there = ", ".join(sorted(path.name for path in Path(name).iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{name} holds no model: expected modules.json (an embedder) or config.json (a base model, with --design), "
            f"found {there}"
        )
    return modules


def is_ours(modules: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a `modules.json` is of an embedder that mlpool saved."""
    return any(module["type"] in _OURS for module in modules)


def open_cross_encoder(name: str, device: str | None = None) -> Any:
    """A CrossEncoder of sentence-transformers that gives one score a pair.

    Raises:
        FileNotFoundError: no such folder nor Hub model. ValueError: no model in the folder, or several scores a pair.
    """
    check_place(name)
    _check_hub(name, {})
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} holds no cross-encoder: expected config.json and weights")
    model = CrossEncoder(name, device=device)
    if model.num_labels != 1:
        raise ValueError(f"{name} gives {model.num_labels} scores a pair, expected one, of a reranker")
    return model


def _check_hub(name: str, hub: dict[str, Any]) -> None:
    """Ask the Hub once whether it has a model, where that is neither a folder here nor in the cache.

    Without this each file is asked for, and where there is no network, asked for again for half a minute.

    Raises:
        FileNotFoundError: it has not, or was not asked; the message says which.
    """
    if Path(name).is_dir():
        return
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    cache, revision = hub.get("cache_folder"), hub.get("revision")
    for file in ("config.json", "modules.json", "adapter_config.json"):
        try:
            if isinstance(try_to_load_from_cache(name, file, cache_dir=cache, revision=revision), str):
                return
        except ValueError:  # no name for the Hub
            break
    here = f"{name} is no folder here{near(Path(name))} and no model"
    if hub.get("local_files_only") or constants.HF_HUB_OFFLINE:
        why = "local_files_only" if hub.get("local_files_only") else "HF_HUB_OFFLINE is set"
        raise FileNotFoundError(f"{here} in the Hub's cache; the Hub itself was not asked ({why})")
    try:
        HfApi(token=hub.get("token")).model_info(name, revision=revision, timeout=10)
    except Exception as error:  # what it raises where there is no network is of the library below it
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise FileNotFoundError(f"{here} on the Hub, which was asked ({constants.ENDPOINT}): {reason}") from error


def read_modules(name: str, hub: dict[str, Any]) -> list[dict[str, Any]] | None:
    """`modules.json`, whose paths stay within the folder; None where there is none."""
    modules = _read_json(name, "modules.json", hub, list)
    if modules is None:
        return None
    modules = check(list[dict[str, Any]], modules, f"{name}/modules.json")
    for module in modules:
        if missing := [key for key in ("type", "path", "name") if not isinstance(module.get(key), str)]:
            raise ValueError(f"{name}/modules.json has a module without {missing[0]}, a string; copy the folder again")
        if module["path"] not in ("", "."):
            confined(name, module["path"], Path(name) / "modules.json")
    return modules


def _read_json(name: str, file: str, hub: dict[str, Any], kind: type) -> Any:
    path = Backbone.load_file_path(name, file, **hub)
    return None if path is None else read_json(path, kind)
