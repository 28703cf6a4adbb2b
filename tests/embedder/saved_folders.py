"""Folders of saved embedders, whole and with an adapter, and copies to damage; a test module takes them by name."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch

from mlpool.embedder import add_lora, load

LORA = {"rank": 2, "dropout": 0.0}


def close(got, expected, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), atol=atol, rtol=0)


def change(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.embedder().save(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter on a base of its own, model beside base."""
    root = tmp_path_factory.mktemp("adapter")
    shutil.copytree(tiny.base("llama"), root / "base")
    embedder = add_lora(load(root / "base", "multi-layer-bidirectional", tiny.SMALL), **LORA)
    tiny.shake(embedder[1])
    tiny.shake(embedder[0].model, 0.1, only="lora_B")
    embedder.save(root / "model")
    return root


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def adapter_copy(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter / "model", tmp_path / "adapter"))
