"""Shared by all tests: which device and backend, random pools and batches, and parity with the paper's equations."""

import dataclasses
import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from mlpool_kernels import reference
from torch import Tensor

from mlpool import LastLayerPool, MultiLayerPool

# No test needs the Hub, and where there is no network, every one that asks it waits for its retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported, which nothing above does

with suppress(ModuleNotFoundError):  # where no test of properties is run, it may be missing
    import hypothesis

    # The same inputs in every run, so that what lands is judged by what it changes; no files beside the checkout.
    hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("same")


class Target(NamedTuple):
    """Where a test runs: the same parity tests serve the torch path, the interpreter and the GPU."""

    device: str
    backend: str


# tqdm's lock is one of all processes: a child that is killed while it holds it would hold it for good.
with suppress(ImportError):
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())

TORCH, INTERPRETER, GPU = Target("cpu", "torch"), Target("cpu", "triton"), Target("cuda", "triton")
TARGETS = [pytest.param(TORCH, id="torch"), pytest.param(GPU, id="gpu", marks=pytest.mark.gpu)]


# Triton is loaded, or interpreted, for a whole process: these files have one of their own (`make test`), or an
# environment of their own (`make test-onnx`), and a run of everything leaves them out.
OWN_PROCESS = {
    "test_vllm.py": "MLPOOL_VLLM", "test_binaries.py": "MLPOOL_LOAD_TRITON", "test_cuda_dry.py": "MLPOOL_LOAD_TRITON",
    "test_interpreter.py": "TRITON_INTERPRET", "test_interpreter_steps.py": "TRITON_INTERPRET",
    "test_onnx.py": "MLPOOL_ONNX", "test_clients.py": "MLPOOL_ONNX",
}  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    variable = OWN_PROCESS.get(collection_path.name)
    named = any(collection_path.name in argument for argument in config.args)
    return True if variable and not named and os.environ.get(variable) != "1" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a card are deselected (pyproject.toml); who selects them without one is told so once."""
    asked = sum(item.get_closest_marker("gpu") is not None for item in items)
    if asked and not torch.cuda.is_available():
        raise pytest.UsageError(f"{asked} tests need a CUDA GPU, and torch {torch.__version__} sees none")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[pytest.TestReport]:
    """Half a surrogate pair, in a message or in what was logged, is shown escaped: a worker that sends one to xdist
    dies, whether the test passed or failed, and the whole run with it.
    """
    report = yield
    report.sections = [(name, _escaped(content)) for name, content in report.sections]
    if _escaped(shown := str(report.longrepr)) != shown:
        report.longrepr = _escaped(shown)
    return report


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage() -> None:
    """What a module has imported stays: walking the libraries' objects anew takes up to a second a collection, and a
    collection is in each measurement of memory and in each forked process.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The evaluation data: MLPOOL_DATA, or shared/data in or beside the repository; without it the test is skipped."""
    root = Path(__file__).resolve().parents[1]
    places = [os.environ.get("MLPOOL_DATA"), root / "shared/data", root.parent / "shared/data"]
    for place in places:
        if place and Path(place).is_dir():
            return Path(place)
    pytest.skip("no data: set MLPOOL_DATA to a folder, or put it in shared/data")


@pytest.fixture(scope="session", autouse=os.environ.get("TRITON_INTERPRET") == "1")
def _bfloat16_as_on_a_card() -> Iterator[None]:
    """Triton's interpreter cuts digits off where a card rounds; a softmax's gradients then do not cancel."""
    interpreter = pytest.importorskip("triton").runtime.interpreter
    convert = interpreter._convert_float

    def rounded(values: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if (str(given), str(wanted)) == ("fp32", "bf16"):
            return torch.tensor(values).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return convert(values, given, wanted, mode)

    interpreter._convert_float = rounded
    yield
    interpreter._convert_float = convert


@pytest.fixture(scope="session", autouse=os.environ.get("TRITON_INTERPRET") == "1")
def _nothing_twice() -> Iterator[None]:
    """What the interpreter does over and over takes it longer than the kernels: it puts its own language in the place
    of Triton's at every launch and at every call inside one, each `tl.sum` among them, and checks every sum of integers
    for an overflow that it reports in debug mode alone.
    """
    interpreter = pytest.importorskip("triton").runtime.interpreter
    replace, scopes, builder = interpreter._patch_lang, {}, interpreter.interpreter_builder

    def once(function: Any) -> Any:
        if function.__module__ not in scopes:
            scopes[function.__module__] = replace(function)
        return SimpleNamespace(restore=lambda: None)

    options = builder.options
    interpreter._patch_lang, builder.options = once, dataclasses.replace(options, sanitize_overflow=False)
    types = interpreter._get_np_dtype
    plain = functools.cache(types)
    interpreter._get_np_dtype = lambda t: types(t) if t.scalar.is_ptr() else plain(t.scalar)
    yield
    interpreter._get_np_dtype = types
    interpreter._patch_lang, builder.options = replace, options
    for scope in reversed(scopes.values()):
        scope.restore()


@pytest.fixture(scope="session", autouse=os.environ.get("TRITON_INTERPRET") == "1")
def _few_programs() -> Iterator[None]:
    """What fills a GPU is one after the other under the interpreter; a few programs show all that many do."""
    from mlpool_kernels import rows

    programs, rows.PROGRAMS = rows.PROGRAMS, 16
    yield
    rows.PROGRAMS = programs


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every uninitialised tensor holds NaN: what nobody writes shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# --- pools and batches ---------------------------------------------------------------------------------------------

SMALL = {"num_latents": 5, "num_heads": 2, "head_dim": 8}


def randomise(pool: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """No parameter at its start: gate, norms and biases too, or what stands behind them is not tested."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pool.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm_weight"):
                noise = 1 + 0.3 * noise
            elif name.endswith("bias"):
                noise = 0.3 * noise
            elif name.endswith("weight"):
                noise = noise * parameter.shape[1] ** -0.5
            parameter.copy_(noise)
    return pool


