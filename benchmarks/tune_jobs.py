"""What tune.py times: every kernel at the presets' sizes beside what it is to give, and plain operations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from mlpool_kernels import Plan, Sizes, attend, feed_forward, mix, sums
from mlpool_kernels import rows as pool_rows
from mlpool_kernels.contrast import backward as contrast_backward
from mlpool_kernels.contrast import forward as contrast_forward
from mlpool_kernels.plan import Operation, feed_forward_operations, key_operations, value_operations
from torch import Tensor

from mlpool.pooling.tokens import select_tokens

gather = importlib.import_module("mlpool_kernels.gather")
embed = importlib.import_module("mlpool_kernels.embed")


class Job(NamedTuple):
    """One kernel, or plain operation, at one size. reference: the same by plain torch.

    cost: FLOP and bytes as the cost model counts them, and the rate that its time tells of.
    """

    kernel: str
    sizes: str
    run: Callable[[], list[Tensor]]
    reference: Callable[[], list[Tensor]]
    cost: Operation | None = None


class Maker:
    """Random tensors of one device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return scale * torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


def gather_jobs(new: Maker, batch: int, length: int, layers: int, hidden: int) -> Iterator[Job]:
    states = [new(batch, length, hidden) for _ in range(layers)]
    lengths = torch.randint(length // 2, length + 1, (batch, 1), device=new.device)
    mask = (torch.arange(length, device=new.device) < lengths).long()
    t = select_tokens(states[0].shape, new.device, mask)
    spans = (t.starts, t.ends, t.last, t.count, t.keep)
    grad = new(batch, layers, hidden)
    sizes = f"B={batch} T={length} L={layers} D={hidden}"

    def forward(mean: bool, backend: str, unit: bool = False) -> Callable[[], list[Tensor]]:
        return lambda: [gather._forward(states, *spans, mean, backend, unit)]

    def backward(backend: str) -> Callable[[], list[Tensor]]:
        return lambda: gather._backward(grad, list(states[0].shape), *spans, True, backend)

    shape, place = states[0].shape, new.device

    def select(backend: str) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            t = select_tokens(shape, place, mask, check=False, backend=backend)
            return [t.starts, t.ends, t.last, t.count, t.keep]

        return run

    yield Job("select", sizes, select("triton"), select("torch"))
    yield Job("mean", sizes, forward(True, "triton"), forward(True, "torch"))
    yield Job("unit_mean", sizes, forward(True, "triton", True), forward(True, "torch", True))
    yield Job("last", sizes, forward(False, "triton"), forward(False, "torch"))
    yield Job("gather_backward", sizes, backward("triton"), backward("torch"))


def attend_jobs(new: Maker, batch: int, keys: int, hidden: int, columns: int) -> Iterator[Job]:
    """Rows at one length with their mix, as the default pool reads them."""
    x0, weight, bias = new(batch, keys, hidden), 1 + 0.1 * new(hidden), 0.1 * new(hidden)
    norm = pool_rows.Norm(new(keys), new(keys, hidden), weight, bias)
    queries = new(columns, hidden, scale=hidden**-0.5)
    sizes = f"B={batch} n={keys} D={hidden} H.R={columns}"

    def one() -> list[Tensor]:
        return present(attend.attend_one_launch([x0], None, norm, queries, new.dtype)[1:])

    def plain() -> list[Tensor]:
        x, mixed = pool_rows.norm_rows(x0, norm, torch.float32)
        return present([x, mixed, (x @ queries.float().T).softmax(1)])

    cost = key_operations(Sizes(batch, keys, hidden, columns, 1, 1, 1), Plan(launches="one"), 2, cached=True)
    # From so many texts on a program holds all columns of one.
    name = "attend_text" if batch >= attend.MANY_TEXTS else "attend"
    yield Job(name, sizes, one, plain, *cost)
    grad, added = new(batch, keys, hidden), new(batch, hidden, dtype=torch.float32)

    def by_kernel() -> list[Tensor]:
        drows, parts = pool_rows.norm_rows_backward_triton(grad, x0, norm, added, summed=True)
        return [drows, *(part.sum(0) for part in present(parts))]

    def by_torch() -> list[Tensor]:
        drows, grads = pool_rows.norm_rows_backward(grad, x0, norm, added)
        return [drows, *(g.flatten() for g in present(grads))]

    yield Job(
        "norm", sizes, lambda: present(pool_rows.norm_rows_triton([x0], None, norm, new.dtype)[1:]),
        lambda: present(pool_rows.norm_rows(x0, norm, torch.float32)),
    )  # fmt: skip
    yield Job("norm_backward", sizes, by_kernel, by_torch)


def present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def sum_job(new: Maker, batch: int, keys: int, hidden: int) -> Job:
    """The sums of a default pool's backward."""
    widths = {"bias": (batch, 2 * hidden), "rows": (32, keys * hidden), "norm": (32 * keys, hidden)}
    parts = {name: new(*shape, dtype=torch.float32) for name, shape in widths.items()}
    return Job(
        "sum", f"B={batch} n={keys} D={hidden}", lambda: list(sums.sum_parts(parts, batch, new.dtype).values()),
        lambda: [part.sum(0) for part in parts.values()],
    )  # fmt: skip


def softmax_job(new: Maker, batch: int, keys: int, columns: int) -> Job:
    scores, grad = new(batch, keys, columns), new(batch, keys, columns)

    def both(s: Tensor, d: Tensor, triton: bool) -> list[Tensor]:
        a = attend.softmax_(s.clone(), None, triton)
        return [a, attend.softmax_backward_(a, d.clone(), triton)]

    sizes = f"B={batch} n={keys} H.R={columns}, forward and backward"
    return Job("softmax", sizes, lambda: both(scores, grad, True), lambda: both(scores.float(), grad.float(), False))


def mix_jobs(new: Maker, batch: int, keys: int, hidden: int, heads: int, latents: int) -> Iterator[Job]:
    """Of VO, and of V and Wo head by head, forward and backward; heads of 64."""
    attention = new(batch, keys, heads * latents).softmax(1)
    vo, v = new(batch * keys, heads, hidden), new(batch * keys, heads, 64)
    output_weight, z, base = (
        new(hidden, heads * 64, scale=hidden**-0.5),
        new(latents, hidden),
        new(batch, hidden).float(),
    )
    norm = (1 + 0.1 * new(hidden), 0.1 * new(hidden))
    sizes = f"B={batch} n={keys} D={hidden} H={heads} R={latents}"

    def run(values: mix.Values, triton: bool) -> list[Tensor]:
        a, out = (attention, output_weight) if triton else (attention.float(), output_weight.float())
        given = values if triton else mix.Values(*(None if t is None else t.float() for t in values))
        return list(mix.mix(a, given, out, z, *norm, base, "early", triton)[:2])

    s = Sizes(batch, keys, hidden, latents, heads, 64, 1)
    for name, form, values in (("mix", "absorbed", mix.Values(None, vo)), ("mix_heads", "early", mix.Values(v, None))):
        *_, cost = value_operations(s, Plan(values=form, mix="kernel"), 2, cached=True)
        both = (partial(run, values, triton) for triton in (True, False))
        yield Job(name, sizes, *both, cost if name == "mix_heads" else None)
    grad = new(batch, latents, heads * 64)

    def plain() -> list[Tensor]:
        a, b, d = (t.float() for t in (attention, v, grad))
        of_outputs = mix._split_heads(a, b, latents)[0] @ mix._split_heads(a, b, latents)[1]
        da, dv, _ = mix.mix_backward(d, a, mix.Values(b, None), torch.eye(heads * 64, device=new.device), "late")
        ds = attend.softmax_backward_(a, da, False)
        return [ds, dv.view_as(b), of_outputs.transpose(1, 2).flatten(2)]

    yield Job(
        "mix_backward", sizes, lambda: present(mix.mix_heads_backward(grad, attention, v, latents, None, True)), plain
    )


def feed_forward_jobs(new: Maker, batch: int, latents: int, hidden: int, width: int) -> Iterator[Job]:
    normed, weight, bias = new(batch, latents, hidden), new(2 * width, hidden, scale=hidden**-0.5), new(2 * width)

    def run(descriptors: bool) -> Callable[[], list[Tensor]]:
        return lambda: [feed_forward._feed_forward_triton(normed, weight, bias, descriptors)]

    def plain() -> list[Tensor]:
        w, b, parts = weight.float(), bias.float(), normed.float().split(4)
        return [torch.cat([feed_forward.feed_forward(n, w, b, "chunked", False, False)[0] for n in parts])]

    s, sizes = Sizes(batch, 1, hidden, latents, 1, 1, width), f"B={batch} R={latents} D={hidden} F={width}"
    cost, _ = feed_forward_operations(s, Plan(feed_forward="fused", memory="recompute"), 2)
    best = feed_forward.takes_descriptors(normed, weight)
    yield Job("feed_forward", sizes, run(False), plain, None if best else cost)
    if best:
        yield Job("feed_forward_tma", sizes, run(True), plain, cost)


def embed_job(new: Maker, batch: int, hidden: int) -> Job:
    tensors = (
        new(batch, hidden),
        new(hidden),
        new(batch, hidden, dtype=torch.float32),
        new(batch, hidden),
        new(hidden),
    )

    def run(backend: str) -> list[Tensor]:
        return [embed.embed(*tensors, True, new.dtype, backend)]

    return Job("embed", f"B={batch} D={hidden}", lambda: run("triton"), lambda: run("torch"))


def gate_job(new: Maker, batch: int, latents: int, width: int) -> Job:
    both, grad = new(batch, latents, 2 * width), new(batch, width, dtype=torch.float32)

    def run(x: Tensor, triton: bool) -> list[Tensor]:
        dboth, dbias = feed_forward.gate_backward(x, grad, triton, overwrite=False)
        return [feed_forward.gate_mean(x, triton), dboth, dbias.sum(0)]

    sizes = f"B={batch} R={latents} F={width}, forward and backward"
    # The backward reads and writes what the forward reads: three times its work.
    cost = Operation("gate", 3 * both.numel(), 0)
    return Job("gate", sizes, lambda: run(both, True), lambda: run(both.float(), False), cost)


def contrast_jobs(new: Maker, anchors: int, documents: int, hidden: int) -> Iterator[Job]:
    rows, others = new(anchors, hidden), new(documents, hidden)
    partners = torch.arange(anchors, device=new.device)

    def run(backend: str, dims: list[int]) -> Callable[[], list[Tensor]]:
        def both() -> list[Tensor]:
            texts = (rows, others) if backend == "triton" else (rows.float(), others.float())
            arguments = (*texts, partners, None, None, None, dims, 0.05, backend)
            logs, positives = contrast_forward(*arguments)
            ones = torch.ones_like(logs)
            return [logs, positives, *contrast_backward(ones, -ones, logs, *arguments)]

        return both

    sizes = f"N={anchors} M={documents} D={hidden}, forward and backward"
    for name, dims in (("contrast", [hidden]), ("contrast_stages", [hidden // 4, hidden])):
        yield Job(name, sizes, run("triton", dims), run("torch", dims))


# Rows, columns and depth of products as the presets have them.
PRODUCTS = {
    "cpu": [(48, 24576, 896), (384, 4096, 896), (768, 1024, 896), (64, 4096, 4096), (16, 512, 384)],
    "cuda": [(6144, 24576, 896), (6144, 28672, 896), (2048, 65536, 4096), (24576, 32768, 4096), (4096, 1792, 896),
             (4096, 8192, 4096), (1536, 512, 896)],
}  # fmt: skip
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
LAUNCHES = 100


def rate_jobs(new: Maker) -> Iterator[Job]:
    """Plain operations: a launch, a copy, products."""
    one = new(1)

    def launches() -> list[Tensor]:
        for _ in range(LAUNCHES - 1):
            one.abs()
        return [one.abs()]

    yield Job("launch", f"{LAUNCHES} of one number", launches, lambda: [one.abs()], Operation("launch", 0, 0))
    # Into memory that is there already: on a CPU handing out new pages takes longer than filling them.
    source = new(COPY_BYTES[new.device.type] // new.dtype.itemsize)
    target, moved = torch.empty_like(source), 2 * source.numel() * source.element_size()
    cost = Operation("memory", 0, moved)
    yield Job("copy", f"{moved >> 20} MiB", lambda: [target.copy_(source)], lambda: [source], cost)
    for rows, columns, depth in PRODUCTS[new.device.type]:
        a, b = new(rows, depth), new(columns, depth)
        moved = (a.numel() + b.numel() + rows * columns) * a.element_size()
        yield Job(
            "product", f"{rows} x {columns} x {depth}", lambda a=a, b=b: [a @ b.T],
            lambda a=a, b=b: [a.float() @ b.float().T], Operation("product", 2 * rows * columns * depth, moved),
        )  # fmt: skip


def jobs(new: Maker, small: bool) -> Iterator[Job]:
    """The presets' sizes; small ones for the interpreter."""
    if small:
        yield from gather_jobs(new, 2, 7, 3, 72)
        yield from attend_jobs(new, 2, 5, 72, 40)
        yield from attend_jobs(new, attend.MANY_TEXTS, 2, 20, 10)
        yield softmax_job(new, 2, 5, 40)
        yield from mix_jobs(new, 2, 3, 72, 2, 20)
        yield sum_job(new, 3, 4, 40)
        yield from feed_forward_jobs(new, 2, 20, 72, 40)
        yield gate_job(new, 2, 20, 40)
        yield embed_job(new, 3, 72)
        yield from contrast_jobs(new, 20, 70, 24)
        return
    yield from rate_jobs(new)
    if new.device.type == "cpu":
        return
    yield from gather_jobs(new, 64, 128, 24, 896)
    yield from gather_jobs(new, 64, 256, 32, 4096)
    for layers, hidden in ((24, 896), (32, 4096)):
        yield from attend_jobs(new, 64, layers, hidden, 512)
        yield from attend_jobs(new, 256, layers, hidden, 512)
        yield softmax_job(new, 64, layers, 24576)
        yield from mix_jobs(new, 64, layers, hidden, 8, 64)
        yield sum_job(new, 64, layers, hidden)
        yield from feed_forward_jobs(new, 64, 64, hidden, hidden)
        yield embed_job(new, 64, hidden)
    yield softmax_job(new, 4, 512, 24576)
    # Not the released pool of D = 4096: there the products win by far, and a tile is not to be chosen for it.
    yield from feed_forward_jobs(new, 64, 768, 896, 3584)
    yield gate_job(new, 32, 768, 3584)
    yield gate_job(new, 16, 768, 16384)
    yield from contrast_jobs(new, 8192, 32768, 1024)
