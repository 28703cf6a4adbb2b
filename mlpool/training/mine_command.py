"""`mlpool mine`, as it is typed; what mines is in mine.py."""

import argparse
from pathlib import Path
from typing import Any

from ..corpus.rows import beside, kind_of
from ..corpus.text_files import find_files
from ..options import add_device, add_max_seq_length, check_place, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = (
        "Find hard negatives for pairs among their positives and other texts, by a model's embeddings. An interrupted "
        "run goes on where it was: call it again. See docs/mining.md."
    )
    add("pairs", nargs="+", metavar="PAIRS", help="files, folders or Hub names, as `mlpool train` reads them")
    add("-m", "--model", required=True, help="whose embeddings find the negatives: folder or Hub name")
    add("-o", "--output", required=True, metavar="OUT.jsonl", help="for `mlpool train`; OUT.jsonl.meta beside it")
    add("--design", help="of a base model without a saved pooler")
    columns = parser.add_argument_group("pairs")
    for role in ("anchor", "positive"):
        columns.add_argument(f"--{role}-column", metavar="NAME", help="default: by the known names")
    columns.add_argument("--limit", type=positive, metavar="PAIRS", help="the first of each source")
    columns.add_argument("--corpus", nargs="+", default=(), metavar="FILE", help="more texts that may be negatives")
    choice = parser.add_argument_group("which negatives")
    choice.add_argument("-n", "--num-negatives", type=positive, default=3, help="of every pair; default: %(default)s")
    choice.add_argument("--range-min", type=int, default=0, metavar="RANK", help="pass over so many of the nearest")
    choice.add_argument("--range-max", type=positive, metavar="RANK", help="default: range-min + 10 x num-negatives")
    choice.add_argument("--absolute-margin", type=float, help="a negative's score is so much below the positive's")
    choice.add_argument("--relative-margin", type=float, help="or below it by this share of it, say 0.05")
    choice.add_argument("--max-score", type=float, help="of a negative")
    choice.add_argument("--min-score", type=float, help="of a negative")
    choice.add_argument("--sampling", choices=("top", "random"), default="top", help="default: the nearest left")
    choice.add_argument("--seed", type=int, default=0, help="of random sampling")
    choice.add_argument("--too-few", choices=("drop", "refuse"), default="drop", help="pairs with fewer negatives")
    choice.add_argument("--cross-encoder", metavar="MODEL", help="its scores decide among what the embeddings find")
    how = parser.add_argument_group("how")
    for side in ("query", "document"):
        how.add_argument(f"--{side}-prompt", metavar="TEXT", help="default: the one stored in the model")
    how.add_argument("--embeddings", metavar="DIR", help="keep the embeddings there, for another run or as a teacher")
    how.add_argument("--search", choices=("auto", "faiss", "torch"), default="auto", help="faiss where it is installed")
    how.add_argument("--token-budget", type=positive, metavar="TOKENS", help="most tokens a batch")
    how.add_argument("--batch-size", type=positive, metavar="TEXTS", help="for models that take no token budget")
    add_max_seq_length(parser)
    add_device(parser)
    how.add_argument("--overwrite", action="store_true", help="replace what another run left")


def run(args: argparse.Namespace) -> None:
    for name in filter(None, (args.model, args.cross_encoder)):
        check_place(name)  # before seconds of imports
    for name in args.pairs:
        if kind_of(Path(name)) and not Path(name).exists():
            raise FileNotFoundError(f"there is no file {name}{beside(Path(name))}")
    if args.corpus:
        find_files(args.corpus)
    options: dict[str, Any] = vars(args)
    roles = {role: options.pop(f"{role}_column") for role in ("anchor", "positive")}
    if any(roles.values()) and not all(roles.values()):
        raise ValueError("name both columns: --anchor-column and --positive-column")
    from ..corpus.negatives import Choice
    from ..embedder.loading import open_cross_encoder, open_model
    from .mine import describe, mine_pairs

    choice = Choice(**{name: options.pop(name) for name in Choice.__dataclass_fields__})
    design, device, length, judge = (
        options.pop(name) for name in ("design", "device", "max_seq_length", "cross_encoder")
    )
    model = open_model(options.pop("model"), design, device, max_seq_length=length)
    judge = None if judge is None else open_cross_encoder(judge, device)
    columns = roles if all(roles.values()) else None
    summary = mine_pairs(options.pop("pairs"), model, options.pop("output"), choice, columns=columns,
                         cross_encoder=judge, **options)  # fmt: skip
    print(describe(summary))
