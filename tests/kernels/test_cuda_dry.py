"""The CUDA path without a card: everything is launched by Triton itself on a card that is not there (`stand_in.py`).

What a card would refuse fails here: a kernel that does not compile or spills, an argument that does not bind, a grid or
shared memory past the limits, a tensor left on the host, an output that is not what the op promised. Numbers are for
the interpreter and for `make gpu`. Runs in a process of its own, where Triton is loaded: MLPOOL_LOAD_TRITON=1. Pairs of
options here; MLPOOL_DRY=all, as `make test-cuda-dry` sets it, runs all combinations.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pkgutil
import shutil
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("MLPOOL_LOAD_TRITON") != "1" or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs by `make test` in its own process: MLPOOL_LOAD_TRITON=1 pytest ...", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip(
        "a card is there, and its libcuda in the stand-in's place: run `make gpu-test`", allow_module_level=True
    )
if not (shutil.which("gcc") and shutil.which("g++")):
    pytest.skip("the stand-in for libcuda needs gcc and g++", allow_module_level=True)
triton = pytest.importorskip("triton", reason="needs Triton")

import mlpool_kernels  # noqa: E402
from coverings import Options, covering, every, name  # noqa: E402
from mlpool_kernels.contrast import contrast  # noqa: E402
from mlpool_kernels.plan import CHOICES  # noqa: E402
from mlpool_kernels.select import select_padded  # noqa: E402
from stand_in import Launch, Operations, card, gradients  # noqa: E402
from triton import language as tl  # noqa: E402

from mlpool import LastLayerPool, MultiLayerPool  # noqa: E402
from mlpool.pooling import gather  # noqa: E402

CARDS = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("layers", "packed layers", "layer_states", "last layer")
CALLS = {"kind": KINDS, "token_pooling": ("last", "mean")}
ALL = os.environ.get("MLPOOL_DRY") == "all"


def combinations(options: dict[str, tuple]) -> list[Options]:
    """Pairs of everything; where all are asked for, every combination of these options, the ways of calling in turn."""
    if not ALL:
        return covering({**options, **CALLS})
    calls = itertools.cycle(every(CALLS))
    return [{**combination, **next(calls)} for combination in every(options)]


def run(kind: str, batch: int, tokens: int, hidden: int, layers: int, dtype: torch.dtype, **options) -> None:
    """Forward, and forward and backward with the gradients of parameters and states, of a pool on the card."""
    if kind == "last layer":
        pool = LastLayerPool(hidden, device="cuda", dtype=dtype, **options)
        layers = 1
    else:
        pool = MultiLayerPool(hidden, layers, device="cuda", dtype=dtype, **options)
    shape = {"packed layers": (1, batch * tokens, hidden), "layer_states": (batch, layers, hidden)}
    states = [
        torch.randn(shape.get(kind, (batch, tokens, hidden)), device="cuda", dtype=dtype, requires_grad=True)
        for _ in range(1 if kind == "layer_states" else layers)
    ]

    def embed() -> torch.Tensor:
        if kind == "layer_states":
            return pool(layer_states=states[0])
        if kind == "packed layers":
            offsets = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * tokens
            return pool(states, cu_seqlens=offsets, includes_embedding=False)
        mask = torch.ones(batch, tokens, device="cuda", dtype=torch.int64)
        mask[::2, 1:] = 0
        return pool(states, mask) if kind == "last layer" else pool(states, mask, includes_embedding=False)

    with torch.no_grad():
        assert embed().shape == (batch, hidden)
    gradients(embed(), [*pool.parameters(), *states])


@pytest.mark.parametrize("options", combinations({"card": CARDS, "dtype": DTYPES, **CHOICES}), ids=name)
def test_every_choice(options):
    """The default pool for Qwen2-0.5B in every form, each kernel for each card and dtype."""
    kind, token_pooling, dtype = (options[key] for key in ("kind", "token_pooling", "dtype"))
    choices = {key: options[key] for key in CHOICES}
    with card(options["card"]) as launches:
        run(kind, 3, 20, 896, 24, dtype, token_pooling=token_pooling, choices=choices)
    assert launches


@pytest.mark.parametrize("options", combinations(CHOICES), ids=name)
def test_no_limit_of_the_batch(options):
    """More texts than a grid has rows in y and z."""
    choices = {key: options[key] for key in CHOICES}
    with card(90) as launches:
        run(
            options["kind"], 70_000, 2, 64, 2, torch.bfloat16, num_latents=8, num_heads=2, head_dim=16,
            token_pooling=options["token_pooling"], choices=choices,
        )  # fmt: skip
    assert launches


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_plan_of_released_sizes(kind, batch):
    """The paper's pool on Mistral-7B, in the forms that the cost model chooses."""
    sizes = {"num_latents": 768, "num_heads": 32, "head_dim": 2048, "ff_mult": 4, "residual": False}
    with card(90) as launches:
        run(kind, batch, 512, 4096, 32, torch.bfloat16, **sizes)
    assert launches


