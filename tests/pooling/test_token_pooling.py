"""Unit means and skipped tokens in every pool, padded and packed, saved and loaded."""

import pytest
import torch
from conftest import assert_close_to_equations, make_mask, make_states, multi
from mlpool_kernels.gather import gather as gather_rows
from torch.nn.functional import normalize, pad
from torch.utils.checkpoint import checkpoint

from mlpool import LastLayerPool, LayerWeightsPool, MeanPool, MultiLayerPool
from mlpool.pooling import gather

B, T, D, L = 3, 7, 16, 4


@pytest.mark.parametrize("padding", ["left", "right"])
def test_unit_mean_against_the_equations(padding, target):
    pool = multi(D, L, target, token_pooling="unit_mean")
    assert_close_to_equations(pool, make_states(L, (B, T, D), target), make_mask(B, T, padding))


@pytest.mark.parametrize("how", ["mean", "unit_mean"])
def test_skipped_tokens(how, target):
    """The first two tokens of every text, whatever token_mask says, padded left and right, and packed."""
    states = make_states(L, (B, T, D), target)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).to(target.device)
    kept = torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1]]).to(target.device)
    options = {"token_pooling": how, "backend": target.backend}
    token_mask = torch.ones_like(mask).index_fill_(1, torch.tensor(3, device=mask.device), 0)
    token_mask[1:] = 1
    for more in (None, token_mask):
        both = kept if more is None else kept * more
        want = gather(states, both, **options)
        got = gather(states, mask, skip_tokens=2, token_mask=more, **options)
        assert torch.equal(got, want)
        packed = [s[mask.bool()] for s in states]
        offsets = pad(mask.sum(1).cumsum(0), (1, 0))
        got = gather(
            packed, cu_seqlens=offsets, skip_tokens=2, token_mask=None if more is None else more[mask.bool()], **options
        )
        torch.testing.assert_close(got, want)


def test_pools_skip_and_unit(tmp_path):
    """Each pool passes both on, and keeps them when saved."""
    states, mask = make_states(L, (B, T, D)), torch.ones(B, T)
    kept = mask.clone()
    kept[:, 0] = 0
    units = [normalize(s, dim=-1) for s in states]
    options = {"token_pooling": "unit_mean", "skip_tokens": 1}
    plain = {**options, "token_pooling": "mean", "skip_tokens": 0}
    for make in (
        lambda **o: MeanPool(D, **o),
        lambda **o: LayerWeightsPool(D, L, **o),
        lambda **o: multi(D, L, **o),
    ):
        pool = make(**options)
        more = {} if isinstance(pool, MeanPool) else {"includes_embedding": False}
        want = make(**plain)(units, kept, **more)
        torch.testing.assert_close(pool(states, mask, **more), want)
        pool.save_pretrained(tmp_path)
        torch.testing.assert_close(type(pool).from_pretrained(tmp_path)(states, mask, **more), want)


def test_wrong_choices():
    states, mask = make_states(L, (B, T, D)), make_mask(B, T)
    with pytest.raises(ValueError, match=r"no token left by attention_mask and skip_tokens=1 in row\(s\) \[2\]"):
        gather(states, mask, token_pooling="mean", skip_tokens=1)
    with pytest.raises(ValueError, match=r"no token left by skip_tokens=2 in row\(s\) \[0\]"):
        gather([s[0] for s in states], cu_seqlens=torch.tensor([0, 2, 7]), token_pooling="mean", skip_tokens=2)
    for wrong in (-1, 1.0, True):
        with pytest.raises(ValueError, match="skip_tokens must be an integer of at least 0"):
            MultiLayerPool(D, L, token_pooling="mean", skip_tokens=wrong)
    for make in (lambda **o: MultiLayerPool(D, L, **o), lambda **o: LayerWeightsPool(D, L, **o)):
        with pytest.raises(ValueError, match="skip_tokens=2 leaves the first tokens out of a mean, and"):
            make(token_pooling="last", skip_tokens=2)
    with pytest.raises(ValueError, match='"mean" or "unit_mean", got "last"; that is EosPool'):
        MeanPool(D, token_pooling="last")
    with pytest.raises(ValueError, match=r"token_pooling must be one of \('last', 'mean'\), got 'unit_mean'"):
        LastLayerPool(D, token_pooling="unit_mean")


@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
def test_gradients_behind_a_checkpoint(how, target):
    """A checkpointed forward hands out what it saved a single time."""
    states = [s.requires_grad_() for s in make_states(L, (B, T, D), target)]
    mask, options = make_mask(B, T).to(target.device), {"token_pooling": how, "backend": target.backend}
    want = torch.autograd.grad(gather(states, mask, **options).square().sum(), states)
    pooled = checkpoint(lambda *layers: gather(layers, mask, **options), *states, use_reentrant=False)
    for got, right in zip(torch.autograd.grad(pooled.square().sum(), states), want, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("token_pooling", ["mean", "unit_mean"])
def test_spans_that_are_changed_are_read_again(token_pooling):
    """What is worked out once for all layers of a forward is not taken for another's tokens."""
    state = torch.randn(7, 4, dtype=torch.float64)
    starts, ends, last, count = (torch.tensor(values) for values in ([0, 3], [3, 7], [2, 6], [3, 4]))

    def rows(keep=None):
        spans = (starts, ends, last, count, keep)
        return gather_rows([state], *spans, True, "torch", unit=token_pooling == "unit_mean")[:, 0]

    before = rows()
    torch.testing.assert_close(rows(), before, rtol=0, atol=0)
    keep = torch.ones(7, dtype=torch.bool)
    torch.testing.assert_close(rows(keep), before)
    starts[1] = ends[0] = 5
    last[0], count[0], count[1] = 4, 5, 2
    x = normalize(state, dim=1) if token_pooling == "unit_mean" else state
    torch.testing.assert_close(rows(), torch.stack([x[:5].mean(0), x[5:].mean(0)]))
