"""`mlpool merge`, `mlpool export` and `mlpool import-released`: one folder in, another form of it out."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .. import options
from ..files import new_place
from . import FORMATS

if TYPE_CHECKING:
    from ..embedder.embedder import Embedder


def _add_common(parser: argparse.ArgumentParser, folder: str, output: str) -> None:
    parser.add_argument("folder", help=folder)
    parser.add_argument("-o", "--output", required=True, help=output)
    options.add_dtype(parser)
    options.add_device(parser)


def _add_dequantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dequantize", action="store_true", help="turn a quantised base into full weights first")


def _load(args: argparse.Namespace) -> "Embedder":
    """The embedder to work on; where it is and where it goes are checked before anything is imported."""
    new_place(args.output)
    options.check_place(args.folder)
    from ..embedder.loading import load

    return load(args.folder, base=args.base, dtype=args.dtype, device=args.device)


def _merge(embedder: "Embedder", dequantize: bool = False, adapter: bool = True) -> float:
    """Fold the adapter in, or without one only dequantise.

    Returns: the largest difference of a coordinate; an error where it is more than rounding.
    """
    import torch

    from ..embedder import adapters
    from .checked import agreement

    with torch.no_grad():
        before = embedder._probe()
        merged = adapters.merge(embedder, dequantize) if adapter else adapters.dequantize(embedder)
        try:
            return agreement(merged, before, merged._probe, f"merging in {embedder.dtype} changes embeddings")
        except RuntimeError as error:
            raise ValueError(f"{error}, though every weight by itself is merged right") from error


# --- merge ------------------------------------------------------------------------------------------------------------


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, "a saved embedder with a LoRA adapter", "the folder to write, new or empty")
    parser.add_argument("--base", help="the base model, where it is no longer at the place it was trained from")
    _add_dequantize(parser)


def _run_merge(args: argparse.Namespace) -> None:
    embedder = _load(args)
    error = _merge(embedder, args.dequantize)
    embedder.save(args.output)
    print(f"{args.output}: {embedder[0].design}, merged; embeddings agree to {error:.1e}")


# --- export -----------------------------------------------------------------------------------------------------------


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(
        parser, "a saved embedder; an adapter is merged first", "a folder (st, onnx, vllm) or a file named .pt2 (torch)"
    )
    parser.add_argument("--base", help="the base model of an adapter, where it is no longer at its place")
    _add_dequantize(parser)
    parser.add_argument(
        "--to", "--format", dest="format", choices=FORMATS,
        help="st: a plain sentence-transformers folder, the default for EOS and mean pooling; torch: one file of "
        "torch.export, the default for designs with a trained pooler; of any design, onnx: a folder for ONNX Runtime, "
        "in float32 unless --dtype says float16; vllm: a folder for vLLM",
    )  # fmt: skip


def _run_export(args: argparse.Namespace) -> None:
    if args.format == "onnx":
        from .onnx import require_onnx

        require_onnx()
        args.dtype = "float32" if args.dtype == "auto" else args.dtype
    embedder = _load(args)
    from ..embedder.adapters import has_adapter
    from .export import export

    adapter = has_adapter(embedder[0].model)  # type: ignore[arg-type]
    merged = _merge(embedder, args.dequantize, adapter) if adapter or args.dequantize else 0.0
    error = export(embedder, args.output, args.format)
    print(f"{args.output}: {embedder[0].design}, loaded again; embeddings agree to {max(error, merged):.1e}")
    if args.format == "onnx":
        print(f"{args.output}/README.md holds the lines that run it, with onnxruntime and tokenizers alone")
    elif args.format == "vllm":
        print(f"vllm serve {args.output} --runner pooling, where mlpool is installed beside vLLM")
    elif Path(args.output).suffix == ".pt2":
        texts: Any = embedder[0].texts
        print(
            "torch.export.load(path).module()(input_ids, attention_mask), every text between the tokens of its "
            f"frame, {texts.prefix} … {texts.suffix}; or mlpool.exchange.export.load_exported"
        )
    else:
        print("SentenceTransformer(path), text-embeddings-inference, vLLM and infinity read it")


# --- import-released --------------------------------------------------------------------------------------------------


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, "the authors' folder: adapter and attn_pool.pt", "the folder to write, new or empty")
    parser.add_argument("--base", required=True, help="the base model that the adapter was trained on")
    parser.add_argument("--design", help="1 to 5, or its name; which of two it is, no file says")
    options.add_max_seq_length(parser, "the model's own limit; the authors evaluate at 512")
    parser.add_argument(
        "--num-heads", type=options.positive, default=32, help="of the pooler (default 32, the released)"
    )


def _run_import(args: argparse.Namespace) -> None:
    new_place(args.output)
    options.check_place(args.base)
    if not Path(args.folder).is_dir():
        raise FileNotFoundError(f"no folder {args.folder}{options.near(Path(args.folder))}; expected the authors'")
    from .released import import_released

    embedder = import_released(
        args.folder, args.base, args.design, args.num_heads, dtype=args.dtype, device=args.device,
        max_seq_length=args.max_seq_length,
    )  # fmt: skip
    embedder.save(args.output)
    print(f"{args.output}: {embedder[0].design}; loads with mlpool.load({args.output!r})")


# What `mlpool.cli` asks of a subcommand.
merge = SimpleNamespace(add_arguments=_merge_arguments, run=_run_merge)
export = SimpleNamespace(add_arguments=_export_arguments, run=_run_export)
import_released = SimpleNamespace(add_arguments=_import_arguments, run=_run_import)