def multi(hidden: int = 16, layers: int = 4, target: Target = TORCH, **options) -> MultiLayerPool:
    """A small random MultiLayerPool."""
    pool = MultiLayerPool(hidden, layers, **{**SMALL, "backend": target.backend, **options})
    return randomise(pool).to(target.device)


def last(hidden: int = 16, target: Target = TORCH, **options) -> LastLayerPool:
    """A small random LastLayerPool."""
    return randomise(LastLayerPool(hidden, **{**SMALL, "backend": target.backend, **options})).to(target.device)


def make_mask(batch: int, tokens: int, padding: str = "right", seed: int = 0) -> Tensor:
    """[B, T] int64: a full row, rows of random length, and from three texts on one of a single token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    lengths[0] = tokens
    if batch > 2:
        lengths[-1] = 1
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return {"right": mask, "left": mask.flip(1), "none": torch.ones_like(mask)}[padding]


def make_states(layers: int, shape: Sequence[int], target: Target = TORCH, seed: int = 0, dtype=torch.float32):
    """`layers` random hidden states of `shape`, with mean and scale that differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(tuple(shape), generator=generator) * (1 + 0.1 * i) + 0.3 * i / layers for i in range(layers)]
    return [s.to(target.device, dtype) for s in states]


# --- parity --------------------------------------------------------------------------------------------------------

Results = dict[str, Tensor]


def differentiate(out: Tensor, leaves: dict[str, Tensor]) -> Results:
    """The output and the gradient of a fixed random projection of it by every leaf; an unused leaf is an error."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad(out, list(leaves.values()), weights.to(out))
    return {"output": out.detach(), **dict(zip(leaves, grads, strict=True))}


def leaves_of(pool: torch.nn.Module, states: Sequence[Tensor]) -> dict[str, Tensor]:
    return {**dict(pool.named_parameters()), **{f"states[{i}]": s for i, s in enumerate(states)}}


def ours(pool, states: Sequence[Tensor], call: Callable[..., Tensor], *arguments, **options) -> Results:
    """Embedding and all gradients of `call(pool, states, *arguments, **options)`."""
    states = [s.detach().requires_grad_() for s in states]
    return differentiate(call(pool, states, *arguments, **options), leaves_of(pool, states))


def equations(pool, states: Sequence[Tensor], mask: Tensor, dtype: torch.dtype) -> Results:
    """The same by the paper's equations, step by step in `dtype`, from the very numbers that pool and states hold."""
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in pool.named_parameters()}
    states = [s.detach().to(dtype).requires_grad_() for s in states]
    if isinstance(pool, MultiLayerPool):
        out = reference.multi_layer_pool(states, mask, parameters, pool.num_heads, pool.token_pooling)
    else:
        out = reference.last_layer_pool(states[-1], mask, parameters, pool.num_heads, pool.token_pooling)
    return differentiate(out, {**parameters, **leaves_of(torch.nn.Module(), states)})


