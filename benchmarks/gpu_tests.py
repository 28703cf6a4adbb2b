"""The tests that need a card, in several processes; each result is on disk as it comes, and no test runs twice.

    python benchmarks/gpu_tests.py                       what is marked gpu in tests/
    python benchmarks/gpu_tests.py --jobs 1 tests/kernels --again     one process; what failed once more

Most of the time goes to compiling kernels, on one core a process; they are kept by Triton, so a second run is faster. A
process that a test has killed, or whose GPU is lost, is replaced and goes on behind that test. Exit status: 0 where all
have passed or were skipped, 1 where one failed, 3 where time was up and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measure import START, Row, add_run_arguments, cores, device_slug, facts, is_lost, progress, start
from rows import Rows

ROOT = Path(__file__).parent.parent
LOST = 70  # the exit status of a process without its GPU
GRACE = 30.0  # seconds after the time limit in which a test that has begun may end


class Share:
    """A pytest plugin: one process's share of the tests, each announced and reported as a line of JSON."""

    def __init__(self, part: str, done: set[str], deadline: float | None, device: torch.device) -> None:
        self.part, self.of = map(int, part.split("/"))
        self.done, self.deadline, self.device = done, deadline, device
        self.lines = os.fdopen(os.dup(1), "w", buffering=1)
        self.begun = 0.0

    def tell(self, **message: Any) -> None:
        print(json.dumps(message), file=self.lines)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [i for i in items if self.mine(i.nodeid) and i.nodeid not in self.done]

    def mine(self, name: str) -> bool:
        return zlib.crc32(name.encode()) % self.of == self.part

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.mine(report.nodeid):
            self.tell(test=report.nodeid, green=False, failed=report.longreprtext, seconds=0.0)

    def pytest_runtestloop(self, session: Any) -> None:
        self.left = len(session.items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.deadline is not None and time.time() > self.deadline:
            self.tell(left=self.left)
            os._exit(0)
        self.left -= 1
        self.begun = time.perf_counter()
        self.tell(started=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The call, or what kept it from being made or undone."""
        if report.when == "call" or not report.passed:
            self.tell(
                test=report.nodeid, green=not report.failed, outcome=report.outcome,
                failed=report.longreprtext if report.failed else "", seconds=time.perf_counter() - self.begun,
            )  # fmt: skip
        if report.failed and is_lost(self.device):
            os._exit(LOST)


def run_share(args: argparse.Namespace) -> int:
    import pytest

    share = Share(args.share, set(json.load(sys.stdin)), args.deadline, torch.device(args.device))
    os.dup2(2, 1)  # what tests print
    options = ["-p", "no:terminal", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", args.mark]
    return int(pytest.main([*options, *args.paths], plugins=[share]))


class Tests:
    """All shares, and their rows."""

    def __init__(self, args: argparse.Namespace, rows: Rows) -> None:
        self.args, self.rows, self.lock = args, rows, threading.Lock()
        self.left = 0
        self.deadline = (
            None if args.minutes is None else time.time() + 60 * args.minutes - (time.perf_counter() - START)
        )

    def record(self, test: str, failed: str, **row: Any) -> None:
        with self.lock:
            if failed:
                print(f"FAILED {test}\n{failed}\n", flush=True)
            # The end of a traceback is what it is about.
            self.rows.add({"test": test, **row, "failed": failed[-300:]})
            if len(self.rows.all) % 50 == 0:
                progress(f"{len(self.rows.all)} tests")

    def share(self, i: int) -> None:
        """Run one share to its end, in as many processes as that takes."""
        args = self.args
        command = [sys.executable, __file__, *args.paths, "--share", f"{i}/{args.jobs}", "--mark", args.mark]
        command += ["--device", args.device, *(["--deadline", str(self.deadline)] if self.deadline else [])]
        while True:
            with self.lock:
                done = [row["test"] for row in self.rows.all]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            pipes: Any = process
            with pipes.stdin as pipe:
                json.dump(done, pipe)
            hung = threading.Timer(GRACE + self.deadline - time.time(), process.kill) if self.deadline else None
            if hung is not None:
                hung.start()
            running = None
            for line in pipes.stdout:
                message: Row = json.loads(line)
                if "left" in message:
                    self.left += message["left"]
                elif "started" in message:
                    running = message["started"]
                else:
                    running = None
                    self.record(**message)
            status = process.wait()
            if hung is not None:
                hung.cancel()
            if running is not None and status not in (0, 1):
                self.record(running, f"the process died (exit status {status})", green=False)
            elif status != LOST:
                return


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="files or folders; default: tests")
    parser.add_argument("--mark", default="gpu", help="pytest's -m")
    parser.add_argument(
        "--jobs", type=int, default=min(16, max(1, cores() - 2)), help="processes; default: %(default)s"
    )
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    add_run_arguments(parser)
    parser.set_defaults(device="cuda")
    args = parser.parse_args(argv)
    args.paths = args.paths or ["tests"]
    if args.share:
        return run_share(args)
    device = start(args, tuned=False)
    rows = Rows(args.results / f"gpu-test-{device_slug(device)}.csv", facts(device), args.again)
    tests = Tests(args, rows)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(tests.share, range(args.jobs)))
    failed = [row["test"] for row in rows.all if not row["green"]]
    skipped = sum(row.get("outcome") == "skipped" for row in rows.all)
    print(f"{len(rows.all) - len(failed) - skipped} passed, {skipped} skipped, {len(failed)} failed, {tests.left} left")
    for name in failed:
        print(f"FAILED {name}")
    if not rows.all and not tests.left:
        print(f"no test is marked {args.mark!r} in {' '.join(args.paths)}", file=sys.stderr)
    return 1 if failed or not (rows.all or tests.left) else 3 if tests.left else 0


if __name__ == "__main__":
    sys.exit(main())
