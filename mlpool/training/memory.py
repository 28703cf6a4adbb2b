"""How many mini-batches' activations fit into memory: what the first one keeps, and what there is."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

# Of the memory that is free: the rest is for what a backward pass needs beside activations, and for others.
SHARE = 0.8
_CGROUP = Path("/sys/fs/cgroup")


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields a call that tells how many bytes autograd keeps of what ran inside, parameters and buffers left out.

    Each piece of memory counts once. What was freed since, as FSDP2 frees gathered weights, does not count.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers()) if not hasattr(t, "full_tensor")}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    def count() -> int:
        total = sum(storage.nbytes() for storage in storages.values())
        storages.clear()
        return total

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


def how_many(first: int, tokens: Sequence[int], model: nn.Module, device: torch.device) -> int:
    """The mini-batches, in their order and at least the first, whose activations may be kept.

    Args:
        first: bytes that the first one's take, already in place. tokens: that each mini-batch computes.

    Left free are a fifth of what is there now, the gradients that are still to come, and one mini-batch more, for the
    one that is embedded again.
    """
    missing = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    left = SHARE * free_bytes(device) - sum(p.numel() * p.element_size() for p in missing) - first
    kept = 1
    for count in tokens[1:]:
        left -= first * count / tokens[0]
        if left < 0:
            break
        kept += 1
    return kept


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take.

    Of a GPU what is free and what torch holds unused. Else what the system says is available without swapping, within
    the container's limit, shared with the other processes of `torchrun`; 0 where it does not say.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = [n for n in (_available(), _container()) if n is not None]
    return min(found, default=0) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _available() -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container() -> int | None:
    """Of a control group's limit (version 2) what is not yet taken; None where there is none."""
    with suppress(OSError, ValueError):  # no such file, or "max"
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        return max(0, limit - used)
    return None
