"""Two gloo processes: DDP and FSDP2 give the gradients, steps and embeddings of one process with the whole batch."""

import copy
import functools
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import in_processes, last, make_mask, make_states, multi
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

D, L, B, T, WORLD = 16, 4, 4, 5, 2


def pools():
    """Designs 3 and 5, 4, and 2, where queries and keys get zero gradients; saved and recomputed, released form."""
    for how, memory, residual in itertools.product(("last", "mean"), ("save", "recompute"), (True, False)):
        for kind in (multi, last):
            yield kind(D, token_pooling=how, choices={"memory": memory}, residual=residual)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(rank: int, folder: Path, how: str) -> None:
    """One process: three steps of a fused optimiser beside a lone pool that sees the whole batch."""
    states, mask = make_states(L, (B, T, D)), make_mask(B, T)
    part = slice(rank * B // WORLD, (rank + 1) * B // WORLD)
    mine = [s[part] for s in states]
    for pool in pools():
        alone = copy.deepcopy(pool)
        call = call_of(pool)
        if how == "ddp":
            wrapped = DistributedDataParallel(pool)
        else:
            wrapped = fully_shard(pool, mesh=dist.init_device_mesh("cpu", (WORLD,)))
            for refused in (pool.fold, functools.partial(pool.save_pretrained, folder / "pool")):
                with pytest.raises(RuntimeError, match=r"is sharded \(latents, …\); gather it first"):
                    refused()
        optimisers = [torch.optim.AdamW(p.parameters(), lr=0.03, fused=True) for p in (wrapped, alone)]
        for _ in range(3):
            for model, inputs, m in ((wrapped, mine, mask[part]), (alone, states, mask)):
                model.train()
                (call(model, inputs, m) * torch.arange(D)).sum().backward()
            for (name, a), b in zip(pool.named_parameters(), alone.parameters(), strict=True):
                b.grad /= WORLD
                assert a.grad is not None, name
                torch.testing.assert_close(full(a.grad), b.grad, atol=1e-5, rtol=1e-4)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            with torch.no_grad():
                for _ in range(2):
                    got, want = call(wrapped.eval(), mine, mask[part]), call(alone.eval(), states, mask)[part]
                    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def call_of(pool):
    """How to call this pool, or what wraps it, on exactly these layers."""
    options = {"includes_embedding": False} if hasattr(pool, "num_layers") else {}
    return lambda model, states, mask: model(states, mask, **options)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes(how, tmp_path):
    in_processes(train, WORLD, tmp_path, tmp_path, how)
