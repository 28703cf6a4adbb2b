"""The shards of a job made by a Ray cluster: `mlpool encode … --ray`.

An actor is a process with the model that makes shards, as a process of torchrun does: it reads its rows and writes its
shards itself, so that no text and no embedding passes through this process. Here shards are handed out, ascending, so
that an actor passes over a file of lines once; those of an actor that died go to another.

What is complete stands in the folder, and a shard made twice is the same shard, so nothing is lost or doubled by a
kill. Ray's own restarts are off, and Ray Data is not used: both bind the work of a dead actor to that actor's return,
which does not come where its node is gone.
"""

import logging
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..version import need, versions
from .embedding_folder import RUN
from .job import Job
from .text_files import Checked, Reader

logger = logging.getLogger("mlpool")

_BLOCK = 16  # neighbouring shards that are handed out at once, at most
_POLL = 1.0  # seconds between two looks at the actors
_LOOK = 5.0  # seconds between two looks at the nodes
_LATE = 120.0  # seconds without any actor after which it is said why
_REACH = 10.0  # seconds in which a cluster must answer
_DEATHS = 10  # in a row, and three for every actor, without a shard: it is no accident
# What decides the numbers in a shard, and whether an object from here can be read there.
_SAME = ("mlpool", "torch", "transformers", "sentence-transformers", "tokenizers", "numpy")
_EXPECTED = (ValueError, OSError, ModuleNotFoundError)  # what a user can mend, as in cli.py


# --- the cluster ------------------------------------------------------------------------------------------------------


@contextmanager
def connected(address: str) -> Iterator[None]:
    """In the cluster at `address` until the block ends; within another such block, or a `ray.init`, in that one.

    Args:
        address: HOST:PORT, ray://HOST:PORT, "auto" (one that runs on this machine) or "local" (a new one, for this
            run); "" is RAY_ADDRESS, else one that runs here, else a new one.

    Raises:
        ModuleNotFoundError: no Ray here. ValueError: no address. ConnectionError: nobody answers there.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield
        return
    _check_answers(address)
    try:
        ray.init(address or None, logging_level=logging.ERROR)
    except Exception as error:  # of many kinds, by version and by what is wrong
        why = str(error).strip().partition("\n")[0]
        raise ConnectionError(
            f"no Ray cluster at {address or 'RAY_ADDRESS'}: {why}; see that it runs (ray status) with the Ray and "
            "Python that are here, or leave the address out for one on this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    return need("ray", "--ray needs Ray: pip install 'mlpool[ray]'")


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes."""
    if address in ("", "auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdigit() and "/" not in host):
        raise ValueError(
            f"{address!r} is no address of a Ray cluster; expected HOST:PORT, ray://HOST:PORT, auto or local (files "
            "stand before --ray)"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}); see that it runs (ray status), and that this machine may "
            "reach it"
        ) from error


def each(count: Callable[[int], Any]) -> Callable[..., Iterator[Checked]]:
    """`check_files`' `each` on the cluster: files are checked by all nodes at once."""
    ray = _import_ray()

    def run(check: Callable[..., Checked], paths: Sequence[Path]) -> Iterator[Checked]:
        task = ray.remote(_on_node)
        for reply in [task.remote(check, path) for path in paths]:
            found = _result(reply)
            count(found.file.rows)
            yield found

    return run


def _on_node(work: Callable[..., Any], path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(_unseen(path))
    return work(path)


def _unseen(path: Path) -> str:
    import ray

    return (
        f"{path} is not there on the node {ray.util.get_node_ip_address()}: on a cluster, inputs and output must be "
        "where every node sees them, in a shared folder or at a URI such as s3://bucket/folder"
    )


def _result(reply: Any) -> Any:
    """What a task returned, or what it raised, as if it had been here."""
    import ray

    try:
        return ray.get(reply)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, _EXPECTED):
            raise cause from None
        _check_imports(error)
        raise


def _check_imports(error: Exception) -> None:
    """Ray has several errors for a node that cannot read what it was sent; all hold Python's own message."""
    if missing := re.search(r"No module named '([\w.]+)'", str(error)):
        raise ModuleNotFoundError(
            f"a node of the cluster cannot import {missing[1]}; install there what is installed here: pip install "
            "'mlpool[ray]' and the packages of your own models, or give Ray a runtime environment that has them"
        ) from None


