"""The version, where every floor may read it, those of what it ran with, and what may be missing of them."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__version__ = "0.2.0"


def versions_line(*packages: str) -> str:
    """ "mlpool 0.1.0, torch 2.11.0", of those that are installed."""
    return ", ".join(f"{name} {number}" for name, number in versions(*packages).items())


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            # A module that is there says more: torch names the CUDA that it was built for.
            found[name] = getattr(sys.modules.get(name.replace("-", "_")), "__version__", None) or version(name)
        except PackageNotFoundError:
            continue
    return found


def need(module: str, message: str) -> Any:
    """A module of a package that may be missing: then an error that says what needs it ("{}") and how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(message.format(error.name)) from error
