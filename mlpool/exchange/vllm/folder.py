"""`export_vllm`: an embedder as a folder that `vllm serve OUT --runner pooling` runs, with mlpool as a plugin.

It is a saved embedder, which `mlpool.load` reads as before, in which config.json names the plugin's architecture and
says what it has to know, and the tokenizer puts EOS behind a text by itself.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ...attention.families import window_of
from ...embedder.designs import find_design
from ...embedder.embedder import Embedder
from ...embedder.folder import staged
from ...embedder.saved import reload
from ...files import new_place, read_json, write_json
from ...pooling import EosPool
from ...pooling.base import log_once
from ...trunk import find_layers
from ...version import __version__
from ..checked import agreement, check_mergeable, compare_tokens
from ..folder import self_contained
from . import ARCHITECTURE, FAMILIES, FORMAT, SECTION

_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles vLLM and transformers compute alike


def export_vllm(embedder: Embedder, path: str | Path) -> float:
    """Write a folder for vLLM, with this package installed beside it; `vllm serve PATH --runner pooling`.

    Args:
        embedder: of a family that the plugin knows, without an adapter.
        path: a folder that is new or empty.

    Returns: the largest difference of a coordinate between the embedder and the folder, loaded again by mlpool.

    Raises:
        FileExistsError: the folder holds something. ValueError: an adapter, quantised weights, another family, and
            settings that vLLM has no equivalent of (named). RuntimeError: the folder does not give the same tokens or
            embeddings. Nothing is left behind.
    """
    backbone: Any = embedder[0]
    check_mergeable(embedder, "folder")
    config = find_layers(backbone.model)[0].config
    if backbone.max_seq_length is None:
        raise ValueError("vLLM needs a limit of tokens, and this embedder has none; set embedder.max_seq_length")
    _check_family(embedder, config)
    path = new_place(path)
    if path.suffix == ".pt2":
        raise ValueError(f"for vLLM a folder is written, and {path} is named like a file; see --format torch")
    with embedder.undisturbed(), staged(path) as stage:
        embedder.save(stage, verify=False)  # which `_verify` does, when all is written
        self_contained(backbone).save_pretrained(stage)
        made = read_json(stage / "config.json")
        # Without the second vLLM refuses every request of fewer `dimensions`.
        made |= {"architectures": [ARCHITECTURE], "is_matryoshka": True, SECTION: _section(embedder, stage)}
        if (window := window_of(config)) is not None and window >= backbone.max_seq_length:
            # No text reaches its end. vLLM takes no mixture of layers with and without one from some families.
            without: dict[str, Any] = {
                "sliding_window": None, "use_sliding_window": False,
                "layer_types": ["full_attention"] * backbone.num_layers,
            }  # fmt: skip
            made |= {name: value for name, value in without.items() if name in made}
        write_json(stage / "config.json", made)
        write_json(stage / "sentence_bert_config.json", {  # where vLLM looks for the limit
            "max_seq_length": backbone.max_seq_length, "do_lower_case": False,
        })  # fmt: skip
        error = _verify(embedder, stage)
    if embedder.default_prompt_name is not None:
        log_once(
            f"texts have the prompt {embedder.default_prompt_name!r} by default here; to a server it is sent as the "
            f"start of each text: {embedder.prompts.get(embedder.default_prompt_name)!r}"
        )
    return error


def _check_family(embedder: Embedder, config: Any) -> None:
    backbone: Any = embedder[0]
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"mlpool's plugin for vLLM serves {', '.join(FAMILIES)}, and this is a {config.model_type}; export it as "
            "one file (--format torch), or as a plain folder (--format st) where its design has no trained pooler"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE:
        raise ValueError(f"the plugin knows the positions {', '.join(_ROPE)}, and this {config.model_type} has {rope}")
    window, limit = window_of(config), backbone.max_seq_length
    bidirectional = find_design(backbone.design).attention == "bidirectional"
    if window is not None and window < limit and (bidirectional or config.model_type != "mistral"):
        raise ValueError(
            f"layers of this {config.model_type} see a window of {window} tokens, which vLLM does not count as "
            f"transformers does; set embedder.max_seq_length to at most {window}, it is {limit}"
        )
    if not backbone.include_prompt and not isinstance(embedder[1].pool, EosPool):
        raise ValueError(
            "include_prompt=False leaves the prompt's tokens out of the mean, and to a server both are one text; "
            "train with include_prompt=True, or serve in Python"
        )


def _section(embedder: Embedder, stage: Path) -> dict[str, Any]:
    """What the plugin has to know."""
    backbone: Any = embedder[0]
    pool: Any = embedder[1].pool
    design = find_design(backbone.design)
    layers = range(backbone.num_layers) if backbone.layers is None else backbone.layers
    before = 0 if backbone.include_bos else len(backbone.texts.prefix)
    means = design.token_pooling != "last"
    return {
        "format": FORMAT, "version": __version__, "design": design.name, "token_pooling": design.token_pooling,
        "layers": [layer % backbone.num_layers for layer in layers] if design.reads_all_layers else [],
        "final_norm": backbone.reads_final_norm,
        "skip_tokens": max(before, backbone.skip_tokens, getattr(pool, "skip_tokens", 0)) if means else 0,
        "truncate_dim": embedder.truncate_dim,
        "pool": next(module["path"] for module in read_json(stage / "modules.json", list) if module["idx"] == 1),
    }  # fmt: skip


@torch.no_grad()
def _verify(embedder: Embedder, stage: Path) -> float:
    """The folder's own tokenizer and the embeddings of the folder, loaded again."""
    tokenizer = AutoTokenizer.from_pretrained(stage)
    compare_tokens(embedder[0], lambda probes: tokenizer(probes, truncation=True).input_ids)  # type: ignore[arg-type]
    again = reload(embedder, stage)
    return agreement(embedder, again._probe(), embedder._probe, "not exported: the folder's embeddings differ")