# --- an actor ---------------------------------------------------------------------------------------------------------


class _Count:
    """Stands for a progress bar: how many rows of the block are done."""

    n = 0

    def update(self, rows: int) -> None:
        self.n += rows


class Maker:
    """Makes shards on some node; an actor of two threads, so that it can be asked how far it is."""

    def __init__(self) -> None:
        self.block: list[int] = []
        self.done: list[int] = []
        self.count = _Count()

    def begin(self, model: Any, job: Job, gpu: bool, here: dict[str, str]) -> None:
        """Look whether this node can do it, and take the model.

        Raises:
            ValueError: other versions than where the job was started. FileNotFoundError: no input or output here.
        """
        import ray

        there = versions(*_SAME)
        if differs := [f"{name} {there.get(name)}, not {here[name]}" for name in here if not _equal(name, here, there)]:
            raise ValueError(
                f"the node {ray.util.get_node_ip_address()} has {'; '.join(differs)}: shards would depend on who made "
                "them. Install the same versions on every node"
            )
        for path in (job.files[0].path, job.folder.progress / RUN):
            if not path.is_file():
                raise FileNotFoundError(_unseen(path))
        device = "cuda" if gpu else "cpu"
        self.model, self.job, self.reader = model.to(device), job, Reader(job.files, job.columns)
        job.call["device"] = device

    def make(self, shards: list[int]) -> None:
        self.block, self.done, self.count = shards, [], _Count()
        for shard in self.job.make(self.model, shards, self.count, self.reader):
            self.done.append(shard)

    def seen(self) -> tuple[list[int], list[int], int]:
        """The shards at hand, which of them are complete, and how many rows are done."""
        return self.block, self.done, self.count.n


def _equal(name: str, here: dict[str, str], there: dict[str, str]) -> bool:
    """The same version, whatever it was built for: 2.13.0+cpu is 2.13.0+cu130."""
    return there.get(name, "").partition("+")[0] == here[name].partition("+")[0]


# --- handing out ------------------------------------------------------------------------------------------------------


def make(job: Job, model: Any, shards: Iterable[int], bar: Any, most: int | None, cores: int) -> None:
    """Make these shards on the cluster this process is connected to; the folder must be held.

    Args:
        bar: moves with the rows of all actors. most: actors at a time, None for as many as there is room for.
        cores: of an actor; beside them it has a GPU where the cluster has any and the job names no other device.

    Raises:
        RuntimeError: actors die again and again. What a shard or a node raises: ValueError, OSError,
            ModuleNotFoundError.
    """
    crew = _Crew(job, sorted(shards), most, cores)
    if not crew.todo:
        return
    crew.hand_over(model)
    try:
        crew.work(bar)
    finally:
        for worker in crew.workers:
            crew.ray.kill(worker.actor)


@dataclass
class _Worker:
    actor: Any
    ready: bool = False
    block: list[int] = field(default_factory=list)  # what it was given
    done: list[int] = field(default_factory=list)  # what of it is complete, as of the last look
    rows: int = 0