def errors(got: Results, exact: Results) -> dict[str, float]:
    """Relative error, in norm, of the output and of each gradient."""
    assert got.keys() == exact.keys()
    # What is zero in exact arithmetic (the keys' bias under a softmax) is compared with the largest gradient.
    least = 1e-3 * max(g.norm().item() for name, g in exact.items() if name != "output")
    result = {}
    for name, want in exact.items():
        assert got[name].shape == want.shape, name
        scale = want.norm().item()
        result[name] = (got[name].double() - want).norm().item() / (scale if name == "output" else max(scale, least))
    return result


# Largest absolute error of an embedding, relative error of a gradient.
LIMITS = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-12, 1e-10)}


def assert_close_to_equations(
    pool, states: Sequence[Tensor], mask: Tensor, dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Forward and every gradient of `pool` against the equations in float64.

    float32: 1e-5 absolute forward, 1e-4 relative gradients. Lower precision, or autocast: at most twice (gradients
    three times) the error that the equations make when computed eagerly in that precision.
    """
    pool = pool.to(dtype)
    # A pool of the last layer gives the others no gradient.
    states = [s.to(dtype) for s in (states if isinstance(pool, MultiLayerPool) else states[-1:])]
    mask = mask.to(states[0].device)
    exact = equations(pool, states, mask, torch.float64)
    with torch.autocast(states[0].device.type, autocast or dtype, enabled=autocast is not None):
        got = ours(pool, states, use, mask)
        wrong = errors(got, exact)
        if autocast is None and dtype in LIMITS:
            limit, gradient_limit = LIMITS[dtype]
            torch.testing.assert_close(got["output"].double(), exact["output"], atol=limit, rtol=0)
            limits = dict.fromkeys(wrong, gradient_limit)
        else:
            # Where eager happens to round to the exact value, half a unit in the last place is still no error.
            floor = torch.finfo(autocast or dtype).eps / 4
            eager = errors(equations(pool, states, mask, dtype), exact)
            limits = {name: max((2 if name == "output" else 3) * e, floor) for name, e in eager.items()}
    # "not <=": NaN is wrong too.
    wrong = {name: f"{e:.1e} > {limits[name]:.1e}" for name, e in wrong.items() if not e <= limits[name]}
    assert not wrong, wrong


def use_rows(pool, states: Sequence[Tensor]) -> Tensor:
    """Call a multi-layer pool on gathered rows, the only entry of `states`."""
    return pool(layer_states=states[0])


def use(pool, states: Sequence[Tensor], mask: Tensor, **options) -> Tensor:
    """Call either kind of trainable pool on exactly these layers."""
    if isinstance(pool, MultiLayerPool):
        return pool(states, mask, includes_embedding=False, **options)
    return pool(states, mask, **options)


def peak(run: Callable[[], object]) -> int:
    """Most bytes alive at once during `run` beyond those alive before it, on the CPU."""
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = run()
    del result
    alive = most = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


@pytest.fixture(scope="session")
def nodes():
    """One Ray cluster for all its tests; here, since tests import this file by its name and there can be but one."""
    from nodes import Nodes

    made = Nodes()
    yield made
    made.cluster.shutdown()


def in_processes(work: Callable[..., None], count: int, folder: Path, *arguments: Any) -> None:
    """work(rank, *arguments) in that many gloo processes, each with one thread; an error in any is raised here."""
    torch.multiprocessing.start_processes(
        _process, args=(count, f"file://{folder}/rendezvous", work, arguments), nprocs=count, start_method="fork"
    )


def _process(rank: int, count: int, rendezvous: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What `work` wrapped is gone before its group is destroyed: a DDP that is the last to hold a group destroys it
    with Python's lock in hand, for which a thread of gloo may be waiting."""
    torch.set_num_threads(1)
    # Processes that disagree on the number of collectives fail instead of waiting.
    wait = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count, timeout=wait)
    try:
        work(rank, *arguments)
    finally:
        torch.distributed.destroy_process_group()
