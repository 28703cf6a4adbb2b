"""A folder for ONNX Runtime, of every design: onnxruntime and tokenizers alone run it.

The graph is made of the traced program, see program.py. The tokenizer frames, cuts and pads a text by itself. A design
without a trainable pooler gives the last hidden states too, and its folder is one of sentence-transformers, whose ONNX
backend reads it. Run by ONNX Runtime and compared before it takes its place.
"""

import functools
import inspect
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..embedder.designs import find_design
from ..embedder.embedder import _PROBES, Embedder
from ..embedder.folder import staged
from ..files import check_room, new_place, parse_json, write_json, write_text
from .checked import SETTINGS, agreement, check_mergeable, compare_tokens, settings
from .folder import self_contained, write_modules
from .program import Program, check_traceable, trace

GRAPH = "onnx/model.onnx"  # where sentence-transformers looks for it
_INPUTS = ["input_ids", "attention_mask", "token_mask"]
_OUTPUTS = ["sentence_embedding", "last_hidden_state"]
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INLINE = 2**31 - 2**24  # bytes of weights in the graph's own file, which cannot be of 2 GiB
_DTYPES = (torch.float32, torch.float16)  # in which onnxruntime computes on every device


def require_onnx() -> None:
    """ModuleNotFoundError where the extra `onnx` is not installed."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ModuleNotFoundError(f"ONNX needs {', '.join(missing)}: pip install 'mlpool[onnx]'", name=missing[0])


def export_onnx(embedder: Embedder, path: str | Path) -> float:
    """Write a folder for ONNX Runtime: `onnx/model.onnx`, tokenizer, `embedder.json` (prompts) and how to use them.

    The graph takes int64 input_ids and attention_mask [B, T], B and T free, T up to the limit of tokens, and gives
    sentence_embedding [B, D]; of a design without a trainable pooler also last_hidden_state [B, T, D]. Where prompts or
    BOS are not pooled it takes token_mask [B, T] too, see `token_mask`. Weights of 2 GiB and more are in a file beside
    the graph. EOS written out at the end of a text is one more token there, with mlpool it is not.

    Args:
        embedder: of any design, in float32 or float16, without an adapter. path: a folder that is new or empty.

    Returns: the largest difference of a coordinate, over texts with and without prompts, padded and alone.

    Raises:
        FileExistsError: the folder holds something. ModuleNotFoundError: no onnx. OSError: no room for the weights.
        ValueError: an adapter, another dtype, a slow tokenizer, an attention backend that cannot be traced.
        RuntimeError: the model cannot be traced or written as ONNX, or the folder does not give the same tokens or
            embeddings. Nothing is left behind.
    """
    require_onnx()
    check_mergeable(embedder, "ONNX folder")
    backbone: Any = embedder[0]
    check_traceable(backbone)
    path = new_place(path)
    if path.suffix in (".onnx", ".pt2"):
        raise ValueError(f"ONNX is written as a folder, graph and tokenizer, and {path} is named like a file")
    if other := {parameter.dtype for parameter in embedder.parameters()} - set(_DTYPES):
        raise ValueError(
            f"ONNX is written in float32 or float16, and this embedder has weights in {', '.join(map(str, other))}; "
            'load it with model_kwargs={"dtype": "float32"} (--dtype float32)'
        )
    if not backbone.tokenizer.is_fast:
        raise ValueError(
            f"{type(backbone.tokenizer).__name__} is no fast tokenizer, which alone the library tokenizers reads; "
            "convert it to a fast tokenizer"
        )
    with embedder.undisturbed(), staged(path) as stage:
        _write_tokenizer(backbone, stage)
        write_json(stage / SETTINGS, settings(embedder))
        masked = _is_masked(backbone)
        plain = not (masked or find_design(backbone.design).trainable)
        if plain:
            backbone.model.config.save_pretrained(stage)
            write_modules(embedder, stage)
        _write_graph(embedder, stage, masked, plain)
        try:
            error = _verify(embedder, stage, masked)
        except Exception as failure:
            if type(failure).__module__.startswith("onnxruntime"):
                raise RuntimeError(f"not exported: onnxruntime cannot run {_family(backbone)}: {failure}") from failure
            raise
        write_text(stage / "README.md", _readme(embedder, path.resolve().name, masked, plain))
    return error


def _is_masked(backbone: Any) -> bool:
    """Whether some tokens are not pooled; which matters to a mean, not to the last token."""
    all_pooled = backbone.include_prompt and (backbone.include_bos or not backbone.texts.prefix)
    return not all_pooled and find_design(backbone.design).token_pooling == "mean"


def _write_tokenizer(backbone: Any, folder: Path) -> None:
    tokenizer = self_contained(backbone)
    backend, pad = tokenizer.backend_tokenizer, backbone.texts.pad
    backend.enable_padding(pad_id=pad, pad_token=tokenizer.convert_ids_to_tokens(pad))
    if backbone.max_seq_length is not None:
        backend.enable_truncation(backbone.max_seq_length)
    tokenizer.save_pretrained(folder)
    # The name of the general class that every version of transformers knows: sentence-transformers' ONNX backend wants
    # version 4, and a family's own class would build the post-processor anew.
    config = folder / "tokenizer_config.json"
    write_json(config, parse_json(config.read_bytes(), str(config)) | {"tokenizer_class": "PreTrainedTokenizerFast"})


# --- the graph --------------------------------------------------------------------------------------------------------


class _Graph(Program):
    """Embedding, and last hidden states too; no assertion of a frame, which ONNX cannot say: the tokenizer puts it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_mask: Tensor | None = None) -> Any:
        features = self.features(input_ids, attention_mask, token_mask)
        return features["sentence_embedding"], features["token_embeddings"]


