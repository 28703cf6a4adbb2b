"""Documents that pass from process to process, in two and in four gloo processes, against one that holds them all."""

import pytest
import torch
from conftest import in_processes
from mlpool_kernels import contrast

from mlpool.training import processes

RINGS = [{"dims": [16]}, {"dims": [3, 16], "margin": 0.1}, {"dims": [5, 12], "factor": 0.8, "keys": True}]


def ring(rank: int, world: int) -> None:
    """Own rows against everyone's documents, block by block: losses and gradients of one process with all of them."""
    seen = []
    block_forward = processes.block_forward
    processes.block_forward = lambda rows, others, *rest: seen.append(len(others)) or block_forward(rows, others, *rest)
    for options in RINGS:
        compare_ring(rank, world, dict(options))
        # As many blocks as processes, and never more documents than one has.
        assert seen == [14] * world
        seen.clear()


def compare_ring(rank: int, world: int, options) -> None:
    generator = torch.Generator().manual_seed(0)
    n, m = 6, 14
    rows, others = (torch.randn(world * k, 16, generator=generator, dtype=torch.float64) for k in (n, m))
    partners = torch.cat([m * r + torch.arange(n) for r in range(world)])
    keys = torch.randint(0, 40, (world * m, 2), generator=generator)
    of_rows = torch.stack([torch.randint(0, 40, (world * n,), generator=generator), keys[partners, 0]], 1)
    masks = {"row_keys": of_rows, "other_keys": keys} if options.pop("keys", False) else {}
    weights = torch.rand(len(options["dims"]), world * n, generator=generator, dtype=torch.float64)
    whole = [x.clone().requires_grad_() for x in (rows, others)]
    want = contrast(*whole, partners, temperature=0.1, **masks, **options)
    gradients = torch.autograd.grad((want * weights).sum(), whole)

    mine, theirs = slice(n * rank, n * rank + n), slice(m * rank, m * rank + m)
    own = [rows[mine].clone().requires_grad_(), others[theirs].clone().requires_grad_()]
    masks = {name: value[mine if name == "row_keys" else theirs] for name, value in masks.items()}
    got = processes.ring_contrast(*own, torch.arange(n), temperature=0.1, **masks, **options)
    found = torch.autograd.grad((got * weights[:, mine]).sum(), own)
    torch.testing.assert_close(got, want[:, mine], rtol=1e-12, atol=1e-12)
    for mine_, right in zip(found, (gradients[0][mine], gradients[1][theirs]), strict=True):
        torch.testing.assert_close(mine_, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_documents_in_a_ring(world, tmp_path):
    in_processes(ring, world, tmp_path, world)
