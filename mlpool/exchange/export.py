"""Embedders for other programs: a plain sentence-transformers folder, or one file of `torch.export`.

A folder (`export_folder`) holds a Transformer, a Pooling and a Normalize in the classic layout, which
sentence-transformers reads without trust_remote_code and which serving tools (text-embeddings-inference, vLLM,
infinity) know. It has room for the last token or the mean of the last layer, so designs with a trained pooler go into a
file (`export_program`): token ids and mask in, embedding out, torch alone needed.

Both are loaded again and compared with the embedder before they take their place.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mlpool_kernels import Weights
from mlpool_kernels.attend import NORM_EPS, norm_keys
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from ..attention import is_bidirectional, unpack
from ..attention.families import family_of
from ..embedder.adapters import has_adapter
from ..embedder.backbone import Backbone
from ..embedder.designs import DESIGNS, find_design
from ..embedder.embedder import _PROBES, Embedder
from ..embedder.folder import staged
from ..embedder.pooler import Pooler
from ..embedder.texts import TextTokenizer
from ..files import new_place
from ..pooling import EosPool, MeanPool
from ..pooling.base import log_once
from ..pooling.trainable import TrainablePool
from ..taps import find_layers
from . import FORMATS

_CLASSIC = "sentence_transformers.models."  # the names that serving tools look for; every version imports them
_MODES = {"cls_token": None, "mean_tokens": MeanPool, "max_tokens": None, "mean_sqrt_len_tokens": None,
          "weightedmean_tokens": None, "lasttoken": EosPool}  # fmt: skip
_TRACED = ("eager", "sdpa")
_BEHIND_PROMPT = ("the", "how", "a", "In", "Zürich", "1", '"so')
_CONFIG, _TOKENIZER = "embedder.json", "tokenizer/"


def export(embedder: Embedder, path: str | Path, format: str | None = None) -> float:
    """Write an embedder for other programs; see `export_folder` ("st") and `export_program` ("torch").

    Args:
        format: None is "st" for designs without a trainable pooler and "torch" for the others.

    Returns: the largest difference of a coordinate between the embedder and what was written.
    """
    if format not in (None, *FORMATS):
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    design = find_design(embedder[0].design)  # type: ignore[arg-type]
    chosen = format or ("torch" if design.trainable else "st")
    return (export_program if chosen == "torch" else export_folder)(embedder, path)


# --- a plain folder ---------------------------------------------------------------------------------------------------


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
    _check_mergeable(embedder, "folder")
    design = find_design(backbone.design)
    if design.trainable:
        plain = ", ".join(name for name, other in DESIGNS.items() if not other.trainable)
        raise ValueError(
            f"{design.name} has a trained pooler, which a plain folder has no room for (it has for {plain}); export it "
            'as one file: format="torch", --format torch'
        )
    pool: Any = embedder[1].pool
    means = isinstance(pool, MeanPool)  # which tokens are left out matters to a mean, not to the last token
    if means and not backbone.include_bos and backbone.texts.prefix:
        raise ValueError(
            "include_bos=False has no equivalent in a plain folder, whose mean counts every token of the text; export "
            'as one file (format="torch", --format torch), or load and train with include_bos=True'
        )
    path = new_place(path)
    if path.suffix == ".pt2":
        raise ValueError(f"{design.name} is written as a folder, and {path} is named like a file; see --format torch")
    with _undisturbed(embedder), staged(path) as stage:
        tokenizer = _self_contained(backbone.texts)
        tokenizer.model_max_length = backbone.max_seq_length or tokenizer.model_max_length
        backbone.model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        modes = {f"pooling_mode_{name}": kind is type(pool) for name, kind in _MODES.items()}
        include_prompt = backbone.include_prompt or not means
        (stage / "1_Pooling").mkdir()
        _write(stage / "1_Pooling/config.json", {
            "word_embedding_dimension": backbone.hidden_size, **modes, "include_prompt": include_prompt,
        })  # fmt: skip
        modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        _write(stage / "modules.json", [
            {"idx": i, "name": str(i), "path": place, "type": _CLASSIC + kind}
            for i, (place, kind) in enumerate(modules[: 3 if pool.normalize else 2])
        ])  # fmt: skip
        if backbone.max_seq_length is not None:
            _write(stage / "sentence_bert_config.json", {
                "max_seq_length": backbone.max_seq_length, "do_lower_case": False,
            })  # fmt: skip
        _write(
            stage / "config_sentence_transformers.json",
            {**embedder._get_model_config(), "model_type": "SentenceTransformer"},
        )
        again = SentenceTransformer(str(stage), device=str(embedder.device), local_files_only=True)
        error = _verify_folder(embedder, again)
        again._create_model_card(str(stage))
    return error


def _self_contained(texts: TextTokenizer) -> Any:
    """A tokenizer that puts around a text by itself what `texts` puts there; pads on the right."""
    tokenizer = copy.deepcopy(texts.tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if texts._frame()[1] == texts.suffix:
        return tokenizer
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} appends no EOS and is no fast tokenizer, whose file could say so; convert it "
            "to a fast tokenizer, or load with append_eos=False"
        )
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

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
    """The same token ids, also where a text is cut."""
    limit = backbone.max_seq_length
    if again.max_seq_length != limit and limit is not None:
        raise RuntimeError(f"not exported: the limit of {limit} tokens is loaded again as {again.max_seq_length}")
    probes = [*_PROBES, *(["word " * (limit + 1)] if limit is not None else [])]
    ours = [ids.tolist() for ids in backbone.token_ids(probes).ids]
    batch = again.preprocess(probes)
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    theirs = [ids[mask.bool()].tolist() for ids, mask in rows]
    for probe, mine, other in zip(probes, ours, theirs, strict=True):
        if mine != other:
            raise RuntimeError(
                f"not exported: the saved tokenizer gives other tokens for {probe[:40]!r}: {other[:5]} … {other[-3:]}, "
                f"expected {mine[:5]} … {mine[-3:]}"
            )


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


# --- one file ---------------------------------------------------------------------------------------------------------


def export_program(embedder: Embedder, path: str | Path) -> float:
    """Write an embedder as one file of `torch.export`, its tokenizer and settings inside.

        files = {"embedder.json": ""}
        program = torch.export.load("embedder.pt2", extra_files=files).module()  # torch alone
        frame = json.loads(files["embedder.json"])["frame"]                       # {"before": […], "behind": […]}
        embedding = program(input_ids, attention_mask)                            # int64 [B, T] each → [B, D]

    Every text stands between the token ids of `frame`, whatever its tokenizer puts there by itself (a decoder's
    puts no EOS): a row that does not is an error of the program. B and T are free, T up to the limit of tokens.
    Where prompts or BOS are not pooled, a third argument token_mask [B, T] is 0 on them. The weights are of the
    embedder's dtype, and the file runs on the kind of device that it was exported on (`load_exported` moves it).
    The feed-forward of a large pooler is computed in one piece: at the paper's sizes 100 MB a text in float32.

    Args:
        embedder: of any design, without an adapter. path: a new file, named .pt2.

    Returns: the largest difference of a coordinate.

    Raises:
        FileExistsError: the file is there. ValueError: another name, an adapter, an attention backend that cannot be
            traced, a tokenizer of binary files. RuntimeError: the file does not give the same embeddings, or the model
            cannot be traced. Nothing is left behind.
    """
    _check_mergeable(embedder, "file")
    backbone: Any = embedder[0]
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"{backbone.design} is written as one file; give it a name that ends in .pt2, got {path}")
    if path.exists():
        raise FileExistsError(f"{path} is there already; remove it, or choose another name")
    if backbone.attn_implementation not in _TRACED:
        raise ValueError(
            f"attention by {backbone.attn_implementation} cannot be traced; load with attn_implementation='sdpa'"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.stem}.saving-{os.getpid()}.pt2")
    try:
        with _undisturbed(embedder):
            torch.export.save(_trace(embedder), stage, extra_files=_extra_files(embedder))
            error = _verify_program(embedder, load_exported(stage))
        stage.rename(path)
    finally:
        stage.unlink(missing_ok=True)
    return error


class _Program(nn.Module):
    """The embedder as a function of tensors."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        pool: Any = embedder[1].pool
        if isinstance(pool, TrainablePool):
            pool = pool.fold()
            plan = pool._choose(1, pool._plan_keys(None), training=False, cached=True)
            pool._choose = lambda *_, **__: plan  # a choice by the batch's size would tie the program to some sizes
        self.backbone, self.pooler = embedder[0], Pooler(pool)

    def _check_frame(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """An assertion on the device that every row begins and ends as the embedder's texts do."""
        texts: Any = self.backbone.texts
        mask = attention_mask.bool()
        place = torch.arange(mask.shape[1], device=mask.device)
        ends = torch.where(mask, place, 0).amax(1)[:, None] - torch.arange(len(texts.suffix)).flip(0).to(mask.device)
        starts = mask.int().argmax(1)[:, None] + torch.arange(len(texts.prefix), device=mask.device)
        for what, places, frame in (("begin", starts, texts.prefix), ("end", ends, texts.suffix)):
            if frame:
                found = input_ids.gather(1, places.clamp(0, mask.shape[1] - 1))
                right = (found == torch.tensor(frame, device=mask.device)).all(1) | ~mask.any(1)
                torch._assert_async(
                    right.all(),
                    f"a text does not {what} with token {frame}, which this embedder reads around every text: put "
                    "embedder.json's frame around the ids, or tokenize with mlpool.exchange.export.load_exported",
                )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_mask: Tensor | None = None) -> Tensor:
        self._check_frame(input_ids, attention_mask)
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_mask is not None:
            features["token_mask"] = token_mask
        return self.pooler(self.backbone(features))["sentence_embedding"]


