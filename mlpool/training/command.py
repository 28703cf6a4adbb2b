"""`mlpool train`, as it is typed; what trains is in train.py."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file; configs/ has ready ones")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, train nothing")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in output_dir")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--key value", help="overrides of the config")


def run(args: argparse.Namespace) -> None:
    if not Path(args.config).is_file():  # before seconds of imports
        raise FileNotFoundError(f"no config {args.config}; see configs/ for ready ones")
    from .train import train

    words = list(args.overrides)
    for flag in ("dry-run", "resume"):  # also behind the overrides
        if f"--{flag}" in words:
            words.remove(f"--{flag}")
            setattr(args, flag.replace("-", "_"), True)
    train(args.config, words, resume=args.resume, dry_run=args.dry_run)
