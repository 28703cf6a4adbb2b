"""Two gloo processes under DDP and FSDP2: the loss and the averaged gradients of one process with the whole batch."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from conftest import in_processes
from loss_models import TinyLlama, column, random_texts
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mlpool.training.losses import InfoNCE
from mlpool.training.teacher import Teacher

WORLD, B = 2, 4

OPTIONS = [
    {},
    {"symmetric": True, "matryoshka_dims": [32, 8], "false_negatives": "margin", "margin": 0.0},
]
# Whether activations are kept, and negatives gathered; of a wrapper that looks for what is unused, one of each.
MODES = list(itertools.product((True, False, "auto"), (True, False)))
LOOKS = "ddp, find_unused_parameters"
WRAPPERS = {
    "ddp": DistributedDataParallel,
    LOOKS: lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "fsdp2": lambda model: shard(model),
}


def shard(model):
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.pool, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def texts_of_both(seed: int = 0) -> list[list[list[int]]]:
    """[column][text]: short texts for the first process, long ones for the second, duplicates across them."""
    short, long = random_texts(3, B, 5, seed), random_texts(3, B, 40, seed + 1)
    texts = [a + b for a, b in zip(short, long, strict=True)]
    texts[1][B] = texts[1][0]
    texts[2][1] = texts[0][B + 1]
    texts[0][B + 2] = texts[0][2]
    return texts


def part(texts, rank: int):
    return [column(t[rank * B : (rank + 1) * B]) for t in texts]


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model) -> dict[str, torch.Tensor]:
    """Of all parameters, whole, under their plain names; a parameter without a gradient is an error."""
    return {n.removeprefix("module."): full(p.grad).clone() for n, p in model.named_parameters()}


def mean(value: torch.Tensor) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / WORLD


def alone(model, batches, labels=None, **options):
    """Loss and gradients of one process with everything in one forward."""
    model.zero_grad()
    values = [InfoNCE(model, cached=False, mini_batch_tokens=None, **options)(b, labels) for b in batches]
    torch.stack(values).sum().backward()
    return sum(v.item() for v in values), gradients(model)


def assert_same(name: str, got, want) -> None:
    assert abs(got[0] - want[0]) < 1e-5, (name, got[0], want[0])
    scale = torch.cat([g.flatten() for g in want[1].values()]).norm()
    assert got[1].keys() == want[1].keys(), name
    for n, g in want[1].items():
        assert (got[1][n] - g).norm() <= 1e-5 * scale, (name, n, (got[1][n] - g).norm() / scale)


def compare(rank: int, wrapper: str) -> None:
    texts = texts_of_both()
    plain = TinyLlama().eval()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(plain))
    bare = wrapped.module if "ddp" in wrapper else wrapped
    # As an optimiser holds them: after an evaluation FSDP2 leaves other tensors in the root module.
    optimiser = torch.optim.SGD(wrapped.parameters())
    calls = []
    bare.register_forward_hook(lambda *_: calls.append(1))
    for options in OPTIONS:
        want = alone(plain, [[column(t) for t in texts]], **options)
        apart = [alone(plain, [part(texts, r)], **options) for r in range(WORLD)]
        separate = [sum(a[0] for a in apart) / WORLD, {n: (apart[0][1][n] + apart[1][1][n]) / WORLD for n in want[1]}]
        assert abs(separate[0] - want[0]) > 0.1, "gathering changes nothing"
        for cached, gather in MODES if wrapper != LOOKS else MODES[::3]:
            expected = want if gather else separate
            loss = InfoNCE(wrapped, gather_across_devices=gather, cached=cached, mini_batch_tokens=40, **options)
            optimiser.zero_grad()
            calls.clear()
            value = loss(part(texts, rank), None)
            value.backward()
            name = f"{wrapper} {options} cached={cached} gather={gather}"
            assert_same(name, (mean(value), gradients(wrapped)), expected)
            counts = [torch.tensor(0)] * WORLD
            dist.all_gather_object(counts, len(calls))
            # As many forwards as texts need; the same everywhere where a forward is a collective.
            assert (counts[0] == counts[1]) == (wrapper == "fsdp2"), (name, counts)
            with torch.no_grad():
                assert abs(mean(loss(part(texts, rank), None)) - expected[0]) < 1e-5, name


def accumulate(rank: int, wrapper: str) -> None:
    """Two micro-batches, gradients exchanged with the second alone."""
    batches = [texts_of_both(seed) for seed in (3, 5)]
    plain = TinyLlama().eval()
    want = alone(plain, [[column(t) for t in texts] for texts in batches])
    wrapped = WRAPPERS[wrapper](copy.deepcopy(plain))
    loss = InfoNCE(wrapped, gather_across_devices=True, cached=True, mini_batch_tokens=40)
    total = 0.0
    for last, texts in enumerate(batches):
        if wrapper == "fsdp2":
            wrapped.set_requires_gradient_sync(bool(last))
        with nullcontext() if last or wrapper == "fsdp2" else wrapped.no_sync():
            value = loss(part(texts, rank), None)
            value.backward()
            total += mean(value)
    assert_same(f"accumulate {wrapper}", (total, gradients(wrapped)), want)


def dropout(rank: int, wrapper: str) -> None:
    """Cached and plain draw the same masks on each process."""
    results = []
    for cached in (True, False):
        wrapped = WRAPPERS[wrapper](TinyLlama().train())
        torch.manual_seed(rank)
        value = InfoNCE(wrapped, gather_across_devices=True, cached=cached, mini_batch_tokens=40)(
            part(texts_of_both(), rank), None
        )
        value.backward()
        results.append((mean(value), gradients(wrapped)))
    assert_same(f"dropout {wrapper}", *results)


def teach(rank: int, wrapper: str) -> None:
    """A teacher looks at each process's own candidates, where negatives are gathered too: the mean of what it adds."""
    texts, plain = texts_of_both(), TinyLlama().eval()
    scores = torch.rand(WORLD, B, 2, generator=torch.Generator().manual_seed(0))
    value, want = alone(plain, [[column(t) for t in texts]])
    for r in range(WORLD):
        taught = alone(plain, [part(texts, r)], scores[r], teacher=Teacher())
        untaught = alone(plain, [part(texts, r)])
        assert taught[0] - untaught[0] > 0.1
        value += (taught[0] - untaught[0]) / WORLD
        want = {n: g + (taught[1][n] - untaught[1][n]) / WORLD for n, g in want.items()}
    wrapped = WRAPPERS[wrapper](plain)
    optimiser = torch.optim.SGD(wrapped.parameters())
    for cached in (True, False):
        optimiser.zero_grad()
        loss = InfoNCE(wrapped, gather_across_devices=True, cached=cached, mini_batch_tokens=40, teacher=Teacher())
        found = loss(part(texts, rank), scores[rank])
        found.backward()
        assert_same(f"teach {wrapper} cached={cached}", (mean(found), gradients(wrapped)), (value, want))


def unequal(rank: int) -> None:
    columns = [column(t[: B - rank]) for t in texts_of_both()]
    with pytest.raises(ValueError, match=r"\[3, (3|4), 32\] here and up to \[3, 4, 32\].*dataloader_drop_last=True"):
        InfoNCE(TinyLlama(), gather_across_devices=True)(columns, None)


def work(rank: int) -> None:
    for wrapper in WRAPPERS:
        compare(rank, wrapper)
        accumulate(rank, wrapper)
        if wrapper != LOOKS:
            dropout(rank, wrapper)
            teach(rank, wrapper)
    unequal(rank)


def test_two_processes(tmp_path):
    in_processes(work, WORLD, tmp_path)