@torch.no_grad()
def _trace(embedder: Embedder) -> torch.export.ExportedProgram:
    backbone: Any = embedder[0]
    packing, backbone.packing = backbone.packing, "never"  # how texts are packed depends on their lengths
    unpack(backbone.model)
    embedder.eval()
    texts = ["a", "two words", "and some more"]
    features = {name: tensor.to(embedder.device) for name, tensor in backbone.preprocess(texts).items()}
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=backbone.max_seq_length)}
    try:
        program = torch.export.export(
            _Program(embedder), tuple(features.values()), dynamic_shapes=dict.fromkeys(features, axes), strict=False
        )
    except Exception as error:
        raise RuntimeError(f"torch.export cannot trace {type(backbone.model).__name__}: {error}") from error
    finally:
        backbone.packing, backbone._arranged_for = packing, None
    return program.run_decompositions(_PLAIN)


# Without mlpool there are no ops of mlpool: what they compute, in torch's own, without its blocks and in-place steps,
# which depend on the size of the batch.


def _plain_gather(states, starts, ends, last, count, keep, mean, backend, unit=False) -> Tensor:
    if not mean:
        return torch.stack([state.flatten(0, 1)[last] for state in states], 1)
    kept = keep.view(states[0].shape[:2])[:, :, None]
    dtype, wide = states[0].dtype, torch.promote_types(states[0].dtype, torch.float32)
    if unit:  # a token of zeros stays zero
        states = [F.normalize(state.to(wide), dim=-1, eps=torch.finfo(wide).tiny) for state in states]
    sums = torch.stack([torch.where(kept, state, 0).sum(1, dtype=wide) for state in states], 1)
    return (sums / count[:, None, None]).to(dtype)


