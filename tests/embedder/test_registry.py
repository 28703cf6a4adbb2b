"""Pools and designs of a user's own: registered or announced, saved, reloaded, trained and studied like ours."""

import json
import sys
import textwrap

import pytest
import tiny
import torch
from torch import Tensor

import mlpool
from mlpool.embedder import designs
from mlpool.embedder.designs import DESIGNS, find_design
from mlpool.pooling import registry
from mlpool.pooling.registry import find_pool


class PowerPool(mlpool.Pool):
    """The mean over layers of one row each, times a learned vector: enough to see weights, sizes and layers."""

    reads_all_layers = True

    def __init__(self, hidden_size: int, num_layers: int, token_pooling: str = "mean", power: float = 1.0) -> None:
        super().__init__()
        self.hidden_size, self.num_layers, self.token_pooling, self.power = (
            hidden_size,
            num_layers,
            token_pooling,
            power,
        )
        self.normalize = True
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states=None, attention_mask=None, *, layer_states: Tensor | None = None) -> Tensor:
        rows = layer_states.mean(1) if layer_states is not None else mlpool.gather(hidden_states[1:], attention_mask)
        return self._finish(self.weight * rows * self.power)


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is gone behind it."""
    monkeypatch.setattr(registry, "POOLS", dict(registry.POOLS))
    monkeypatch.setattr(designs, "DESIGNS", dict(designs.DESIGNS))
    monkeypatch.setattr(tiny, "DESIGNS", designs.DESIGNS)


def test_a_design_of_ones_own_is_saved_and_reloaded(registered, tmp_path):
    mlpool.register_design("power", "bidirectional", PowerPool)
    embedder = tiny.embedder("power", pooler={"power": 2.0})
    with torch.no_grad():
        embedder[1].pool.weight.mul_(torch.arange(embedder[1].pool.hidden_size) + 1.0)
    expected = embedder.encode(tiny.TEXTS)
    embedder.save(str(tmp_path / "out"))
    assert json.loads((tmp_path / "out/1_Pooler/config.json").read_text())["package"] == __name__.partition(".")[0]
    again = mlpool.load(tmp_path / "out")
    assert again[1].pool.power == 2.0
    torch.testing.assert_close(torch.tensor(again.encode(tiny.TEXTS)), torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_folder_that_needs_an_absent_package_names_it(registered, tmp_path):
    mlpool.register_design("power", "bidirectional", PowerPool)
    tiny.embedder("power").save(str(tmp_path / "out"))
    designs.DESIGNS.pop("power")
    with pytest.raises(ModuleNotFoundError, match=r"design 'power' comes from the package '\w+', which is not"):
        mlpool.load(tmp_path / "out")
    with pytest.raises(ModuleNotFoundError, match="pool 'Unknown' comes from the package 'somebody'"):
        find_pool("Unknown", "somebody")


def test_an_installed_package_announces_them(registered, tmp_path, monkeypatch):
    """A distribution with entry points, found without an import by hand."""
    (tmp_path / "theirs.py").write_text(
        textwrap.dedent(
            """
            import mlpool
            from mlpool.embedder.designs import Design

            class TheirPool(mlpool.MeanPool):
                pass

            DESIGN = Design("their-design", None, "bidirectional", TheirPool, "mean")
            """
        )
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mlpool.pools]\nTheirPool = theirs:TheirPool\n\n[mlpool.designs]\ntheir-design = theirs:DESIGN\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "theirs" not in sys.modules
    design = find_design("their-design")
    monkeypatch.delitem(sys.modules, "theirs")
    assert (design.pool.__name__, design.package) == ("TheirPool", "theirs")
    assert find_pool("TheirPool") is design.pool


def test_what_cannot_be_registered(registered):
    with pytest.raises(TypeError, match=r"takes a subclass of mlpool\.Pool, got"):
        mlpool.register_pool(torch.nn.Linear)
    with pytest.raises(ValueError, match="attention must be one of"):
        mlpool.register_design("power", "sideways", PowerPool)
    with pytest.raises(ValueError, match="must be a word, and no number"):
        mlpool.register_design("7", "causal", PowerPool)
    with pytest.raises(ValueError, match="there is a design 'eos-causal' already"):
        mlpool.register_design("eos-causal", "causal", PowerPool)
    other = type("MeanPool", (mlpool.Pool,), {})
    with pytest.raises(ValueError, match="there is a pool MeanPool of mlpool"):
        mlpool.register_pool(other)


def test_our_own_need_no_package():
    assert all(design.package is None for design in DESIGNS.values())
    assert find_design(5).pool is mlpool.MultiLayerPool
