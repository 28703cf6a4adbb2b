"""The contrastive op by itself: against every score at once, exact gradients, torch's checks, memory."""

import importlib

import pytest
import torch
from contrast_cases import OPTIONS, SIZES, assert_three_ways, eager, results, texts
from mlpool_kernels.contrast import contrast

module = importlib.import_module("mlpool_kernels.contrast")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(module, "CACHED_NUMBERS", 600)


@pytest.mark.usefixtures("blocks", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "m", "hidden"), SIZES)
def test_three_ways(n, m, hidden, options, dtype):
    arguments, options = texts(n, m, hidden, dtype, OPTIONS[options])
    assert_three_ways(lambda *a, **o: contrast(*a, **o, backend="torch"), arguments, options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "m", "hidden"), [*SIZES, (700, 1500, 256)])
def test_three_ways_on_a_card(n, m, hidden, options, dtype):
    arguments, options = texts(n, m, hidden, dtype, OPTIONS[options])

    def run(*tensors, **given):
        given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        return contrast(*(t.cuda() for t in tensors), **given, backend="triton")

    assert_three_ways(run, arguments, options)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    (rows, others, partners), options = texts(5, 9, 8, torch.float64, OPTIONS[options])
    leaves = [rows.requires_grad_(), others.requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: contrast(a, b, partners, **options), leaves, fast_mode=True)


@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck(options):
    (rows, others, partners), options = texts(5, 9, 8, torch.float32, OPTIONS[options])
    bound = torch.full((5,), 0.5) if "margin" in options else None
    given = (partners, options.get("row_keys"), options.get("other_keys"), bound, options.get("dims", [8]), 0.1)
    torch.library.opcheck(
        torch.ops.mlpool.contrast.default, (rows.requires_grad_(), others.requires_grad_(), *given, "torch")
    )


def test_compiles_whole():
    (rows, others, partners), options = texts(5, 9, 8, torch.float32, OPTIONS["all"])

    def run(*tensors, **given):
        return contrast(*tensors, **given)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(*(results(f, rows, others, partners, options) for f in (compiled, run)), strict=True):
        torch.testing.assert_close(got, want)


def test_strided_texts():
    """What a transposed product or every other row is: read as it is."""
    (rows, others, partners), options = texts(20, 40, 16, torch.float32, OPTIONS["keys"])
    want = results(contrast, rows, others, partners, options)
    wide = torch.empty(40, 40)
    wide[:, :16] = others
    for a, b in ((rows.T.contiguous().T, wide[:, :16]), (rows.repeat_interleave(2, 0)[::2], others)):
        for got, right in zip(results(contrast, a, b, partners, options), want, strict=True):
            torch.testing.assert_close(got, right)


def test_extremes():
    """Nothing left to compare with is 0, with a gradient of 0; a vector of zeros has cosine 0; NaN is not hidden."""
    rows, others = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    keys = torch.ones(3, 2, dtype=torch.int64)
    alone = contrast(rows, others, torch.arange(3), temperature=0.05, row_keys=keys, other_keys=keys)
    assert alone.tolist() == [[0.0, 0.0, 0.0]]
    assert not torch.autograd.grad(alone.sum(), rows)[0].any()
    zero = torch.zeros(1, 4)
    assert contrast(zero, others, torch.tensor([1]), temperature=1).item() == pytest.approx(1.0986123)
    others[2, 1] = torch.nan
    for given in ({}, {"margin": 0.1}):
        assert contrast(rows.detach(), others, torch.zeros(3, dtype=torch.int64), temperature=1, **given).isnan().all()


@pytest.mark.parametrize(("length", "weight"), [(100, 1), (1e-2, 1e-4)])
def test_scale_does_not_matter(length, weight):
    """Gradients of float16 neither vanish nor overflow with long or short vectors, or a small weight of the loss."""
    (rows, others, partners), options = texts(40, 80, 16, torch.float16, {})
    rows, others = rows * length, others * length
    got = results(lambda *a, **o: contrast(*a, **o) * weight, rows, others, partners, options)
    want = results(lambda *a, **o: eager(*a, **o) * weight, rows.double(), others.double(), partners, options)
    for mine, right in zip(got[1:], want[1:], strict=True):
        assert (mine - right).norm() < 2e-2 * right.norm()


def test_memory_of_many_texts(monkeypatch):
    """Beyond the gradients, a sixteenth of what all scores take at the least."""
    from torch.autograd.profiler import profile

    monkeypatch.setattr(module, "CACHED_NUMBERS", 1 << 14)
    rows, others = (torch.randn(n, 16).requires_grad_() for n in (1024, 2048))

    def run(loss):
        with profile(profile_memory=True) as profiler:
            grads = torch.autograd.grad(loss(rows, others, torch.arange(1024), temperature=0.05).mean(), [rows, others])
        alive = most = 0
        for event in profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                most = max(most, alive)
        return most - sum(g.nbytes for g in grads)

    assert 16 * run(contrast) < run(eager)


def test_bitwise_from_run_to_run():
    (rows, others, partners), options = texts(70, 150, 40, torch.bfloat16, OPTIONS["all"])
    first, second = (results(contrast, rows, others, partners, options) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"others": torch.zeros(5, 7)}, r"one dtype, got \[3, 8\] torch.float32 and \[5, 7\] torch.float32"),
        ({"others": torch.zeros(5, 8).half()}, r"one dtype.*torch.float16"),
        ({"dims": [8, 4]}, r"rising prefixes of the 8 numbers.*got \[8, 4\]"),
        ({"dims": [4, 9]}, "rising prefixes"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"partners": torch.arange(2)}, r"partners must be int64 \[3\], got torch.int64 \[2\]"),
        ({"row_keys": torch.zeros(3, 2, dtype=torch.int64)}, r"must be int64 \[3, 2\] and \[5, 2\], got"),
    ],
)
def test_bad_input(change, message):
    given = {"rows": torch.zeros(3, 8), "others": torch.zeros(5, 8), "partners": torch.arange(3), "temperature": 0.1}
    with pytest.raises(ValueError, match=message):
        contrast(**{**given, **change})
