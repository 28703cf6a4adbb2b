"""The command `mlpool`: each subcommand is a module with `add_arguments` and `run`, imported when it is used."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from .version import __version__

# Where it is, what its help says, and the extra that brings what it imports.
COMMANDS = {
    "doctor": ("mlpool.doctor", "say what works here, what is missing and how to get it", "st"),
    "init": ("mlpool.training.init", "write a config for a base and a data file that it has looked at", "train"),
    "encode": ("mlpool.corpus.command", "embed a file of texts, in shards, resumable", "st"),
    "calibrate": ("mlpool.corpus.calibrate_command", "make an embedder of a language model without training", "st"),
    "mine": ("mlpool.training.mine_command", "find hard negatives for training pairs, resumable", "train"),
    "train": ("mlpool.training.command", "fine-tune an embedder from a YAML config", "train"),
    "fit": ("mlpool.fitting.command", "train pools alone on kept states of a frozen base", "train"),
    "merge": ("mlpool.exchange.commands:merge", "fold a LoRA adapter into the weights", "train"),
    "export": ("mlpool.exchange.commands:export", "write a folder or file that serving tools read", "st"),
    "import-released": ("mlpool.exchange.commands:import_released", "make the paper's released folder ours", "train"),
    "eval": ("mlpool.evaluation.command", "evaluate a model on MTEB tasks or local data", "eval"),
    "compare": ("mlpool.evaluation.compare", "compare results with statistics", "eval"),
    "layers": ("mlpool.analysis.command", "look inside the layers of a model", "eval"),
    "study": ("mlpool.study", "train, evaluate and compare designs, with a report", "train,eval"),
}
# What a user can mend; anything else is a fault and keeps its traceback.
_EXPECTED = (ValueError, OSError, ModuleNotFoundError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, 2 for input that a user can mend."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="mlpool", description="Turn a language model into a text-embedding model.")
    parser.add_argument("--version", action="version", version=f"mlpool {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, summary, _) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    command = parser.parse_args(given[:1]).command
    module, summary, extra = COMMANDS[command]
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("mlpool").setLevel(logging.INFO)
    try:
        target = _find(module)
        own = argparse.ArgumentParser(prog=f"mlpool {command}", description=summary[0].upper() + summary[1:] + ".")
        target.add_arguments(own)
        return int(target.run(own.parse_args(given[1:])) or 0)
    except _EXPECTED as error:
        print(f"mlpool: error: {error}{_lacks(error, command, extra)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mlpool: stopped", file=sys.stderr)
        return 130


def _lacks(error: Exception, command: str, extra: str) -> str:
    """What to install, where the error is Python's own of a package that is not here. Ours say so themselves."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in ("", "mlpool", "mlpool_kernels") or "install" in str(error):
        return ""
    return f"; mlpool {command} needs more than torch: pip install 'mlpool[{extra}]'"


def _find(place: str) -> Any:
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


if __name__ == "__main__":
    sys.exit(main())
