"""The steps' kernels by themselves, run by Triton's interpreter on the CPU: gather to embed, and contrast.

In a process of its own, as test_interpreter.py: TRITON_INTERPRET=1 pytest tests/kernels/test_interpreter_steps.py
"""

import importlib
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process of its own: TRITON_INTERPRET=1 pytest tests/kernels/test_interpreter_steps.py",
        allow_module_level=True,
    )

import torch
from conftest import INTERPRETER, make_mask, make_states
from contrast_cases import OPTIONS, assert_three_ways, texts
from contrast_cases import SIZES as CONTRAST
from mlpool_kernels import reference
from mlpool_kernels.contrast import contrast
from mlpool_kernels.gather import gather_backward
from test_ops import check_embed, check_select, unit_batch

from mlpool.pooling import gather, select_tokens

NAMES = ("contrast", "embed", "gather_kernels", "feed_forward", "rows", "sums")
CONTRASTIVE, EMBED, GATHER, feed_forward, ROWS, SUMS = (
    importlib.import_module(f"mlpool_kernels.{name}") for name in NAMES
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# NumPy warns: lanes past the end of a row, never stored, divide zero by zero; some tests feed Inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


# --- feed-forward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "latents", "hidden", "width"),
    # Latents that divide a tile share it with other texts; tiles that end inside texts, D and F; groups of tiles.
    [(3, 9, 72, 40), (35, 8, 16, 72), (2, 130, 48, 130), (3, 64, 64, 100), (300, 1, 24, 16), (3, 7, 20, 33)],
)
def test_feed_forward_by_pointers_and_by_descriptors(batch, latents, hidden, width, dtype):
    """A tile of the copy engine reads rows of other texts and units of the other half, here NaN: none may count."""
    generator = torch.Generator().manual_seed(0)
    normed, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((batch, latents, hidden), (2 * width, hidden), (2 * width,))
    )
    normed[1] = torch.nan
    others = torch.arange(batch) != 1

    def plain(precision):
        both = (normed[others].to(precision) @ weight.to(precision).T) + bias.to(precision)
        a, g = both.chunk(2, -1)
        return (a * torch.nn.functional.gelu(g)).mean(1).double()

    exact = plain(torch.float64)
    limit = max(2 * (plain(dtype) - exact).norm() / exact.norm(), torch.finfo(dtype).eps)
    fits = feed_forward.takes_descriptors(normed, weight)
    assert fits == (dtype != torch.float32 and hidden % 8 == 0)
    for descriptors in (False, True) if fits else (False,):
        got = feed_forward._feed_forward_triton(normed, weight, bias, descriptors)
        assert (got[others].double() - exact).norm() / exact.norm() <= limit
        assert got[1].isnan().all()


# --- gather --------------------------------------------------------------------------------------------------------


def rounding(dtype):
    eps = torch.finfo(dtype).eps
    return {"rtol": 4 * eps, "atol": 8 * eps} if dtype == torch.float32 else {"rtol": eps, "atol": eps}


def assert_same(got, states, want, wide):
    """Values, and gradients by the states, to the precision of `got`; want and wide are their float64 counterparts."""
    close = rounding(got.dtype)
    torch.testing.assert_close(got.double(), want, **close)
    grad = torch.randn(want.shape).to(got.dtype)
    for mine, exact in zip(
        torch.autograd.grad(got, states, grad), torch.autograd.grad(want, wide, grad.double()), strict=True
    ):
        torch.testing.assert_close(mine.double(), exact, **close)


