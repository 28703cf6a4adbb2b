"""`mlpool eval`, as it is typed; what evaluates is in evaluate.py."""

import argparse
import os
import sys
from pathlib import Path

from .. import options
from . import local, results
from .tasks import BARE, EXACT_LENGTH, PAPER, import_mteb, mteb_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Score a model on MTEB, or offline on folders of your own; resumes where it was stopped."
    parser.epilog = f"Several GPUs: torchrun --nproc-per-node 8 -m -- mlpool.cli eval ...\n\n{local.__doc__}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model", help="folder or Hub name of an embedder, or of any sentence-transformers model")
    add("--tasks", type=options.names, metavar="NAME[,NAME]", help=f"paper (47 tasks), {', '.join(PAPER)}, or mteb's "
        "names; with --local the folders, sts/stsb, or a kind of them (default there: all)")  # fmt: skip
    add("--local", metavar="DIR", help="evaluate the folders in DIR instead of MTEB, see below")
    add("--split", choices=local.SPLITS, default="test", help="of --local (default: %(default)s)")
    add("-o", "--output", default="results", metavar="DIR", help="results folder (default: %(default)s)")
    add("--label", help="the model's name in tables (default: its folder's or Hub name)")
    add("--seed", type=int, help="the seed it was trained with, for the tables")
    add("--prompts", metavar="mteb|model|none|paper-exact|FILE", help="what stands before texts, queries only in "
        "retrieval: mteb's instructions (default), the model's own prompts (default of --local), nothing, or a JSON or "
        "YAML file that maps names or types of tasks or 'default' to instructions; paper-exact[=FILE]: as the paper's "
        "own code does, no space behind an instruction, in reranking before documents too; FILE is its "
        "wording")  # fmt: skip
    add("--template", default=BARE, help="of an instruction, say 'Instruct: {instruction}\\nQuery: ' (default: bare, "
        "%(default)r)")  # fmt: skip
    add("--token-budget", type=options.positive, metavar="N", help="tokens a forward, of mlpool's embedders (default: "
        "theirs)")  # fmt: skip
    add("--batch-size", type=options.positive, default=32, metavar="N", help="texts a forward, of others (default: "
        "%(default)s)")  # fmt: skip
    add("--no-cache", action="store_true", help="keep no embeddings of retrieval corpora")
    add("--design", help="build this design on a base model, untrained, instead of loading an embedder")
    options.add_max_seq_length(parser, f"the model's own limit; of --prompts paper-exact {EXACT_LENGTH}")
    options.add_device(parser, "the first GPU, under torchrun each process its own")
    options.add_dtype(parser)


def run(args: argparse.Namespace) -> None:
    if args.tasks is None and args.local is None:
        raise ValueError("name tasks with --tasks (paper, STS, SciFact, ...), or folders of your own with --local DIR")
    options.check_place(args.model)
    if args.local:
        local.discover(Path(args.local))
    from ..embedder.loading import open_model  # from here on imports take seconds
    from .encoder import Prompts
    from .evaluate import _kept_random_state, _run, table

    import_mteb()
    prompts = Prompts.load(args.prompts or ("model" if args.local else "mteb"), args.template.replace("\\n", "\n"))
    with _kept_random_state():  # names are checked before a model is loaded
        tasks = local.local_tasks(args.local, args.tasks, args.split) if args.local else mteb_tasks(args.tasks)
    prompts.check(tasks)
    rank, world = options.rank_and_world()
    length = args.max_seq_length or (EXACT_LENGTH if prompts.exact else None)
    model = open_model(args.model, args.design, args.device or _device(), args.dtype, length)
    rows = _run(
        model, tasks, args.output, label=args.label or Path(args.model).resolve().name, prompts=prompts, seed=args.seed,
        token_budget=args.token_budget, batch_size=args.batch_size, cache=not args.no_cache, shard=world > 1,
        progress=rank == 0,
    )  # fmt: skip
    if rank == 0:
        print(table(rows))
        print(f"\nin {Path(args.output) / results.FILE_NAME}; compare models with: mlpool compare", file=sys.stderr)


def _device() -> str | None:
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None
