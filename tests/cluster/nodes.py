"""Nodes on this machine, and what befalls them."""

import contextlib
import socket
import sys
import threading
import time
from pathlib import Path

SMALL = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False, "include_log_monitor": False}

# Given, because a node that is to find them itself gives up where its agents do not start within 15 seconds.
PORTS = ("metrics_agent_port", "runtime_env_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


def _free() -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Nodes:
    """A cluster of two nodes with one core each; more may come, and all but the first may go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        self.nodes = [self.add(), self.add()]
        self.address = self.cluster.address

    def add(self, *places: str):
        """A node whose processes import from `places`, and from where this one does."""
        # Ray's workers run at a low priority, and get nothing for minutes where others compute.
        env = {"PYTHONPATH": ":".join([*places, *filter(None, sys.path)]), "RAY_worker_niceness": "0"}
        # That a node is lost shows after five looks, of which Ray takes one in three seconds.
        first = {} if self.cluster.head_node else {"_system_config": {"health_check_period_ms": 1000}}
        return self.cluster.add_node(env_vars=env, **first, **SMALL, **dict(zip(PORTS, _free(), strict=True)))

    def remove(self, node) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    def actors(self, node=None, at: str = "") -> list[int]:
        """The processes of makers, of those nodes that this object started; of those alone that are at a method."""
        nodes = [node] if node else self.nodes
        raylets = {node.all_processes["raylet"][0].process.pid for node in nodes}
        found, title = [], f"ray::Maker.{at}".rstrip(".").encode()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in raylets and (place / "cmdline").read_bytes().startswith(title):
                    found.append(int(place.name))
        return found


def complete(out: Path) -> int:
    return len(list(out.glob("progress/shard-*.json")))


class Disturbance(threading.Thread):
    """Calls `steps` one after the other, the last one again and again, each as soon as so many shards are complete and
    until it says that it is done; `count` says how many are."""

    def __init__(self, out: Path, numbers: list[int], *steps) -> None:
        super().__init__(daemon=True)
        self.out, self.numbers, self.steps, self.count, self.over = out, numbers, steps, 0, False

    def run(self) -> None:
        for number in self.numbers:
            step = self.steps[min(self.count, len(self.steps) - 1)]
            while not self.over and (complete(self.out) < number or not step()):
                time.sleep(0.01)
            self.count += not self.over

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.over = True
        self.join()
