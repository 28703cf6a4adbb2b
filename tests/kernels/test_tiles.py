"""Where kernels run, and the file of tuned tiles and rates."""

import importlib
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import GPU, assert_close_to_equations, last, make_mask, make_states, multi, use
from mlpool_kernels import plan as cost_model
from mlpool_kernels import tiles
from mlpool_kernels.runtime import use_triton


def test_backends(monkeypatch):
    tensor = torch.zeros(1)
    with pytest.raises(ValueError, match=r"backend must be one of .*'auto'.* got 'cuda'"):
        use_triton("cuda", tensor)
    monkeypatch.setattr("mlpool_kernels.runtime.INTERPRETED", False)
    with pytest.raises(ValueError, match=r'backend="triton" needs CUDA tensors, got cpu.*TRITON_INTERPRET=1'):
        use_triton("triton", tensor)
    monkeypatch.setattr("mlpool_kernels.runtime.HAS_TRITON", False)
    with pytest.raises(ModuleNotFoundError, match='pip install "triton'):
        use_triton("triton", tensor)
    assert not use_triton("auto", tensor)


def test_float64_is_torch_s(monkeypatch):
    """Kernels accumulate in float32: "auto" leaves float64 to torch, whichever tensor has it; "triton" refuses it."""
    runtime = importlib.import_module("mlpool_kernels.runtime")
    monkeypatch.setattr(runtime, "triton", runtime.triton or object())
    monkeypatch.setattr(runtime, "HAS_TRITON", True)
    single, double = (SimpleNamespace(is_cuda=True, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert use_triton("auto", single, None)
    assert not use_triton("auto", double)
    assert not use_triton("auto", single, None, double)
    with pytest.raises(ValueError, match=r'backend="triton" accumulates in float32, got float64; use backend="auto"'):
        use_triton("triton", single, double)


@pytest.mark.parametrize("which", ["pool", "states"])
def test_the_pool_asks_for_float64_everywhere(which, monkeypatch):
    """Kernels are asked for where neither states nor weights are float64, in the forward, backward and the gather."""
    asked = []

    def ask(_, *given):
        asked.append({t.dtype for t in given if t is not None})
        return False

    for name in ("mlpool_kernels.pool", "mlpool.pooling.multi_layer"):
        module = importlib.import_module(name)
        monkeypatch.setattr(
            module, "use_triton", lambda _, *given: bool(asked.append({t.dtype for t in given if t is not None}))
        )
    # Of raw rows, which the pool itself gathers.
    net, states = multi(8, 3, residual=True), [s.requires_grad_() for s in make_states(3, (2, 3, 8))]
    if which == "pool":
        net = net.double()
    else:
        states = [s.double() for s in states]
    use(net, states, make_mask(2, 3)).sum().backward()
    assert len(asked) == 3
    assert all(torch.float64 in dtypes for dtypes in asked)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [multi, last])
def test_float64_runs_on_a_gpu(kind):
    pool = kind(8, target=GPU._replace(backend="auto")).double()
    assert_close_to_equations(pool, make_states(4, (2, 3, 8), GPU), make_mask(2, 3), torch.float64)


@pytest.mark.gpu
def test_auto_means_triton_on_a_gpu():
    assert use_triton("auto", torch.zeros(1, device=GPU.device))
    assert not use_triton("torch", torch.zeros(1, device=GPU.device))


@pytest.fixture
def tuned_file(tmp_path, monkeypatch):
    """Call with what MLPOOL_TILES is to hold, a text or what becomes JSON."""
    path = tmp_path / "tiles.json"

    def write(content) -> str:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("MLPOOL_TILES", str(path))
        tiles.tuned.cache_clear()
        return str(path)

    yield write
    tiles.tuned.cache_clear()


RATES = {
    "product": 2e11, "attend": 1e11, "mix": 1e11, "feed_forward": 1e11, "gate": 1e9, "memory": 1e10, "launch": 1e-5,
}  # fmt: skip
TUNED = {
    "device": tiles.device_here(), **tiles.versions_here(),
    "tiles": {"softmax": {"BLOCK_K": 8, "BLOCK_N": 16, "num_warps": 2}}, "rates": {"float32": RATES},
}  # fmt: skip


def test_tuned_file(tuned_file):
    tuned_file(TUNED)
    assert tiles.tile("softmax") == TUNED["tiles"]["softmax"]
    assert tiles.tile("mix", hidden=20)["BLOCK_D"] == 32
    fitted = tiles.fitted_rates(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert fitted == {torch.float32: cost_model.Rates(**RATES, source=f"fitted for {tiles.device_here()}")}
    assert tiles.fitted_rates(torch.device("meta")) == {}
    # As written before rates were: the tiles alone, without the fields of today.
    tuned_file({"feed_forward": {"BLOCK_R": 128, "BLOCK_F": 64, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}})
    assert tiles.tile("feed_forward") == tiles.TILES["feed_forward"][1]
    assert tiles.tuned().rates == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file that can be read"),
        ([1], "must be a JSON object, got list"),
        ({"softmix": {}}, "kernel 'softmix' is unknown; known: .*softmax"),
        ({**TUNED, "tile": {}}, "field 'tile' is unknown"),
        ({**TUNED, "tiles": {"softmax": {"BLOCK_M": 8}}}, "'softmax': field 'BLOCK_M' is unknown; known: BLOCK_K"),
        ({**TUNED, "tiles": {"softmax": {"BLOCK_K": 48}}}, "BLOCK_K must be a power of two, got 48"),
        ({**TUNED, "tiles": {"softmax": {"num_warps": "4"}}}, "num_warps must be a positive integer, got '4'"),
        ({**TUNED, "tiles": {"softmax": 4}}, "'softmax' must be a JSON object, got int"),
        ({**TUNED, "rates": {"int8": RATES}}, "dtype of rates 'int8' is unknown"),
        ({**TUNED, "rates": {"float32": {**RATES, "launch": 0}}}, "launch must be a positive number, got 0"),
        ({**TUNED, "rates": {"float32": {"product": 1e9}}}, "attend must be a positive number, got None"),
        ({**TUNED, "device": "NVIDIA Z9"}, f"was tuned on 'NVIDIA Z9', this is '{tiles.device_here()}'"),
        ({"tiles": {}}, "does not say its device"),
    ],
)
def test_tuned_file_that_cannot_be_used(tuned_file, content, message):
    path = tuned_file(content)
    with pytest.raises(ValueError, match=f"MLPOOL_TILES={path}.*{message}"):
        tiles.tile("softmax")


def test_tuned_file_that_is_missing(tuned_file, monkeypatch):
    tuned_file(TUNED)
    monkeypatch.setenv("MLPOOL_TILES", "/nowhere/tiles.json")
    with pytest.raises(ValueError, match=r"MLPOOL_TILES=/nowhere/tiles\.json is no JSON file"):
        tiles.tile("softmax")


def test_tuned_file_of_another_version(tuned_file):
    """Said once, and used."""
    tuned_file({**TUNED, "triton": "3.2.0"})
    with pytest.warns(UserWarning, match=r"was tuned with triton 3.2.0, here is") as warned:
        first = tiles.tile("softmax")
    assert len(warned) == 1
    assert first["BLOCK_K"] == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.tile("softmax") == first
