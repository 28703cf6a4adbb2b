"""`mlpool merge`, `mlpool export` and `mlpool import-released`: one folder in, another form of it out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..embedder.adapters import has_adapter
from ..embedder.adapters import merge as merge_adapter
from ..embedder.designs import DESIGNS
from ..embedder.embedder import Embedder
from ..embedder.loading import load
from .export import FORMATS, agreement, new_place
from .export import export as export_embedder
from .released import import_released as read_released


@dataclass(frozen=True)
class Command:
    """What `mlpool.cli` asks of a subcommand."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _add_common(parser: argparse.ArgumentParser, folder: str, output: str) -> None:
    parser.add_argument("folder", help=folder)
    parser.add_argument("-o", "--output", required=True, help=output)
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float64", "float32", "bfloat16", "float16"),
        help="of the backbone; auto is the dtype it was saved in (default)",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU where there is one)")


def _load(args: argparse.Namespace) -> Embedder:
    return load(args.folder, base=args.base, dtype=args.dtype, device=args.device)


def _merge(embedder: Embedder) -> float:
    """Fold the adapter in; the largest difference of a coordinate, or an error where it is more than rounding."""
    with torch.no_grad():
        before = embedder._probe()
        merged = merge_adapter(embedder)
        try:
            return agreement(merged, before, merged._probe, f"merging in {embedder.dtype} changes embeddings")
        except RuntimeError as error:
            raise ValueError(f"{error}, though every weight by itself is merged right") from error


# --- merge ------------------------------------------------------------------------------------------------------------


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, "a saved embedder with a LoRA adapter", "the folder to write, new or empty")
    parser.add_argument("--base", help="the base model, where it is no longer at the place it was trained from")


def _run_merge(args: argparse.Namespace) -> None:
    new_place(args.output)
    embedder = _load(args)
    error = _merge(embedder)
    embedder.save(args.output)
    print(f"{args.output}: {embedder[0].design}, merged; embeddings agree to {error:.1e}")


# --- export -----------------------------------------------------------------------------------------------------------


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    plain = ", ".join(design.name for design in DESIGNS.values() if not design.trainable)
    _add_common(parser, "a saved embedder; an adapter is merged first", "a folder (st) or a file named .pt2 (torch)")
    parser.add_argument("--base", help="the base model of an adapter, where it is no longer at its place")
    parser.add_argument(
        "--format", choices=FORMATS,
        help=f"st: a plain sentence-transformers folder, the default for {plain}; torch: one file of torch.export, the "
        "default for designs with a trained pooler",
    )  # fmt: skip


def _run_export(args: argparse.Namespace) -> None:
    new_place(args.output)
    embedder = _load(args)
    merged = _merge(embedder) if has_adapter(embedder[0].model) else 0.0  # type: ignore[arg-type]
    error = export_embedder(embedder, args.output, args.format)
    print(f"{args.output}: {embedder[0].design}, loaded again; embeddings agree to {max(error, merged):.1e}")
    if Path(args.output).suffix == ".pt2":
        print(
            "torch.export.load(path).module()(input_ids, attention_mask), every text between the tokens of its "
            f"frame, {embedder[0].texts.prefix} … {embedder[0].texts.suffix}; or mlpool.exchange.export.load_exported"
        )
    else:
        print("SentenceTransformer(path), text-embeddings-inference, vLLM and infinity read it")


# --- import-released --------------------------------------------------------------------------------------------------


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, "the authors' folder: adapter and attn_pool.pt", "the folder to write, new or empty")
    parser.add_argument("--base", required=True, help="the base model that the adapter was trained on")
    parser.add_argument("--design", help="2 to 5, or its name; which of two it is, no file says")
    parser.add_argument("--num-heads", type=int, default=32, help="of the pooler (default 32, the released)")


def _run_import(args: argparse.Namespace) -> None:
    new_place(args.output)
    embedder = read_released(
        args.folder, args.base, args.design, args.num_heads, dtype=args.dtype, device=args.device
    )  # fmt: skip
    embedder.save(args.output)
    print(f"{args.output}: {embedder[0].design}; loads with mlpool.load({args.output!r})")


merge = Command(_merge_arguments, _run_merge)
export = Command(_export_arguments, _run_export)
import_released = Command(_import_arguments, _run_import)