# Select, attend, mix, norm, feed-forward, embed, and the values and W2 by the library; in training queries and keys are
# folded anew, and of the 24 in the backward 14 are products of matrices.
# Whitened: the matrix, and unit length behind it.
COUNTS = {"last": (8, 12, 24), "mean": (9, 13, 24), "mean, whitened": (11, 15, 27)}


@pytest.mark.parametrize("kind", COUNTS)
def test_launches_of_the_default_pool(kind, monkeypatch):
    """Ours and torch's together, in evaluation, in a training step's forward and in its backward: the host's time.

    Qwen2-0.5B, 64 texts. A new operation on this way, a mask, a cast, a copy, is to be seen here.
    """
    counts = torch.ones(64, dtype=torch.int64)  # what the kernel would have read of the masks

    def select(*masks):
        tokens = select_padded(*masks)
        tokens[3].known = counts
        return tokens

    monkeypatch.setattr("mlpool.pooling.tokens.select_padded", select)
    with card(90, traced=False) as launches:
        options = {"token_pooling": kind.partition(",")[0], "whiten": "whitened" in kind}
        pool = MultiLayerPool(896, 24, **options, device="cuda", dtype=torch.bfloat16)
        states = [torch.randn(64, 128, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(24)]
        mask = torch.ones(64, 128, device="cuda", dtype=torch.int64)
        found = []

        def count(run):
            launches.clear()
            with Operations() as operations:
                out = run()
            found.append([launch.kernel for launch in launches] + operations.names)
            return out

        with torch.no_grad():
            pool.eval()(states, mask, includes_embedding=False)  # folds the weights
            count(lambda: pool(states, mask, includes_embedding=False))
        out = count(lambda: pool.train()(states, mask, includes_embedding=False))
        count(lambda: gradients(out, [*pool.parameters(), *states]))
    found[2].remove("ones_like")  # the gradient that it begins with
    assert [len(names) for names in found] == list(COUNTS[kind]), found


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_autocast(dtype):
    """float32 parameters and states, products in half precision."""
    with card(90) as launches, torch.autocast("cuda", dtype):
        run("layers", 3, 20, 896, 24, torch.float32)
    assert launches


def test_float64_is_left_to_torch():
    with card(90) as launches:
        run("layers", 3, 20, 64, 4, torch.float64)
    assert not launches


@pytest.mark.parametrize("token_pooling", ["last", "mean"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 8192), (70_000, 2)])
def test_gather(batch, tokens, token_pooling):
    """By itself, as taps call it: values and gradients, one layer and many."""
    for layers in (1, 28):
        with card(90) as launches:
            shape = (batch, tokens, 1536)
            states = [
                torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(layers)
            ]
            mask = torch.ones(batch, tokens, device="cuda", dtype=torch.bool)
            out = gather(states, mask, token_pooling=token_pooling)
            assert out.shape == (batch, layers, 1536)
            gradients(out, states)
        assert launches


CONTRASTS = {"card": CARDS, "dtype": DTYPES, "masks": (False, True), "dims": (None, (100, 896))}


