"""Whitening: the formula, the start, calibrating, and that no path of the pool leaves it out."""

import json

import pytest
import torch
import torch.nn.functional as F

from mlpool import LastLayerPool, MultiLayerPool
from mlpool.pooling.whitening import SHRINKAGE

B, L, D = 40, 3, 12
SMALL = {"num_latents": 4, "num_heads": 2, "head_dim": 4, "start": "all", "whiten": True}


@pytest.fixture
def x0() -> torch.Tensor:
    """Rows in a narrow cone, some directions of much variance and some of none."""
    torch.manual_seed(0)
    return 3 + torch.randn(B, L, D, dtype=torch.float64) * torch.logspace(0, -3, D, dtype=torch.float64)


def pool(moved: bool = False, **changes) -> MultiLayerPool:
    torch.manual_seed(1)
    made = MultiLayerPool(D, L, **{**SMALL, "dtype": torch.float64, **changes})
    if moved:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def plain(made: MultiLayerPool, x0: torch.Tensor) -> torch.Tensor:
    """v of the same weights without whitening."""
    other = pool(whiten=False, normalize=False)
    other.load_state_dict({name: t for name, t in made.state_dict().items() if name != "whitening"})
    return other(layer_states=x0)


def test_of_the_texts_it_was_calibrated_by_nothing_is_alike_and_the_covariance_is_shrunken(x0):
    made = pool(normalize=False)
    v = made(layer_states=x0)
    made.calibrate(v)
    white = made(layer_states=x0)
    torch.testing.assert_close(white.mean(0), torch.zeros(D, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(white.square().sum(1).mean(), torch.tensor(float(D), dtype=torch.float64))
    values, vectors = torch.linalg.eigh(torch.cov(v.T, correction=0))
    wanted = values / (values + SHRINKAGE * values.mean())
    found = vectors.T @ torch.cov(white.T, correction=0) @ vectors
    torch.testing.assert_close(found, torch.diag(wanted) * (D / wanted.sum()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("folded", [False, True])
def test_it_is_a_matrix_on_the_embedding(x0, folded):
    made = pool(moved=True)
    expected = F.normalize(plain(made, x0) @ made.whitening.T, dim=-1)
    used = made.eval().fold() if folded else made
    torch.testing.assert_close(used(layer_states=x0), expected)


def test_before_it_is_calibrated_nothing_changes(x0):
    torch.testing.assert_close(pool()(layer_states=x0), F.normalize(plain(pool(), x0), dim=-1))
    assert pool().uncalibrated
    assert not pool(moved=True).uncalibrated
    assert not pool(whiten=False).uncalibrated


def test_what_goes_into_the_matrix_has_the_length_that_the_branch_is_made_for(x0):
    made = pool(normalize=False)
    made.calibrate(made(layer_states=x0))
    v = plain(made, x0)
    torch.testing.assert_close(v.mean(0), torch.zeros(D, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(v.square().sum(1).mean(), torch.tensor(float(D), dtype=torch.float64))


def test_gradients(x0):
    made = pool(moved=True)

    def embedding(matrix, rows):
        return torch.func.functional_call(made, {"whitening": matrix}, kwargs={"layer_states": rows})

    inputs = (made.whitening.detach().requires_grad_(), x0[:2].clone().requires_grad_())
    assert torch.autograd.gradcheck(embedding, inputs)


def test_saved_and_loaded(x0, tmp_path):
    made = pool()
    with made.unnormalized():
        rows = made(layer_states=x0)
    made.calibrate(rows)
    made.save_pretrained(tmp_path)
    loaded = MultiLayerPool.from_pretrained(tmp_path)
    assert not loaded.uncalibrated
    assert torch.equal(loaded(layer_states=x0), made(layer_states=x0))


def test_a_folder_from_before_has_none(x0, tmp_path):
    pool(whiten=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("whiten") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MultiLayerPool.from_pretrained(tmp_path).whitening is None


def test_compiled_without_a_break(x0):
    made = pool(moved=True).eval()
    whole = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(layer_states=x0), made(layer_states=x0))


def test_what_cannot_be_calibrated_says_why(x0):
    with pytest.raises(ValueError, match="nothing to calibrate"):
        pool(whiten=False).calibrate(x0[:, 0])
    with pytest.raises(ValueError, match="calibrated or trained before"):
        pool(moved=True).calibrate(x0[:, 0])
    with pytest.raises(ValueError, match=r"embeddings must be \[N, 12\]"):
        pool().calibrate(x0)
    with pytest.raises(ValueError, match="at least 2 texts, got 1"):
        pool().calibrate(x0[:1, 0])
    with pytest.raises(ValueError, match="all alike"):
        pool().calibrate(x0[:1, 0].expand(5, D))
    with pytest.raises(ValueError, match="no mix to whiten"):
        MultiLayerPool(D, L, residual=False, whiten=True)
    with pytest.raises(ValueError, match="whiten must be True or False"):
        MultiLayerPool(D, L, whiten=1)
    with pytest.raises(TypeError, match="whiten"):
        LastLayerPool(D, whiten=True)
