"""The Triton kernels, run by Triton's interpreter on the CPU, against the paper's equations.

The interpreter must be chosen before Triton is imported, so these tests have a process of their own:

    TRITON_INTERPRET=1 pytest tests/kernels/test_interpreter.py
"""

import importlib
import itertools
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process of its own: TRITON_INTERPRET=1 pytest tests/kernels/test_interpreter.py",
        allow_module_level=True,
    )

import torch
from conftest import (
    INTERPRETER,
    TORCH,
    assert_close_to_equations,
    last,
    make_mask,
    make_states,
    multi,
    ours,
    randomise,
    use,
    use_rows,
)  # fmt: skip
from coverings import covering, every, name
from hypothesis import given, settings
from hypothesis import strategies as st
from mlpool_kernels import Plan
from mlpool_kernels import plan as cost_model

from mlpool import LastLayerPool, MultiLayerPool
from mlpool.pooling import select_tokens

# NumPy warns: lanes past the end of a softmax row, never stored, divide zero by zero; some tests feed Inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

ATTEND = importlib.import_module("mlpool_kernels.attend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHOICES = cost_model.CHOICES
# Pairs of two sizes; the widest D, where the interpreter takes longest, with few latents. More latents than a mix
# kernel holds, with the most keys, and the paper's number of them at a small D. The forms take turns.
LAYERS, HIDDEN, LATENTS = (1, 6, 28, 36, 80), (64, 384, 896), (1, 7, 64)
FORMS = every({key: CHOICES[key] for key in ("launches", "feed_forward", "values", "memory")})
SIZES = [
    *((layers, hidden, LATENTS[(i + j) % 3]) for i, layers in enumerate(LAYERS) for j, hidden in enumerate(HIDDEN)),
    (1, 1536, 7), (6, 1536, 1), (28, 1536, 1), (LAYERS[-1], 64, cost_model.MIX_LATENTS + 8), (6, 64, 768),
]  # fmt: skip
SIZED = [(*size, FORMS[7 * i % len(FORMS)], ("mix", True)[i % 2]) for i, size in enumerate(SIZES)]
# Every three choices, with the type as one of them. The kernels that mix are for two choices at once: each in every
# type with every value of the others.
MIXED = [
    {"values": values, "mix": "kernel", "dtype": dtype, **turn}
    for values, dtype in itertools.product(("early", "absorbed"), DTYPES)
    for turn in (
        {"memory": "save", "keys": "absorbed", "launches": "one", "feed_forward": "fused"},
        {"memory": "recompute_ff", "keys": "plain", "launches": "two", "feed_forward": "fused"},
        {"memory": "recompute", "keys": "absorbed", "launches": "two", "feed_forward": "chunked"},
    )
]
# The interpreter takes as long for a program whatever its tile: those that only sum or norm get few, wide ones here,
# and the tiles of a GPU in all other tests.
FEW_PROGRAMS = {
    "sum": {"BLOCK_P": 32, "BLOCK_N": 2048},
    "norm": {"NUMBERS": 1 << 16},
    "norm_backward": {"NUMBERS": 1 << 16},
    "gather_backward": {"BLOCK_T": 2, "BLOCK_D": 2048},
}


@pytest.mark.parametrize(("layers", "hidden", "latents", "form", "residual"), SIZED)
def test_sizes(layers, hidden, latents, form, residual, monkeypatch):
    monkeypatch.setattr("mlpool_kernels.tiles._overrides", lambda: FEW_PROGRAMS)
    sizes = {"num_latents": latents, "num_heads": 1, "head_dim": 8, "residual": residual}
    pool = multi(hidden, layers, INTERPRETER, choices=form, **sizes)
    batch = 1 if hidden == 1536 else 2
    assert_close_to_equations(pool, make_states(layers, (batch, 2, hidden)), make_mask(batch, 2))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("options", covering({**CHOICES, "dtype": DTYPES}, 3, MIXED), ids=name)
def test_every_form(options, monkeypatch):
    """Odd sizes, tiles that end inside D, R and F; bfloat16 too, which the interpreter's dot gets wrong.

    Uninitialised memory holds NaN: every output and gradient is written. The choice of how to mix is what runs; with
    late values there is no kernel.
    """
    module, launched = importlib.import_module("mlpool_kernels.mix"), []
    kernel = module._mix_triton
    monkeypatch.setattr(module, "_mix_triton", lambda *args: launched.append(1) or kernel(*args))
    choices = {key: options[key] for key in CHOICES}
    pool = multi(72, 3, INTERPRETER, num_latents=3, num_heads=2, head_dim=8, choices=choices)
    assert_close_to_equations(pool, make_states(3, (2, 3, 72)), make_mask(2, 3), options["dtype"])
    assert bool(launched) == (options["mix"] == "kernel" and options["values"] != "late")


LAST = {key: values for key, values in CHOICES.items() if key != "launches"}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "options", covering({"token_pooling": ("last", "mean"), **LAST, "dtype": DTYPES}, 3), ids=name
)  # fmt: skip
def test_last_layer(options):
    """Design 2, one key, and design 4, whose softmax streams over 70 tokens with the padding mask."""
    choices = {key: options[key] for key in LAST}
    pool = last(40, INTERPRETER, num_latents=9, token_pooling=options["token_pooling"], choices=choices)
    assert_close_to_equations(pool, make_states(1, (3, 70, 40)), make_mask(3, 70), options["dtype"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token_pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", ["multi", "last"])
def test_paper(kind, token_pooling, dtype):
    sizes = {"num_latents": 5, "num_heads": 2, "head_dim": 16, "token_pooling": token_pooling}
    pool = (
        MultiLayerPool.paper(24, 3, backend="triton", **sizes)
        if kind == "multi"
        else LastLayerPool.paper(24, backend="triton", **sizes)
    )
    assert_close_to_equations(randomise(pool), make_states(3, (2, 5, 24)), make_mask(2, 5, "left"), dtype)


@settings(max_examples=15, deadline=None)
@given(
    hidden=st.integers(4, 70), layers=st.integers(1, 9), num_latents=st.integers(1, 20), num_heads=st.integers(1, 3),
    batch=st.integers(1, 3), tokens=st.integers(1, 7), kind=st.sampled_from([multi, last]), seed=st.integers(0, 99),
    token_pooling=st.sampled_from(["last", "mean"]), form=st.sampled_from(FORMS),
    residual=st.sampled_from(["mix", True]),
    padding=st.sampled_from(["left", "right"]),
)  # fmt: skip
def test_any_size(kind, hidden, layers, batch, tokens, seed, form, padding, **options):
    if kind is multi:
        options["layers"] = layers
    pool = randomise(kind(hidden, target=INTERPRETER, choices=form, **options), seed)
    assert_close_to_equations(
        pool, make_states(layers, (batch, tokens, hidden), seed=seed), make_mask(batch, tokens, padding, seed)
    )


@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
def test_strided_hidden_states(how):
    """Transposed and sliced states are read where they lie, in one launch or, where D is strided, layer by layer."""
    base = torch.randn(6, 3, 64)
    pool = multi(32, 2, INTERPRETER, token_pooling=how)
    mask = make_mask(3, 6)
    for view in (base.transpose(0, 1)[:, :, :32], base.transpose(0, 1)[:, :, ::2], base.transpose(0, 1)[..., 32:]):
        assert_close_to_equations(pool, [view, view.flip(0) if view.stride(2) == 1 else view], mask)


VIEWS = {
    "sliced": lambda: torch.randn(2, 3, 64)[:, :, :32], "transposed": lambda: torch.randn(3, 2, 32).transpose(0, 1),
    "strided": lambda: torch.randn(2, 3, 64)[:, :, ::2], "columns": lambda: torch.randn(2, 32, 3).mT,
}  # fmt: skip
READING = {key: CHOICES[key] for key in ("launches", "memory")}


@pytest.mark.parametrize("options", covering({"view": tuple(VIEWS), **READING}), ids=name)
def test_strided_layer_states(options):
    """X0 given as it lies: every stride, also that of D, is respected, forward and backward."""
    view = VIEWS[options["view"]]()
    choices = {key: options[key] for key in READING}
    got, want = (ours(multi(32, 3, target, choices=choices), [view], use_rows) for target in (INTERPRETER, TORCH))
    assert_as_torch(got, want)


def assert_as_torch(got, want):
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, atol=1e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


# --- what a kernel may not do --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["last", "mean"])
@pytest.mark.parametrize("kind", [multi, last])
def test_nan_in_padding_and_in_one_text(kind, how):
    """Padding reaches nothing; a text that holds NaN is NaN alone, and so are its gradients."""
    pool = kind(16, **({"layers": 2} if kind is multi else {}), target=INTERPRETER, token_pooling=how)
    mask, others = make_mask(3, 5), torch.tensor([0, 2])
    states = make_states(2 if kind is multi else 1, (3, 5, 16))
    clean = ours(pool, states, use, mask)
    soiled = [torch.where(mask[:, :, None] == 0, torch.nan, s) for s in states]
    for key, value in ours(pool, soiled, use, mask).items():
        assert torch.equal(value, clean[key]), key
    states = [s.index_fill(0, torch.tensor([1]), torch.nan) for s in states]
    result = ours(pool, states, use, mask)
    assert result["output"][1].isnan().all()
    for key in ("output", *(f"states[{i}]" for i in range(len(states)))):
        assert torch.isfinite(result[key][others]).all(), key


@pytest.mark.parametrize("launches", ["one", "two"])
@pytest.mark.parametrize("residual", ["mix", True])
def test_states_out_of_range_are_nan_and_not_zeros(residual, launches, monkeypatch):
    """Where nobody looks beforehand, as on a GPU, their text alone has no number; its squares are none of float32."""
    monkeypatch.setattr("mlpool.pooling.multi_layer.check_range", lambda *_: None)
    pool = multi(target=INTERPRETER, choices={"launches": launches}, residual=residual)
    (rows,) = make_states(1, (3, 4, 16))
    want = use_rows(pool, [rows])
    rows[1, 2] *= 1e20
    got = use_rows(pool, [rows])
    assert got[1].isnan().all()
    assert torch.equal(got[::2], want[::2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("memory", cost_model.MEMORY)
@pytest.mark.parametrize("launches", cost_model.LAUNCHES)
def test_rows_of_zeros(launches, memory):
    """As in torch: at one length they stay zeros, and get no gradient."""
    states, mask = make_states(3, (3, 3, 24)), make_mask(3, 3)
    states[1][0] = states[2][2] = 0
    choices = {"launches": launches, "memory": memory}
    got, want = (ours(multi(24, 3, target, choices=choices), states, use, mask) for target in (INTERPRETER, TORCH))
    assert_as_torch(got, want)
    assert not got["states[1]"][0].any()
    assert not got["states[2]"][2].any()


@pytest.mark.parametrize("form", FORMS[::5], ids=name)
def test_bitwise_from_run_to_run(form):
    pool = multi(40, 3, INTERPRETER, choices=form)
    states, mask = make_states(3, (2, 3, 40)), make_mask(2, 3)
    first, second = (ours(pool, states, use, mask) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_columns_of_a_text_in_one_program(dtype, monkeypatch):
    """What many texts get: here with two, an odd number of columns, rows gathered and given."""
    monkeypatch.setattr(ATTEND, "MANY_TEXTS", 1)
    pool = multi(72, 5, INTERPRETER, num_latents=9, num_heads=3, head_dim=8, choices={"launches": "one"})
    assert_close_to_equations(pool, make_states(5, (2, 3, 72)), make_mask(2, 3), dtype)
    rows = torch.randn(2, 5, 72).to(dtype)
    plain = multi(72, 5, TORCH, num_latents=9, num_heads=3, head_dim=8).to(dtype)
    torch.testing.assert_close(
        use_rows(pool, [rows]), use_rows(plain, [rows]), atol=3e-2 if dtype != DTYPES[0] else 1e-5, rtol=0
    )


SCORED = every({key: CHOICES[key] for key in ("keys", "launches", "memory")})


@pytest.mark.parametrize(
    ("kind", "choices"),
    [*((multi, form) for form in covering(CHOICES, 2, SCORED)), *((last, {"memory": m}) for m in CHOICES["memory"])],
)
def test_attention_weights_and_their_gradient(kind, choices):
    """As on the torch path, with every form of the scores."""
    got, want = (
        ours(kind(24, target=target, choices=choices), make_states(4 if kind is multi else 1, (2, 4, 24)), attend)
        for target in (INTERPRETER, TORCH)
    )
    assert_as_torch(got, want)


def attend(pool, states):
    """Embedding and attention weights of a batch, in one tensor [B, ·]."""
    both = use(pool, states, make_mask(2, 4), output_attentions=True)
    return torch.cat([t.flatten(1) for t in both], 1)


@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
def test_opcheck(how):
    """torch's checks of the registrations with the kernels behind them, hidden states read by the pool's own launch."""
    pool = multi(24, 3, INTERPRETER)
    mask = make_mask(2, 4)
    states = [s.requires_grad_() for s in make_states(3, (2, 4, 24))]
    t = select_tokens(states[0].shape, states[0].device, mask)
    arguments = (states, t.starts, t.ends, t.last, t.count, t.keep, how != "last", "triton", how == "unit_mean")
    torch.library.opcheck(torch.ops.mlpool.gather.default, arguments)
    if how != "last":
        return
    for plan in (
        Plan(launches="one", mix="kernel"),
        Plan("plain", "late", memory="recompute"),
        Plan(memory="recompute_ff"),
    ):
        weights = pool._fold(plan, one_key=False)
        weights = [None if w is None else w.detach().requires_grad_() for w in weights]
        arguments = (
            states, t.last, None, pool.layer_weights, pool.key_norm_weight, pool.key_norm_bias, *weights, pool.latents,
            pool.ff_norm_weight, pool.ff_norm_bias, pool.ff_in_weight, pool.ff_in_bias, pool.mix_weights, 2, str(plan),
            "triton", True,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.mlpool.pool.default, arguments)


def test_evaluation_uses_the_folded_cache():
    """no_grad and eval: the direct call, chunk by chunk, equals the differentiable one; also folded."""
    pool, mask = multi(24, 3, INTERPRETER).eval(), make_mask(3, 4)
    states = make_states(3, (3, 4, 24))
    want = use(pool, states, mask)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(use(pool, states, mask), want, atol=1e-6, rtol=0)
        torch.testing.assert_close(use(pool.fold(), states, mask), want, atol=1e-6, rtol=0)


def test_gradients_for_the_upper_layers_alone():
    """LoRA on the last layers: the first state needs no gradient, the last gets its own; a folded pool refuses."""
    states, mask = make_states(3, (2, 4, 24)), make_mask(2, 4)
    for frozen in (False, True):
        want, got = (multi(24, 3, target).requires_grad_(not frozen) for target in (TORCH, INTERPRETER))
        states[-1].requires_grad_()
        grads = [torch.autograd.grad(use(pool, states, mask)[:, 0].sum(), states[-1])[0] for pool in (got, want)]
        torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
    with pytest.raises(RuntimeError, match="a folded pool is for inference"):
        use(multi(24, 3, INTERPRETER).fold(), states, mask)


@pytest.mark.parametrize("latents", [1, 2])
def test_gradients_of_the_scores_whatever_a_product_left_them_in(latents, monkeypatch):
    """A batched product of a GPU leaves dA in memory as it likes where a size is 1; the kernel reads rows."""
    original = ATTEND.softmax_backward_

    def scattered(attention, grad, triton):
        return original(attention, grad.transpose(1, 2).contiguous().transpose(1, 2), triton)

    monkeypatch.setattr(ATTEND, "softmax_backward_", scattered)
    pool = multi(16, 6, INTERPRETER, num_latents=latents, num_heads=2)
    assert_close_to_equations(pool, make_states(6, (2, 3, 16), INTERPRETER), make_mask(2, 3))
