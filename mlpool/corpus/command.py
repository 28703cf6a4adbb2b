"""`mlpool encode`, as it is typed; what encodes is in encode.py."""

import argparse
import inspect
import signal
import sys
from contextlib import nullcontext
from typing import Any

from ..options import add_device, add_max_seq_length, check_place, rank_and_world
from ..remote import shown, to_path
from .cluster import connected
from .embedding_folder import EmbeddingFolder
from .encode import SHARD_SIZE, encode_files, own_device
from .shards import DTYPES, FORMATS
from .text_files import ACCEPTED, find_columns, find_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = (
        "Encode the texts of files into a folder of embeddings. An interrupted run goes on where it was."
    )
    add("inputs", nargs="+", metavar="FILE", help=f"{ACCEPTED}; glob patterns and URIs too")
    add("-o", "--output", required=True, metavar="DIR", help="folder to write to, or its URI (s3://bucket/folder)")
    add("-m", "--model", required=True, help="folder or Hub name")
    add("--design", help="of a base model without a saved pooler; default: what the folder says")
    add("--text-column", help="default: text, else the only string column")
    add("--id-column", help="kept beside the embeddings")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt-name", help="a prompt stored in the model, say query")
    prompts.add_argument("--prompt", help="text put before every text")
    add("--format", choices=FORMATS, default="npy", help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="float32", help="of the embeddings written; default: %(default)s")
    add("--shard-size", type=int, default=SHARD_SIZE, metavar="ROWS", help="rows a file; default: %(default)s")
    add("--token-budget", type=int, metavar="TOKENS", help="most tokens a batch")
    add("--batch-size", type=int, metavar="TEXTS", help="texts a batch, for models that take no token budget")
    add("--truncate-dim", type=int, metavar="D", help="keep the first D dimensions (Matryoshka)")
    add("--normalize", action="store_true", help="to length 1, for models that do not, and after --truncate-dim")
    add_max_seq_length(parser)
    add_device(parser, "a GPU if there is one; under torchrun that of LOCAL_RANK")
    add("--allow-empty", action="store_true", help="encode empty texts as empty strings; default: an error")
    add("--verify", action="store_true", help="compare what is there with its digests; make damaged shards anew")
    add("--overwrite", action="store_true", help="replace another run in the folder")
    cluster = parser.add_argument_group("on a Ray cluster")
    cluster.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS",
        help="HOST:PORT, ray://HOST:PORT, auto or local; without one RAY_ADDRESS, else one on this machine",
    )  # fmt: skip
    cluster.add_argument("--actors", type=int, metavar="N", help="at a time; default: as many as there is room for")
    cluster.add_argument("--cores", type=int, default=1, metavar="N", help="an actor; default: %(default)s")


def run(args: argparse.Namespace) -> int | None:
    options = {name: value for name, value in vars(args).items() if name in _OPTIONS}
    check_place(args.model)  # what is mistyped shows at once, not after minutes of loading a model
    find_columns(find_files(args.inputs), args.text_column, args.id_column)
    EmbeddingFolder(to_path(args.output)).plan()
    with nullcontext() if args.ray is None else connected(args.ray):
        return _encode(args, options)


def _encode(args: argparse.Namespace, options: dict[str, Any]) -> int | None:
    from ..embedder.loading import open_model  # imports for seconds

    # For a cluster on the CPU: its nodes have other devices, if any.
    device = own_device(args.device, rank_and_world()[1]) if args.ray is None else "cpu"
    model = open_model(args.model, args.design, device, max_seq_length=args.max_seq_length)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends first
    try:
        manifest = encode_files(model, args.inputs, args.output, **options)
    except KeyboardInterrupt:
        done = len(EmbeddingFolder(to_path(args.output)).shards())
        print(f"mlpool: interrupted; {done} shards are complete, the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if manifest is None:
        print(f"mlpool: rank {rank_and_world()[0]} is done, others still work", file=sys.stderr)
    else:
        print(_describe(args.output, manifest["totals"]))
    return None


_OPTIONS = frozenset(inspect.signature(encode_files).parameters) - {"model", "inputs", "output"}


def _describe(output: str, totals: dict[str, Any]) -> str:
    speed = totals["rows"] / max(totals["seconds"], 1e-9)
    lines = [
        f"{shown(output)}: {totals['rows']:,} texts in {totals['shards']:,} shards, dimension {totals['dimension']}, "
        f"{totals['bytes'] / 1e6:,.1f} MB, {speed:,.0f} texts/s a process"
    ]
    if totals["truncated"]:
        lines.append(
            f"cut to the model's length: {totals['truncated']:,} texts, the longest {totals['longest']:,} tokens"
        )
    if not totals["normalised"]:
        lines.append("not of length 1: compare by cosine, or encode with --normalize")
    return "\n".join(lines)