class _Crew:
    """The actors and what they have to do."""

    def __init__(self, job: Job, todo: list[int], most: int | None, cores: int) -> None:
        self.ray = _import_ray()
        self.job, self.todo, self.most, self.cores = job, todo, most, cores
        self.gpu = job.call.get("device") != "cpu" and self.ray.cluster_resources().get("GPU", 0) >= 1
        self.workers: list[_Worker] = []
        self.due: dict[Any, _Worker] = {}  # what is awaited, and of whom
        self.rows = 0  # of the shards that are complete
        self.deaths = 0  # since a shard was completed
        self.began, self.counted, self.asked, self.said = time.monotonic(), 0.0, 0.0, False

    def hand_over(self, model: Any) -> None:
        """Put the model where every node gets it, from the CPU: a node may have no GPU of this number."""
        device = model.device if hasattr(model, "device") else "cpu"
        self.goods = self.ray.put(model.to("cpu")), self.ray.put(self.job)
        model.to(device)
        self.kind = self.ray.remote(Maker).options(
            num_cpus=self.cores, num_gpus=int(self.gpu), max_restarts=0, max_task_retries=0, max_concurrency=2
        )

    def work(self, bar: Any) -> None:
        while self.todo or any(worker.block for worker in self.workers):
            self._hire()
            for worker in self.workers:
                self._give(worker)
            replies, _ = self.ray.wait(list(self.due), timeout=_POLL)
            for reply in replies:
                self._take(self.due.pop(reply), reply)
            if time.monotonic() - self.asked > _POLL:
                self._ask()
            bar.update(self.rows + sum(worker.rows for worker in self.workers) - bar.n)

    def _hire(self) -> None:
        """As many actors as there is room for, now that nodes may have come or gone; at least one, which waits."""
        if (now := time.monotonic()) - self.counted < _LOOK and self.workers:
            return
        self.counted = now
        busy = sum(bool(worker.block) for worker in self.workers)
        wanted = min(max(1, self._room()), self.most or 2**31, busy + len(self.todo))
        for _ in range(wanted - len(self.workers)):
            worker = _Worker(self.kind.remote())
            self.workers.append(worker)
            self.due[worker.actor.begin.remote(*self.goods, self.gpu, versions(*_SAME))] = worker
        if not self.said and now - self.began > _LATE and not any(worker.ready for worker in self.workers):
            self.said = True
            logger.warning(
                "no actor is at work after %.0f seconds: each needs %d cores%s, and an idle cluster has room for %d; "
                "waiting", now - self.began, self.cores, " and a GPU" if self.gpu else "",
                self._room(),
            )  # fmt: skip

    def _room(self) -> int:
        needs = {"CPU": self.cores, **({"GPU": 1} if self.gpu else {})}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return sum(int(min(node.get(name, 0) // need for name, need in needs.items())) for node in nodes)

    def _give(self, worker: _Worker) -> None:
        """The next shards: many while there are many, single ones at the end, so that all end together."""
        if not worker.ready or worker.block or not self.todo:
            return
        size = max(1, min(_BLOCK, len(self.todo) // (2 * len(self.workers))))
        worker.block, self.todo = self.todo[:size], self.todo[size:]
        self.due[worker.actor.make.remote(worker.block)] = worker

    def _take(self, worker: _Worker, reply: Any) -> None:
        exceptions = self.ray.exceptions
        try:
            _result(reply)
        except exceptions.RayTaskError:
            raise
        except exceptions.RayError as error:  # the actor, its node, or the way there
            self._bury(worker, error)
            return
        if worker.ready:
            worker.done = worker.block
            self._settle(worker)
        worker.ready = True

    def _bury(self, worker: _Worker, error: Exception) -> None:
        """What it had not completed is to be done again, by whomever."""
        _check_imports(error)
        with suppress(Exception):
            self.ray.kill(worker.actor)  # unreachable is not dead
        self.workers.remove(worker)
        again = sorted({*worker.block} - {*worker.done})
        self.todo = sorted([*self.todo, *again])
        self._settle(worker)
        self.deaths += 1
        why = str(error).strip().partition("\n")[0]
        logger.warning("an actor has died with %d shards at hand, which others make: %s", len(again), why)
        if self.deaths > _DEATHS + 3 * len(self.workers):
            raise RuntimeError(
                f"{self.deaths} actors died one after the other without completing a shard; the last one: {why}"
            )
        self.counted = 0.0  # another takes its place at once

    def _settle(self, worker: _Worker) -> None:
        if worker.done:
            self.deaths = 0
        self.rows += sum(stop - start for start, stop in map(self.job.range, worker.done))
        worker.block, worker.done, worker.rows = [], [], 0

    def _ask(self) -> None:
        """Ask those at work how far they are."""
        self.asked = time.monotonic()
        asked = {worker.actor.seen.remote(): worker for worker in self.workers if worker.block}
        answers, _ = self.ray.wait(list(asked), num_returns=len(asked), timeout=_POLL) if asked else ([], None)
        for answer in answers:
            with suppress(self.ray.exceptions.RayError):  # dead: what is awaited of it says so, too
                block, done, rows = self.ray.get(answer)
                if block == (worker := asked[answer]).block:  # not those before
                    worker.done, worker.rows = done, rows