def run_contrast(dtype: torch.dtype, masks: bool, dims: tuple[int, ...] | None) -> None:
    rows, others = (torch.randn(n, 896, device="cuda", dtype=dtype, requires_grad=True) for n in (300, 700))
    given = {}
    if masks:
        keys = torch.arange(1400, device="cuda").view(700, 2) // 3
        given = {"row_keys": keys[:300], "other_keys": keys, "margin": 0.1}
    partners = torch.arange(300, device="cuda")
    with torch.no_grad():
        contrast(rows, others, partners, temperature=0.05, dims=dims, **given)
    gradients(contrast(rows, others, partners, temperature=0.05, dims=dims, **given), [rows, others])


@pytest.mark.parametrize("options", every(CONTRASTS) if ALL else covering(CONTRASTS), ids=name)
def test_contrast(options):
    with card(options["card"]) as launches:
        run_contrast(options["dtype"], options["masks"], options["dims"])
    assert launches


def test_every_kernel_is_reached():
    """No kernel of the package that nothing here launches."""
    modules = [
        importlib.import_module(f"mlpool_kernels.{m.name}") for m in pkgutil.iter_modules(mlpool_kernels.__path__)
    ]
    missing = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert missing
    with card(90) as launches:
        run_contrast(torch.bfloat16, masks=False, dims=None)
    missing -= {launch.kernel for launch in launches}
    for architecture, options in itertools.product((90, 80), covering({**CHOICES, **CALLS})):
        choices = {key: options[key] for key in CHOICES}
        for batch, tokens in ((2, 300), (1, 8192)):
            with card(architecture) as launches:
                how = {"token_pooling": options["token_pooling"], "choices": choices}
                run(options["kind"], batch, tokens, 896, 24, torch.bfloat16, **how)
                # Directly: a text of which nothing is kept, as here a kernel would have written, is an error.
                mask = torch.ones(batch, tokens, device="cuda", dtype=torch.int64)
                assert [t.shape for t in select_padded(mask, mask, 1)] == [(batch,)] * 4 + [(batch * tokens,)]
            missing -= {launch.kernel for launch in launches}
        if not missing:
            return
    pytest.fail(f"never launched: {sorted(missing)}")


# --- the stand-in refuses what a card refuses ----------------------------------------------------------------------


@triton.jit
def _fill_kernel(out, VALUE: tl.constexpr):
    tl.store(out, VALUE)


@triton.jit
def _wide_kernel(x, out, N: tl.constexpr):
    """16,384 numbers, and their running sums, for the registers of four warps."""
    at = tl.arange(0, N)
    values = tl.load(x + at)
    tl.debug_barrier()
    tl.store(out + tl.cumsum(values), values * tl.sum(values))


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    with card(90) as record:
        yield record


def test_stand_in_takes_a_launch_at_the_limits(launches):
    _fill_kernel[(2, 65_535)](torch.empty(1, device="cuda"), 0)
    assert launches == [Launch("_fill_kernel", (2, 65_535, 1), 0)]


@pytest.mark.parametrize("grid", [(1, 65_536), (1, 1, 65_536), (100_000, 30_000), (0,)])
def test_stand_in_refuses_a_grid(launches, grid):
    """Past a limit; a product past 2³¹, which Triton's launcher drops without a word; and nothing at all."""
    with pytest.raises((RuntimeError, AssertionError), match=r"invalid argument|0 launches reached the driver"):
        _fill_kernel[grid](torch.empty(1, device="cuda"), 0)
    assert not launches


@pytest.mark.usefixtures("launches")
def test_stand_in_refuses_a_tensor_of_the_host():
    with pytest.raises(ValueError, match="cpu tensor"):
        _fill_kernel[(1,)](torch.empty(1), 0)


@pytest.mark.usefixtures("launches")
def test_stand_in_refuses_spills():
    x = torch.empty(1 << 14, device="cuda", dtype=torch.int32)
    with pytest.raises(AssertionError, match="spills registers"):
        _wide_kernel[(1,)](x, x, 1 << 14)


@pytest.mark.usefixtures("launches")
def test_stand_in_refuses_two_devices():
    with pytest.raises(RuntimeError, match="devices"):
        torch.ones(2, device="cuda") + torch.ones(2)