@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
@pytest.mark.parametrize(
    ("layers", "hidden", "dtype"),
    [*((*size, dtype) for size in ((1, 7), (3, 300)) for dtype in DTYPES), (20, 16, torch.bfloat16)],
)
def test_gather(layers, hidden, how, dtype):
    """Values and gradients of padded states, and of the same texts packed."""
    batch, tokens = (2, 3) if layers == 20 else (3, 20)
    mask = make_mask(batch, tokens, "left")
    states = [s.requires_grad_() for s in make_states(layers, (batch, tokens, hidden), dtype=dtype)]
    wide = [s.detach().double().requires_grad_() for s in states]
    got, want = gather(states, mask, token_pooling=how, backend="triton"), reference.gather(wide, mask, how)
    assert_same(got, states, want, wide)

    packed = [s.detach()[mask.bool()] for s in states]
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    for view in (packed, [p[None] for p in packed]):
        again = gather(view, cu_seqlens=offsets, token_pooling=how, backend="triton")
        torch.testing.assert_close(again.double(), want, **rounding(dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["mean", "unit_mean"])
@pytest.mark.parametrize("packed", [False, True])
def test_long_texts_are_summed_in_parts(packed, how, dtype, monkeypatch):
    """Texts of 1 to 75 rows in up to 8 parts, some empty, a left-out run at a part's edge; and the gradients."""
    monkeypatch.setattr(GATHER, "PART_ROWS", 10)
    monkeypatch.setattr(GATHER, "PROGRAMS", 1000)
    kernel = GATHER._mean_kernel
    grids = []
    monkeypatch.setattr(GATHER, "_mean_kernel", _Counted(kernel, grids))
    mask = make_mask(3, 75, "left")
    mask[0, 18:31] = 0
    states = make_states(2, (3, 75, 37), dtype=dtype)
    where = {"attention_mask": mask}
    if packed:
        rows = torch.cat([torch.arange(75 * b, 75 * b + 75)[n:] for b, n in enumerate((0, 40, 74))])
        states = [s.flatten(0, 1)[rows] for s in states]
        keep = torch.ones(len(rows), dtype=torch.bool)
        keep[18:31] = False
        where = {"cu_seqlens": torch.tensor([0, 75, 110, 111]), "token_mask": keep}
    states = [s.requires_grad_() for s in states]
    wide = [s.detach().double().requires_grad_() for s in states]
    got = gather(states, token_pooling=how, backend="triton", **where)
    want = gather(wide, token_pooling=how, backend="torch", **where)
    assert len(grids) == 2  # the parts, and their sum
    assert grids[0][0] > 3
    assert_same(got, states, want, wide)


class _Counted:
    """A kernel that notes the grids it is launched with."""

    def __init__(self, kernel, grids):
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
def test_a_gradient_added_to_the_state_s_own(how, dtype):
    """As taps ask, with rows before, between and behind packed texts; out of place; the same numbers as in torch."""
    mask = torch.tensor([[0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]])
    padded = select_tokens((2, 6, 20), torch.device("cpu"), mask)
    packed = select_tokens((1, 12, 20), torch.device("cpu"), None, torch.tensor([1, 2, 8, 11]))
    for t in (padded, packed):
        grad = torch.randn(t.batch_size, 1, 20).to(dtype)
        added = torch.randn(12, 20).to(dtype)
        given = added.clone()
        spans = (t.starts, t.ends, t.last, t.count, t.keep, how != "last")
        states = [torch.randn((*t.shape, 20)).to(dtype)] if how == "unit_mean" else []
        for more in (None, added):
            got, want = (
                gather_backward(grad, (12, 20), *spans, backend, more, states)[0] for backend in ("triton", "torch")
            )
            torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        assert torch.equal(added, given)
    grad = torch.randn(2, 1, 20, requires_grad=True)
    spans = (padded.starts, padded.ends, padded.last, padded.count, padded.keep, True)
    (again,) = gather_backward(grad, (12, 20), *spans, "triton")
    with pytest.raises(RuntimeError, match="autograd"):  # a kernel cannot be differentiated again: said, not wrong
        again.sum().backward()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_mean_of_zeros_and_nan(dtype):
    """As in torch, with zero tokens, a text of zeros alone and padding of NaN."""
    states, _, mask = unit_batch(dtype, INTERPRETER)
    got, want = (gather(states, mask, token_pooling="unit_mean", backend=backend) for backend in ("triton", "torch"))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=2 * eps, atol=2 * eps)
    grad = torch.randn(want.shape).to(dtype)
    for mine, theirs in zip(*(torch.autograd.grad(out, states, grad) for out in (got, want)), strict=True):
        # A tiny token's gradient is huge, a huge one's tiny: row by row.
        torch.testing.assert_close(mine, theirs, rtol=8 * eps, atol=4 * eps * theirs.abs().max().item())
        assert not mine[2].any()
        assert not mine[mask == 0].any()


