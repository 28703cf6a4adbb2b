"""A plain sentence-transformers folder: a Transformer, a Pooling and a Normalize in the classic layout.

sentence-transformers reads it without trust_remote_code, and serving tools (text-embeddings-inference, vLLM, infinity)
know it. It has room for the last token or the mean of the last layer. Loaded again and compared before it takes its
place.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ..attention import is_bidirectional
from ..attention.families import family_of
from ..embedder.backbone import Backbone
from ..embedder.designs import DESIGNS, find_design
from ..embedder.embedder import _PROBES, Embedder
from ..embedder.folder import staged
from ..files import new_place, write_json
from ..pooling import EosPool, MeanPool
from ..pooling.base import log_once
from ..trunk import find_layers
from .checked import agreement, check_mergeable, compare_tokens

_CLASSIC = "sentence_transformers.models."  # the names that serving tools look for; every version imports them
_MODES = {"cls_token": None, "mean_tokens": MeanPool, "max_tokens": None, "mean_sqrt_len_tokens": None,
          "weightedmean_tokens": None, "lasttoken": EosPool}  # fmt: skip
_BEHIND_PROMPT = ("the", "how", "a", "In", "Zürich", "1", '"so')


def export_folder(embedder: Embedder, path: str | Path) -> float:
    """Write a folder that plain `SentenceTransformer(path)` and serving tools read.

    The tokenizer appends EOS itself and pads on the right; a bidirectional model says so in its config; dtype, limit of
    tokens and prompts are kept. EOS written out at the end of a text is one more token there, here it is not.

    Args:
        embedder: of a design without a trainable pooler, without an adapter.
        path: a folder that is new or empty.

    Returns: the largest difference of a coordinate, over texts with and without prompts, padded and alone.

    Raises:
        FileExistsError: the folder holds something. ValueError: a trainable pooler, an adapter, include_bos=False or a
            tokenizer that such a folder cannot express, a family that is bidirectional only while patched.
        RuntimeError: the folder does not give the same tokens or embeddings. Nothing is left behind.
    """
    backbone: Any = embedder[0]
    check_mergeable(embedder, "folder")
    design = find_design(backbone.design)
    if design.trainable:
        plain = ", ".join(name for name, other in DESIGNS.items() if not other.trainable)
        raise ValueError(
            f"{design.name} has a trained pooler, which a plain folder has no room for (it has for {plain}); export it "
            'as one file: format="torch", --format torch'
        )
    pool: Any = embedder[1].pool
    if isinstance(pool, MeanPool) and not backbone.include_bos and backbone.texts.prefix:
        raise ValueError(
            "include_bos=False has no equivalent in a plain folder, whose mean counts every token of the text; export "
            'as one file (format="torch", --format torch), or load and train with include_bos=True'
        )
    path = new_place(path)
    if path.suffix == ".pt2":
        raise ValueError(f"{design.name} is written as a folder, and {path} is named like a file; see --format torch")
    with embedder.undisturbed(), staged(path) as stage:
        backbone.model.save_pretrained(stage)
        self_contained(backbone).save_pretrained(stage)
        write_modules(embedder, stage)
        again = SentenceTransformer(str(stage), device=str(embedder.device), local_files_only=True)
        error = _verify_folder(embedder, again)
        again._create_model_card(str(stage))
    return error


def write_modules(embedder: Embedder, folder: Path) -> None:
    """What stands around a transformer of a design without a trainable pooler: pooling, limit of tokens, prompts."""
    backbone: Any = embedder[0]
    pool: Any = embedder[1].pool
    modes = {f"pooling_mode_{name}": kind is type(pool) for name, kind in _MODES.items()}
    # Which tokens are left out matters to a mean, not to the last token.
    include_prompt = backbone.include_prompt or not isinstance(pool, MeanPool)
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling/config.json", {
        "word_embedding_dimension": backbone.hidden_size, **modes, "include_prompt": include_prompt,
    })  # fmt: skip
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_json(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": place, "type": _CLASSIC + kind}
        for i, (place, kind) in enumerate(modules[: 3 if pool.normalize else 2])
    ])  # fmt: skip
    if backbone.max_seq_length is not None:
        write_json(folder / "sentence_bert_config.json", {
            "max_seq_length": backbone.max_seq_length, "do_lower_case": False,
        })  # fmt: skip
    write_json(
        folder / "config_sentence_transformers.json",
        {**embedder._get_model_config(), "model_type": "SentenceTransformer"},
    )


def self_contained(backbone: Backbone) -> Any:
    """A tokenizer that puts around a text by itself what the backbone reads there, and cuts; pads on the right."""
    texts = backbone.texts
    tokenizer = copy.deepcopy(texts.tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = backbone.max_seq_length or tokenizer.model_max_length
    if texts._frame()[1] == texts.suffix:
        return tokenizer
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} appends no EOS and is no fast tokenizer, whose file could say so; convert it "
            "to a fast tokenizer, or load with append_eos=False"
        )
    before, behind = (tokenizer.convert_ids_to_tokens(ids) for ids in (texts.prefix, texts.suffix))
    backend = tokenizer.backend_tokenizer
    # In place of the one that was there, of which two in a row do not work. Offsets may change, the tokens do not.
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *behind],
        special_tokens=list({*zip(before + behind, texts.prefix + texts.suffix, strict=True)}),
    )
    # Of the general class, since a family's own may build its post-processor anew whenever it is loaded.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=tokenizer.model_max_length, padding_side="right",
        truncation_side="right", model_input_names=tokenizer.model_input_names,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces, **tokenizer.special_tokens_map,
    )  # fmt: skip


@torch.no_grad()
def _verify_folder(embedder: Embedder, again: SentenceTransformer) -> float:
    backbone: Any = embedder[0]
    trunk: Any = find_layers(backbone.model)[0]
    name, family = trunk.config.model_type, family_of(trunk.config)
    wanted = find_design(backbone.design).attention == "bidirectional"
    if is_bidirectional(again[0].model) != wanted:  # type: ignore[arg-type]
        raise ValueError(
            f"{name} is {'bidirectional' if wanted else 'causal'} only as mlpool patches it; loaded without mlpool it "
            'is not, so a plain folder cannot hold it. Export it as one file (format="torch", --format torch)'
        )
    if family.text_positions:
        log_once(f"{name} counts positions from the start of the row: serve the exported folder without left padding")
    _compare_tokens(backbone, again)
    for prompt in filter(None, embedder.prompts.values()):
        _compare_prompt(backbone, again, prompt)
    batches: list[tuple[list[str], str]] = [(list(_PROBES), ""), (list(_PROBES[:1]), "")]
    batches += [(list(_PROBES), prompt) for prompt in embedder.prompts.values() if prompt]
    worst = 0.0
    for batch, prompt in batches:
        embed = functools.partial(embedder.encode, batch, prompt=prompt, convert_to_tensor=True)
        theirs = again.encode(batch, prompt=prompt, convert_to_tensor=True)
        failure = f"not exported: loaded by sentence-transformers, embeddings with the prompt {prompt!r} differ"
        worst = max(worst, agreement(embedder, theirs, embed, failure))
    return worst


def _compare_tokens(backbone: Backbone, again: SentenceTransformer) -> None:
    limit = backbone.max_seq_length
    if again.max_seq_length != limit and limit is not None:
        raise RuntimeError(f"not exported: the limit of {limit} tokens is loaded again as {again.max_seq_length}")

    def tokenize(probes: list[str]) -> list[list[int]]:
        batch = again.preprocess(probes)
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        return [ids[mask.bool()].tolist() for ids, mask in rows]

    compare_tokens(backbone, tokenize)


def _compare_prompt(backbone: Backbone, again: SentenceTransformer, prompt: str) -> None:
    """Where prompts are not pooled: as many tokens are left out, whatever text follows."""
    ours = backbone.token_ids(_BEHIND_PROMPT, prompt).skipped
    if ours is None or again[1].include_prompt:
        return
    theirs = again.preprocess(list(_BEHIND_PROMPT), prompt=prompt)["prompt_length"]
    if any(count != theirs for count in ours):
        raise ValueError(
            "sentence-transformers counts a prompt's tokens without the text behind it, so a prompt that is not pooled "
            f"must end where a token ends: {prompt!r} is {theirs} tokens by itself and {sorted(set(ours))} before "
            "texts; take the space from its end"
        )
