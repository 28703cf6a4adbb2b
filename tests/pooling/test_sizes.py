"""The default pool beside the backbones that docs/pools.md names."""

from __future__ import annotations

import pytest

from mlpool import MultiLayerPool

# hidden size, layers, parameters in millions (of the published models)
SMALL = {
    "Qwen2-0.5B": (896, 24, 494),
    "Qwen3-0.6B": (1024, 28, 596),
    "Gemma2-2B": (2304, 26, 2614),
    "Mistral-7B": (4096, 32, 7242),
}
WIDE = {"Llama-3.2-1B": (2048, 16, 1236), "OPT-1.3B": (2048, 24, 1316), "StableLM-2-1.6B": (2048, 24, 1644)}


def share(hidden: int, layers: int, millions: int, whiten: bool = False) -> float:
    pool = MultiLayerPool(hidden, layers, whiten=whiten, device="meta")
    return sum(p.numel() for p in pool.parameters()) / (millions * 1e6)


@pytest.mark.parametrize("name", SMALL)
def test_default_pool_is_under_a_hundredth(name):
    assert 0.005 < share(*SMALL[name]) <= 0.01
    assert share(*SMALL[name], whiten=True) < 0.011


@pytest.mark.parametrize("name", WIDE)
def test_wide_shallow_backbones_are_the_exception(name):
    assert 0.01 < share(*WIDE[name]) < 0.0145