class _EmbeddingAlone(_Graph):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_mask: Tensor | None = None) -> Any:
        return super().forward(input_ids, attention_mask, token_mask)[:1]


def _write_graph(embedder: Embedder, folder: Path, masked: bool, plain: bool) -> None:
    inputs = _INPUTS[: 3 if masked else 2]
    traced = trace(embedder, _Graph if plain else _EmbeddingAlone, inputs)
    # It misses torchvision, which nothing here needs.
    chatty = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own trees
            # All inputs share their axes, as is meant.
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            program: Any = torch.onnx.export(
                traced, input_names=inputs, output_names=_OUTPUTS[: 2 if plain else 1], verbose=False,
                dynamic_shapes={name: {0: "batch", 1: "length"} for name in inputs},
            )  # fmt: skip
    except Exception as error:
        raise RuntimeError(
            f"{_family(embedder[0])} cannot be written as ONNX: {_cause(error)}; one file of torch.export may hold it "
            '(format="torch", --to torch)'
        ) from error
    finally:
        chatty.setLevel(level)
    for node in program.model.graph.all_nodes():  # where in the sources of this machine each came from
        node.metadata_props.clear()
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    check_room(folder, size, "the weights of the ONNX graph; choose another place, or --dtype float16")
    (folder / GRAPH).parent.mkdir()
    program.save(folder / GRAPH, external_data=size > _INLINE)


def _family(backbone: Any) -> str:
    return f"{backbone.model.config.model_type} ({type(backbone.model).__name__})"


def _cause(error: BaseException) -> str:
    """What was wrong in the first place; around it torch wraps pages on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --- as its reader ----------------------------------------------------------------------------------------------------


def token_mask(rows, prompt, before, include_prompt, include_bos):
    """0 on the tokens of a row that are read and not pooled: what stands before a text, and its prompt.

    Args: rows: of tokenizers' encode_batch. before: how many tokens. include_prompt, include_bos: of embedder.json.
    """
    masks = []
    for row in rows:
        ends = [end for (_, end), special in zip(row.offsets, row.special_tokens_mask, strict=True) if not special]
        inside = sum(end <= len(prompt) for end in ends) if prompt and not include_prompt else 0
        unread = before + inside if inside else 0 if include_bos else before
        unread = min(unread, sum(row.attention_mask) - 1)  # one token always counts
        masks.append([0] * unread + row.attention_mask[unread:])
    return masks


@torch.no_grad()
def _verify(embedder: Embedder, folder: Path, masked: bool) -> float:
    import onnxruntime
    from tokenizers import Tokenizer

    backbone: Any = embedder[0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    compare_tokens(backbone, lambda probes: [tokenizer.encode(probe).ids for probe in probes])
    session = onnxruntime.InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])

    def embed(texts: Sequence[str], prompt: str) -> Tensor:
        rows = tokenizer.encode_batch([prompt + text for text in texts])
        feed = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
        if masked:
            include = (backbone.include_prompt, backbone.include_bos)
            feed["token_mask"] = token_mask(rows, prompt, len(backbone.texts.prefix), *include)
        (embeddings,) = session.run(["sentence_embedding"], feed)
        return torch.as_tensor(embeddings, device=embedder.device)

    batches: list[tuple[Sequence[str], str]] = [(("a",), "")]
    if backbone.texts.prefix or backbone.texts.suffix:
        batches.append((("",), ""))  # one token, or two, where all else is longer
    batches += [(_PROBES, prompt or "") for prompt in {"", *embedder.prompts.values()}]
    worst = 0.0
    for texts, prompt in batches:
        ours = functools.partial(embedder.encode, list(texts), prompt=prompt, convert_to_tensor=True)
        failure = f"not exported: run by onnxruntime, embeddings with the prompt {prompt!r} differ"
        worst = max(worst, agreement(embedder, embed(texts, prompt), ours, failure))
    return worst


_USE = """\
import json

import onnxruntime
from tokenizers import Tokenizer

folder = "{folder}"
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")  # frames, cuts and pads
session = onnxruntime.InferenceSession(folder + "/{graph}")
settings = json.load(open(folder + "/{settings}"))
prompt = settings["prompts"].get("query") or ""
rows = tokenizer.encode_batch([prompt + text for text in ["a text", "another"]])
inputs = {{"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}}
{mask}(embeddings,) = session.run(["sentence_embedding"], inputs)  # [2, {dimension}]
"""
_MASK = """\
inputs["token_mask"] = token_mask(
    rows, prompt, len(settings["frame"]["before"]), settings["include_prompt"], settings["include_bos"]
)
"""


def _readme(embedder: Embedder, name: str, masked: bool, plain: bool) -> str:
    """Which model, and the lines that run it."""
    lines = _USE.format(
        folder=name, graph=GRAPH, settings=SETTINGS, mask=_MASK if masked else "",
        dimension=embedder.get_embedding_dimension(),
    )  # fmt: skip
    code = f"{inspect.getsource(token_mask)}\n\n{lines}" if masked else lines
    prompts = ", ".join(f"{key} ({text!r})" for key, text in embedder.prompts.items() if text) or "none"
    limit = "" if embedder.max_seq_length is None else f" Texts are cut at {embedder.max_seq_length} tokens."
    more = (
        '\nSentence-transformers with optimum-onnx: `SentenceTransformer(folder, backend="onnx")`.\n' if plain else ""
    )
    return (
        f"# {name}\n\nA text-embedding model for ONNX Runtime: {embedder[0].design}, exported by mlpool.{limit} "
        f"Prompts: {prompts}.\n\n    pip install onnxruntime tokenizers\n\n```python\n{code}```\n{more}"
    )
