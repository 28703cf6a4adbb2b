"""One file of `torch.export`: token ids and mask in, embedding out, for every design; torch alone is needed.

It carries the settings and the tokenizer as text, and how the ids of a text are framed. Loaded again and compared
before it takes its place.
"""

import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mlpool_kernels.chunk import NUM_WEIGHTS, Weights
from mlpool_kernels.rows import NORM_EPS, norm_rows
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoTokenizer

from ..attention import unpack
from ..embedder.embedder import _PROBES, Embedder
from ..embedder.pooler import Pooler
from ..embedder.texts import TextTokenizer
from ..pooling.trainable import TrainablePool
from .checked import SETTINGS, agreement, check_mergeable, settings

_TRACED = ("eager", "sdpa")
_TOKENIZER = "tokenizer/"


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
    check_mergeable(embedder, "file")
    backbone: Any = embedder[0]
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"{backbone.design} is written as one file; give it a name that ends in .pt2, got {path}")
    if path.exists():
        raise FileExistsError(f"{path} is there already; remove it, or choose another name")
    check_traceable(backbone)
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.stem}.saving-{os.getpid()}.pt2")
    try:
        with embedder.undisturbed():
            torch.export.save(trace(embedder, Program), stage, extra_files=_extra_files(embedder))
            error = _verify_program(embedder, load_exported(stage))
        stage.rename(path)
    finally:
        stage.unlink(missing_ok=True)
    return error


def check_traceable(backbone: Any) -> None:
    if backbone.attn_implementation not in _TRACED:
        raise ValueError(
            f"attention by {backbone.attn_implementation} cannot be traced; load with attn_implementation='sdpa'"
        )


class Program(nn.Module):
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

    def features(self, input_ids: Tensor, attention_mask: Tensor, token_mask: Tensor | None = None) -> dict[str, Any]:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_mask is not None:
            features["token_mask"] = token_mask
        return self.pooler(self.backbone(features))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_mask: Tensor | None = None) -> Any:
        self._check_frame(input_ids, attention_mask)
        return self.features(input_ids, attention_mask, token_mask)["sentence_embedding"]


@torch.no_grad()
def trace(
    embedder: Embedder, program: type[Program], inputs: Sequence[str] | None = None
) -> torch.export.ExportedProgram:
    """The program of an embedder, B and T free, of torch's own ops alone; RuntimeError where it cannot be traced.

    Args:
        inputs: the features that it takes; None is all that the embedder makes.
    """
    backbone: Any = embedder[0]
    packing, backbone.packing = backbone.packing, "never"  # how texts are packed depends on their lengths
    unpack(backbone.model)
    embedder.eval()
    texts = ["a", "two words", "and some more"]
    made = backbone.preprocess(texts)
    features = {name: made[name].to(embedder.device) for name in inputs or made}
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=backbone.max_seq_length)}
    try:
        with _Plain():
            return torch.export.export(
                program(embedder), tuple(features.values()), dynamic_shapes=dict.fromkeys(features, axes), strict=False
            )
    except Exception as error:
        raise RuntimeError(f"torch.export cannot trace {type(backbone.model).__name__}: {error}") from error
    finally:
        backbone.packing, backbone._arranged_for = packing, None


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
    w, heads = Weights(*rest[:NUM_WEIGHTS]), rest[NUM_WEIGHTS]
    dtype, latents = w.ff_in_weight.dtype, w.latents
    keys, base = norm_rows(states[0], w.of_keys, dtype)
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
    y_mean = y.mean(1, dtype=wide)
    if base is not None:
        y_mean = base + (y_mean - latents.to(dtype).mean(0, dtype=wide))
    empty = y.new_empty(0)
    return [(a * F.gelu(gate)).mean(1, dtype=wide).to(dtype), y_mean, empty, empty.clone()]


_PLAIN = {torch.ops.mlpool.gather.default: _plain_gather, torch.ops.mlpool.pool.default: _plain_pool}


class _Plain(TorchFunctionMode):
    """While entered, an op of mlpool is what it computes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _extra_files(embedder: Embedder) -> dict[str, str]:
    backbone: Any = embedder[0]
    files = {SETTINGS: json.dumps({**settings(embedder), "device": embedder.device.type})}
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

        Raises: ValueError for an unknown prompt and rows that are no strings.
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
    files = {SETTINGS: ""}
    try:
        program = torch.export.load(path, extra_files=files)
        settings = json.loads(files[SETTINGS])
    except Exception as error:
        raise ValueError(f"{path} is damaged, or was not written by mlpool export ({error})") from error
    if device is not None:
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(device))
    return Exported(program.module(), settings, files, device or settings["device"])


def _read_tokenizer(files: Mapping[str, str]) -> Any:
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
