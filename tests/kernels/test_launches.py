"""How many programs each launcher asks for: within CUDA's limits for huge batches, enough of them for small ones."""

from math import prod

import pytest
import torch
from launches import Sizes, gather_kernels, record
from mlpool_kernels import tiles

from mlpool.pooling import select_tokens
from mlpool.taps import _add_rows, _pool_rows

LIMITS = (2**31 - 1, 65_535, 65_535)
SMALL = Sizes(torch.bfloat16, 24, 64, 8, 8)
# Descriptors need Triton itself: test_binaries.py looks at their grid.
KERNELS = [name for name in tiles.TILES if name != "feed_forward_tma"]


@pytest.mark.parametrize("batch", [1, 100_000])
@pytest.mark.parametrize("tokens", [4, 1 << 20])
@pytest.mark.parametrize("name", KERNELS)
def test_grids_are_within_the_limits(monkeypatch, name, batch, tokens):
    for launch in record(monkeypatch, name, None, SMALL._replace(batch=batch, tokens=tokens), "meta"):
        grid = (*launch.grid, 1, 1)[:3]
        assert all(0 < size <= most for size, most in zip(grid, LIMITS, strict=True)), (name, launch.grid)


@pytest.mark.parametrize("hidden", [384, 896, 1536, 4096])
@pytest.mark.parametrize("layers", [1, 24])
@pytest.mark.parametrize("name", ["mean", "unit_mean", "gather_backward"])
def test_one_long_text_fills_the_card(monkeypatch, name, layers, hidden):
    """Two programs for each of the 132 multiprocessors, all layers at once and layer by layer, as taps ask."""
    sizes = Sizes(torch.bfloat16, layers, hidden, 8, 8, batch=1, tokens=8192)
    assert prod(record(monkeypatch, name, None, sizes, "meta")[0].grid) >= 2 * 132


@pytest.mark.parametrize(("batch", "hidden", "least"), [(1, 896, 14), (1, 4096, 64), (64, 896, 2 * 132)])
def test_mix_has_programs_enough(monkeypatch, batch, hidden, least):
    sizes = Sizes(torch.bfloat16, 24, hidden, 64, 8, batch=batch)
    for launch in record(monkeypatch, "mix", None, sizes, "meta"):
        assert prod(launch.grid) >= least


def test_many_texts_have_one_program_each(monkeypatch):
    """So that each row is read twice, not twice for every block of columns."""
    for launch in record(monkeypatch, "attend_text", None, Sizes(torch.bfloat16, 24, 896, 64, 8), "meta"):
        assert launch.grid == (128,)


def test_taps_launch_the_same_kernels(monkeypatch):
    """One layer at a time, forward and backward; the gradient of the hidden state itself is added in the launch."""
    hidden = torch.zeros(2, 5, 16)
    tokens = select_tokens(hidden.shape, hidden.device, torch.ones(2, 5))
    launches = record(monkeypatch, "mean", None, SMALL)
    launches.clear()
    _pool_rows(hidden, tokens, "mean")
    _add_rows(torch.zeros(10, 16), torch.zeros(2, 16), tokens, "mean")
    kernels = [launch.kernel for launch in launches]
    assert kernels == [gather_kernels._mean_kernel.kernel, gather_kernels._backward_kernel.kernel]
    assert [len(launch.args[0]) for launch in launches] == [1, 1]
    assert launches[1].args[2] is not None
