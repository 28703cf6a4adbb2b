"""Texts that every reader has: what Python's own library says of its functions, as data for search and training.

    python examples/python_docs.py -o python-docs

functions.jsonl     area, name, head: the first paragraph of each docstring, rest: what follows it
pairs.jsonl         query, positive: first paragraph and the rest, for training
dev.jsonl           sentence1, sentence2, score: first paragraph with its own rest 2, with that of another function of
                    its area 1, of another area 0
retrieval/AREA/     corpus.jsonl, queries.jsonl, qrels.tsv, a folder an area, as `mlpool eval --local` reads them:
                    the rest is to be found by the first paragraph

A function is in one of training, dev and test alone. Another version of Python has somewhat other texts; so has a
process that has imported much before, as some packages change the library: run it as a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from small_data import write

AREAS = {
    "text": "string textwrap re difflib unicodedata locale html shlex base64 codecs tokenize pprint builtins.str",
    "files": "os os.path pathlib shutil tempfile glob fnmatch fileinput stat io linecache zipfile tarfile",
    "numbers": "math cmath decimal fractions random statistics operator builtins.int builtins.float",
    "time": "time datetime calendar sched timeit zoneinfo",
    "collections": "collections itertools functools heapq bisect array copy queue graphlib enum builtins.dict builtins",
    "network": "socket ssl ftplib smtplib imaplib http.client http.cookiejar urllib.parse urllib.request ipaddress",
    "processes": "threading subprocess signal asyncio multiprocessing.pool selectors contextlib sys platform",
    "storage": "json pickle csv configparser sqlite3 shelve struct mailbox xml.etree.ElementTree xml.dom.minidom",
}
SIGNATURE = re.compile(r"^[\w.]+\(.*\)|.*->")
MOST, LEAST = 400, 25  # characters of a text: cut at the first; below the second it says too little


class Function(NamedTuple):
    area: str
    name: str
    head: str
    rest: str


def functions() -> list[Function]:
    """Every documented class, function and method of the areas, each text once."""
    found: dict[str, Function] = {}
    for area, modules in AREAS.items():
        for module in modules.split():
            for name, docstring in _documented(module):
                head, rest = _parts(docstring)
                if len(head) >= LEAST and head not in found:
                    found[head] = Function(area, name, head, rest)
    return list(found.values())


def _documented(module: str) -> Iterator[tuple[str, str]]:
    """Names and docstrings; of a class its own methods too."""
    place, _, inner = module.partition("builtins.")
    owner = getattr(importlib.import_module("builtins"), inner) if inner else importlib.import_module(place)
    for name, thing in _public(owner):
        methods = [(f".{method}", value) for method, value in _public(thing)] if inspect.isclass(thing) else []
        for suffix, value in [("", thing), *methods]:
            if isinstance(text := getattr(value, "__doc__", None), str):
                yield f"{inner or module}.{name}{suffix}".removeprefix("builtins."), inspect.cleandoc(text)


def _public(owner: object) -> list[tuple[str, object]]:
    """What an owner defines for others to call; errors, which say the same in every module, left out."""
    return [
        (name, value)
        for name, value in sorted(vars(owner).items())
        if name[0] != "_" and callable(value) and not (inspect.isclass(value) and issubclass(value, BaseException))
    ]


def _parts(docstring: str) -> tuple[str, str]:
    """First paragraph and the rest, each on one line; a signature before them left out."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring)]
    if SIGNATURE.match(paragraphs[0]):
        paragraphs = paragraphs[1:]
    head, *rest = paragraphs or [""]
    return head[:MOST], " ".join(rest)[:MOST]


def scored(asked: list[Function], rng: random.Random) -> list[dict]:
    """Each function's first paragraph with three rests: its own, a near one and a far one."""
    rows = []
    for function in asked:
        near = [other for other in asked if other.area == function.area and other != function]
        far = [other for other in asked if other.area != function.area]
        for other, score in ((function, 2), (rng.choice(near), 1), (rng.choice(far), 0)):
            rows.append({"sentence1": function.head, "sentence2": other.rest, "score": score})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--queries", type=int, default=24, help="of each retrieval set, at most half of its area")
    parser.add_argument("--dev", type=int, default=8, help="functions of each area in dev.jsonl, three pairs of each")
    args = parser.parse_args()
    every = functions()
    whole = [function for function in every if len(function.rest) >= LEAST]
    random.Random(0).shuffle(whole)
    train, dev = [], []
    for area in AREAS:
        mine = [function for function in whole if function.area == area]
        count = min(args.queries, len(mine) // 2)
        write_retrieval(mine[:count], args.output / "retrieval" / area)
        dev += mine[count : count + args.dev]
        train += mine[count + args.dev :]
    write(args.output / "functions.jsonl", [function._asdict() for function in every])
    write(args.output / "pairs.jsonl", [{"query": f.head, "positive": f.rest} for f in train])
    write(args.output / "dev.jsonl", scored(dev, random.Random(0)))
    tested = len(whole) - len(train) - len(dev)
    print(f"{args.output}: {len(every)} functions, {len(train)} pairs, {tested} queries of {len(AREAS)} areas")


def write_retrieval(functions: list[Function], folder: Path) -> None:
    write(folder / "queries.jsonl", [{"_id": f.name, "text": f.head} for f in functions])
    write(folder / "corpus.jsonl", [{"_id": f.name, "text": f.rest} for f in functions])
    lines = ["query-id\tcorpus-id\tscore", *(f"{f.name}\t{f.name}\t1" for f in functions)]
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
