"""`mlpool fit`, as it is typed; what fits is in fit.py."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train pools alone on layer states of a frozen base, which are taken once and kept; the best by dev data "
        "becomes an embedder folder, from which `mlpool train` goes on. The same command again goes on after a kill."
    )
    parser.add_argument("config", help="a YAML file; configs/fit/smollm2.yaml is a ready one")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, train nothing")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--key value", help="overrides of the config")


def run(args: argparse.Namespace) -> None:
    if not Path(args.config).is_file():  # before seconds of imports
        raise FileNotFoundError(f"no config {args.config}; see configs/fit/smollm2.yaml for a ready one")
    from .fit import fit

    words = list(args.overrides)
    dry_run = args.dry_run or "--dry-run" in words  # also behind the overrides
    fit(args.config, [word for word in words if word != "--dry-run"], dry_run=dry_run)
