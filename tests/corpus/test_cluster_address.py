"""What is said of a cluster before Ray is asked; the cluster itself is in tests/cluster, which needs Ray."""

import importlib.util
import socket

import pytest
from many_texts import encode, some_texts, write_jsonl

from mlpool.corpus import cluster


def test_no_address():
    for address in ("texts.jsonl", "host:", ":6379", "http://host:6379/x", "host:port"):
        with pytest.raises(ValueError, match=r"is no address of a Ray cluster; expected HOST:PORT.*stand before --ray"):
            cluster._check_answers(address)


def test_nobody_answers():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for form in (address, f"ray://{address}"):
            with pytest.raises(ConnectionError, match=rf"no Ray cluster answers at {form} \(.*refused.*ray status"):
                cluster._check_answers(form)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(3))
    with pytest.raises(ModuleNotFoundError, match=r"--ray needs Ray: pip install 'mlpool\[ray\]'"):
        encode(path, tmp_path / "out", ray="local")


def test_options(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(3))
    for options, message in (
        ({"actors": 0}, "actors must be an integer of at least 1"),
        ({"cores": 0}, "cores must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(path, tmp_path / "out", ray="local", **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, and ray spreads the work itself"):
        encode(path, tmp_path / "out", ray="local")