def _plain_pool(states, rows, key_mask, *rest) -> list[Tensor]:
    """Of a folded pool: queries are absorbed (None for a single key), values with Wo or absorbed too."""
    w, heads = Weights(*rest[:12]), rest[12]
    dtype, latents = w.ff_in_weight.dtype, w.latents
    keys = norm_keys(states[0], w.layer_weights, w.key_norm_weight, w.key_norm_bias, dtype)
    values = (keys @ w.value_weight.T).unflatten(2, (heads, -1))
    if w.output_weight is not None:
        values = torch.einsum("bnhi,dhi->bnhd", values, w.output_weight.unflatten(1, (heads, -1)))
    if w.queries is None:
        mixed = values.sum((1, 2))[:, None]
    else:
        scores = keys @ w.queries.T
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, :, None], float("-inf"))
        mixed = torch.einsum("bnhr,bnhd->brd", scores.softmax(1).unflatten(2, (heads, -1)), values)
    y = mixed + latents.to(dtype)
    normed = F.layer_norm(y, y.shape[-1:], w.ff_norm_weight.to(dtype), w.ff_norm_bias.to(dtype), NORM_EPS)
    a, gate = F.linear(normed, w.ff_in_weight, w.ff_in_bias.to(dtype)).chunk(2, -1)
    wide = torch.promote_types(dtype, torch.float32)
    empty = y.new_empty(0)
    return [(a * F.gelu(gate)).mean(1, dtype=wide), y.mean(1, dtype=wide), empty, empty.clone()]


_PLAIN = {torch.ops.mlpool.gather.default: _plain_gather, torch.ops.mlpool.pool.default: _plain_pool}


def _extra_files(embedder: Embedder) -> dict[str, str]:
    """The settings and the tokenizer's files, as text."""
    from ..version import __version__

    backbone: Any = embedder[0]
    kept = ("design", "max_seq_length", "append_eos", "include_prompt", "include_bos")
    settings = {
        "mlpool": __version__, **{name: getattr(backbone, name) for name in kept}, "prompts": embedder.prompts,
        "frame": {"before": backbone.texts.prefix, "behind": backbone.texts.suffix},
        "default_prompt_name": embedder.default_prompt_name, "dimension": embedder.get_embedding_dimension(),
        "vocabulary": backbone.model.get_input_embeddings().weight.shape[0], "device": embedder.device.type,
    }  # fmt: skip
    files = {_CONFIG: json.dumps(settings)}
    with tempfile.TemporaryDirectory() as folder:
        backbone.tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            try:
                files[_TOKENIZER + file.name] = file.read_text(encoding="utf8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{type(backbone.tokenizer).__name__} keeps {file.name}, which is no text, and a file of "
                    "torch.export holds texts; convert it to a fast tokenizer"
                ) from error
    return files


