"""The loss across processes: documents pass from process to process in a ring, so that none holds them all.

Every process takes the softmax of its own rows over one block of others after the other, its own first, and adds up
log Σ exp. In the backward pass the blocks go round again, each with its gradient, to which every process adds its own
part; the last step brings both home. A block is on its way to the next process while this one computes with it.

Source: arXiv 2410.17243 (Inf-CL).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from mlpool_kernels.contrast import backward as block_backward
from mlpool_kernels.contrast import forward as block_forward
from mlpool_kernels.contrast import highest_allowed, losses
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Passing:
    """Tensors on their way: this process's to the next one, those of the one before to this."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.received = [None if t is None else torch.empty_like(t) for t in tensors]
        after, before = (rank + 1) % world, (rank - 1) % world
        sends = [dist.P2POp(dist.isend, t, after, tag=i) for i, t in enumerate(tensors) if t is not None]
        receives = [dist.P2POp(dist.irecv, t, before, tag=i) for i, t in enumerate(self.received) if t is not None]
        self._sent = tensors  # alive until they have arrived
        self._works = dist.batch_isend_irecv([*sends, *receives])

    def wait(self) -> list[Tensor | None]:
        for work in self._works:
            work.wait()
        return self.received


class _Ring(torch.autograd.Function):
    """N and P of `mlpool_kernels.contrast.forward`, over the others of all processes."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, others: Tensor, partners: Tensor, row_keys: Tensor | None, other_keys: Tensor | None,
        bound: Tensor | None, dims: Sequence[int], temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        others, other_keys = others.contiguous(), None if other_keys is None else other_keys.contiguous()
        ctx.dims, ctx.temperature = dims, temperature
        block: list[Tensor | None] = [others, other_keys]
        logs = positives = None
        for step in range(world_size()):
            last = step == world_size() - 1
            passing = None if last else _Passing(block)
            here = partners if step == 0 else torch.full_like(partners, -1)
            more, found = block_forward(rows, block[0], here, row_keys, block[1], bound, dims, temperature, "auto")  # type: ignore[arg-type]
            logs, positives = (more, found) if logs is None else (torch.logaddexp(logs, more), positives)
            block = block if passing is None else passing.wait()
        ctx.save_for_backward(logs, rows, others, partners, row_keys, other_keys, bound)
        return logs, positives  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad_logs: Tensor, grad_partners: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        logs, rows, others, partners, row_keys, other_keys, bound = ctx.saved_tensors
        block: list[Tensor | None] = [others, other_keys]
        drows: Tensor | None = None
        gradient: Tensor | None = None
        for step in range(world_size()):
            last = step == world_size() - 1
            passing = None if last else _Passing(block)
            here = partners if step == 0 else torch.full_like(partners, -1)
            more, theirs = block_backward(
                grad_logs, grad_partners, logs, rows, block[0], here, row_keys, block[1], bound, ctx.dims,  # type: ignore[arg-type]
                ctx.temperature, "auto",
            )  # fmt: skip
            drows = more if drows is None else drows.add_(more)
            gradient = theirs if gradient is None else gradient.add_(theirs)
            block = block if passing is None else passing.wait()
            (gradient,) = _Passing([gradient]).wait()  # to where its block is now; at last, home
        return drows, gradient, *(None,) * 6


def ring_contrast(
    rows: Tensor, others: Tensor, partners: Tensor, *, temperature: float, dims: Sequence[int],
    row_keys: Tensor | None = None, other_keys: Tensor | None = None, margin: float | None = None,
    factor: float | None = None,
) -> Tensor:  # fmt: skip
    """As `mlpool_kernels.contrast.contrast`, with the others of every process, as many of each.

    Args:
        partners: among the process's own others.

    The gradient of others is the sum over all processes' rows: every process must call backward.
    """
    judged = margin is not None or factor is not None
    bound = highest_allowed(rows, others, partners, margin, factor) if judged else None
    return losses(*_Ring.apply(rows, others, partners, row_keys, other_keys, bound, list(dims), temperature))


def check_equal_sizes(embeddings: Tensor) -> None:
    """A gather of unequal sizes would wait forever."""
    sizes = torch.tensor([[n, -n] for n in embeddings.shape], device=embeddings.device)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    if (sizes.sum(1) != 0).any():
        raise ValueError(
            f"embeddings [columns, batch, numbers] are {list(embeddings.shape)} here and up to {sizes[:, 0].tolist()} "
            "elsewhere; set dataloader_drop_last=True"
        )


def agree(count: int, device: torch.device) -> int:
    """The largest `count` of all processes."""
    counts = torch.tensor(count, device=device)
    if world_size() > 1:
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return int(counts)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward gathers weights from other processes: FSDP2, ZeRO-3."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model for all mini-batches but the first: DDP expects one forward, as there is one backward.

    Each further one would prepare it anew, in the middle of the backward pass too, and exchange buffers, a number of
    times that differs between processes.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    if isinstance(inner, DistributedDataParallel) or type(inner).__name__ == "DeepSpeedEngine":
        return inner.module  # type: ignore[no-any-return]
    return model


def check_cacheable(model: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("cached=True does not run under FSDP 1; use FSDP2 (fsdp_version: 2) or cached=False")
    if hasattr(model, "_orig_mod") and without_wrapper(model) is not model:
        raise ValueError("cached=True does not run under torch.compile around DDP; compile the model inside it instead")