# --- rows, sums ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixing", [True, False])
def test_rows_and_their_backward(mixing, dtype):
    """As in torch, with a row of zeros, one of huge and one of tiny numbers; a row without a number alone is NaN."""
    new = torch.Generator().manual_seed(0)
    x0, grad = (torch.randn(7, 5, 33, generator=new).to(dtype) for _ in range(2))
    x0[0, 1], x0[1, 2], x0[2, 3], x0[3, 0, 4] = 0, x0[1, 2] * 1e4, x0[2, 3] * 1e-4, torch.inf
    added = torch.randn(7, 33, generator=new)
    weights = [torch.randn(shape, generator=new).to(dtype) for shape in ((5,), (5, 33), (33,), (33,))]
    norm = ROWS.Norm(*weights if mixing else (None, *weights[1:]))
    _, *got = ROWS.norm_rows_triton([x0], None, norm, dtype)
    want = ROWS.norm_rows(x0, norm, dtype)
    dx, parts = ROWS.norm_rows_backward_triton(grad, x0, norm, added if mixing else None, summed=True)
    dx_torch, grads = ROWS.norm_rows_backward(grad, x0, norm, added if mixing else None)
    got += [dx, *SUMS.sum_parts({str(i): p for i, p in enumerate(parts) if p is not None}, 7, torch.float32).values()]
    want = [*want, dx_torch, *(g.flatten() for g in grads if g is not None)]
    for mine, right in zip([t for t in got if t is not None], [t for t in want if t is not None], strict=True):
        # Of a tiny row the gradient is huge, and of a huge one tiny.
        close = {"rtol": 8 * torch.finfo(mine.dtype).eps, "atol": 1e-5 * right.nan_to_num().abs().max().item()}
        torch.testing.assert_close(mine.flatten(), right.flatten(), equal_nan=True, **close)
    assert got[0][3, 0].isnan().all()
    assert not mixing or not dx[0, 1].any()


def test_sums_of_parts():
    parts = {"text": torch.randn(5, 70), "few": torch.randn(1, 300), "many": torch.randn(133, 9)}
    for dtype in (torch.float32, torch.bfloat16):
        for name, got in SUMS.sum_parts(parts, 5, dtype).items():
            torch.testing.assert_close(got, parts[name].sum(0).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


# --- embed, select ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("base", "gate", "normalize"), [(True, True, True), (True, False, False), (False, False, True)]
)
def test_embed(base, gate, normalize, dtype):
    check_embed(base, gate, normalize, dtype, INTERPRETER, hidden=72)


def test_embed_of_zeros_of_huge_numbers_and_of_nan():
    rows = torch.tensor([[0.0, 0, 0], [3e30, 4e30, 0], [3e-38, 4e-38, 0], [torch.nan, 1, 0]])
    zeros = torch.zeros(3)
    e = EMBED.embed(rows, zeros, torch.zeros(4, 3), None, None, True, torch.float32, "triton")
    torch.testing.assert_close(e[:3], torch.tensor([[0, 0, 0], [0.6, 0.8, 0], [0.6, 0.8, 0]]), rtol=1e-6, atol=1e-6)
    assert e[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize(("skip", "second"), [(0, False), (2, True)])
@pytest.mark.parametrize("length", [7, 2500])
def test_select(length, skip, second, dtype):
    check_select(INTERPRETER, length, skip, second, dtype)


# --- contrast ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "m", "hidden", "workspace"), [(*CONTRAST[0], 1 << 20), (*CONTRAST[1], 32 << 10)])
def test_contrast(n, m, hidden, options, dtype, workspace, monkeypatch):
    """Losses and gradients, with every mask and with prefixes, the weights in one block and in many."""
    monkeypatch.setattr(CONTRASTIVE, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(CONTRASTIVE, "PARTS", workspace >> 10)
    arguments, options = texts(n, m, hidden, dtype, OPTIONS[options])
    assert_three_ways(lambda *a, **o: contrast(*a, **o, backend="triton"), arguments, options)


def test_opcheck_contrast():
    (rows, others, partners), options = texts(5, 9, 8, torch.float32, OPTIONS["all"])
    given = (partners, options["row_keys"], options["other_keys"], torch.full((5,), 0.5), [2, 5], 0.1, "triton")
    torch.library.opcheck(torch.ops.mlpool.contrast.default, (rows.requires_grad_(), others.requires_grad_(), *given))