@dataclass
class Exported:
    """A file of `export_program`, loaded: a function of token ids, with its tokenizer.

        exported = load_exported("embedder.pt2")
        exported(*exported.tokenize(["a text", "another"]))  # [B, D]

    Attributes: program: the traced module. settings: design, max_seq_length, prompts and the like.
    """

    program: nn.Module
    settings: dict[str, Any]
    files: dict[str, str]
    device: torch.device | str
    _texts: TextTokenizer | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor, *token_mask: Tensor) -> Tensor:
        """int64 [B, T] each, token_mask only where prompts or BOS are not pooled → embedding [B, D]."""
        return self.program(input_ids, attention_mask, *token_mask)

    def tokenize(self, texts: Sequence[str], prompt_name: str | None = None) -> tuple[Tensor, ...]:
        """What the call takes: texts framed, with EOS once, cut at max_seq_length, padded on the right.

        Args:
            prompt_name: one of settings["prompts"]; None is the embedder's default.

        Raises: ModuleNotFoundError without transformers; ValueError for an unknown prompt and rows that are no strings.
        """
        s = self.settings
        prompt_name = prompt_name or s["default_prompt_name"]
        if prompt_name is not None and prompt_name not in s["prompts"]:
            raise ValueError(f"there is no prompt {prompt_name!r}; there are {', '.join(s['prompts']) or 'none'}")
        if self._texts is None:
            tokenizer = _read_tokenizer(self.files)
            frame = (s["append_eos"], s["include_prompt"], s["include_bos"], s["vocabulary"])
            self._texts = TextTokenizer(tokenizer, *frame)
        tokens = self._texts(texts, s["prompts"].get(prompt_name), s["max_seq_length"])
        features = tokens.padded(range(len(tokens.ids)), self._texts.pad)
        return tuple(tensor.to(self.device) for tensor in features.values())


def load_exported(path: str | Path, device: torch.device | str | None = None) -> Exported:
    """Load what `export_program` wrote.

    Args:
        device: None is the one it was exported on.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, or no file of `export_program`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; expected one that mlpool export wrote")
    files = {_CONFIG: ""}
    try:
        program = torch.export.load(path, extra_files=files)
        settings = json.loads(files[_CONFIG])
    except Exception as error:
        raise ValueError(f"{path} is damaged, or was not written by mlpool export ({error})") from error
    if device is not None:
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(device))
    return Exported(program.module(), settings, files, device or settings["device"])


def _read_tokenizer(files: Mapping[str, str]) -> Any:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tokenizing needs transformers: pip install 'mlpool[st]'") from error
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            if name.startswith(_TOKENIZER):
                (Path(folder) / name.removeprefix(_TOKENIZER)).write_text(text, encoding="utf8")
        return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def _verify_program(embedder: Embedder, exported: Exported) -> float:
    nodes: Any = exported.program.graph.nodes  # type: ignore[union-attr]
    if foreign := {str(node.target) for node in nodes if "mlpool" in str(node.target)}:
        raise RuntimeError(f"not exported: the traced model still calls {', '.join(sorted(foreign))}")
    worst = 0.0
    for batch, name in [(_PROBES, None), (("a",), None), *((_PROBES, name) for name in embedder.prompts)]:
        embed = functools.partial(embedder.encode, list(batch), prompt_name=name, convert_to_tensor=True)
        theirs = exported(*exported.tokenize(batch, name))
        worst = max(worst, agreement(embedder, theirs, embed, "not exported: the embeddings of the file differ"))
    return worst


# --- shared -----------------------------------------------------------------------------------------------------------


@contextmanager
def _undisturbed(embedder: Embedder) -> Iterator[None]:
    """Afterwards training modes and the count of cut texts are as before."""
    backbone: Any = embedder[0]
    training, cut = [module for module in embedder.modules() if module.training], backbone.truncated
    try:
        yield
    finally:
        backbone.texts.truncated = cut
        for module in training:
            module.training = True


def agreement(embedder: Embedder, theirs: Tensor, embed: Callable[[], Tensor], failure: str) -> float:
    """The largest difference of a coordinate; RuntimeError (`failure`) where it is more than rounding.

    Args:
        theirs: embeddings [B, D] to be judged. embed: those of the embedder, see `Embedder.disagreement`.
    """
    error, limit = embedder.disagreement(embed(), theirs, embed)
    if not error <= limit:
        raise RuntimeError(f"{failure} by {error:.1e} (at most {limit:.1e} is rounding in {embedder.dtype})")
    return error


def _check_mergeable(embedder: Embedder, what: str) -> None:
    if has_adapter(embedder[0].model):  # type: ignore[arg-type]
        raise ValueError(f"the {what} holds full weights, and this embedder has an adapter; call merge(embedder) first")


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")
