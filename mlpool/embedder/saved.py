"""What was saved of an embedder: loaded again and compared; and its model card."""

import logging
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..quantized import parts

logger = logging.getLogger("mlpool")


def verify_saved(embedder: Any, folder: Path) -> None:
    """RuntimeError where a folder does not load as this embedder; on the CPU where its device has no room."""
    problems = _compare(embedder, folder, embedder.device)
    if problems is None:
        logger.warning("no room for a second model on %s: verifying %s on the CPU", embedder.device, folder)
        problems = _compare(embedder, folder, torch.device("cpu"))
    if problems:
        raise RuntimeError(
            f"not saved: the folder that was written does not load as the same model: {'; '.join(problems[:5])}"
        )


def _compare(embedder: Any, folder: Path, device: torch.device) -> list[str] | None:
    """What the folder gives otherwise than the embedder; None where memory runs out on an accelerator."""
    try:
        again = reload(embedder, folder, device)
        if problems := _differences(embedder, again):
            return problems
        # The copy is what is widened for the comparison: the embedder may be in training.
        change, limit = again.disagreement(again._probe(), embedder._probe(), again._probe)
    except RuntimeError as error:
        if device.type == "cpu" or not out_of_memory(error):
            raise
        return None
    return [] if change <= limit else [f"embeddings differ by {change:.1e} (at most {limit:.1e} is rounding)"]


def reload(embedder: Any, folder: str | Path, device: torch.device | None = None) -> Any:
    """Load what was saved of this embedder, in its dtype and on its device, with its own module classes."""
    classes = {f"{type(m).__module__}.{type(m).__qualname__}": type(m) for m in embedder.children()}
    options: dict[str, Any] = {"dtype": embedder.dtype, "attn_implementation": embedder.backbone.attn_implementation}
    return type(embedder)._load_with_module_classes(
        str(folder), classes, device=str(device or embedder.device), trust_remote_code=embedder.trust_remote_code,
        model_kwargs=options, local_files_only=True, cache_folder=embedder.cache_folder,
    )  # fmt: skip


def _differences(model: SentenceTransformer, again: SentenceTransformer) -> list[str]:
    """What differs between two models' settings and weights."""
    problems = [
        f"{name} is {getattr(again, name)!r}, not {getattr(model, name)!r}"
        for name in ("prompts", "default_prompt_name", "max_seq_length", "similarity_fn_name", "truncate_dim")
        if getattr(again, name) != getattr(model, name)
    ]
    ours, theirs = model.state_dict(), again.state_dict()
    problems += [f"{name} is missing" for name in ours if name not in theirs]
    problems += [f"{name} was not there before" for name in theirs if name not in ours]
    problems += [
        f"{name} differs" for name, tensor in ours.items() if name in theirs and not _equal(tensor, theirs[name])
    ]
    return problems


def _equal(one: Tensor, other: Tensor) -> bool:
    pairs = list(zip(parts(one), parts(other), strict=False))
    same = len(pairs) == len(parts(one)) == len(parts(other))
    return same and all(torch.equal(a.to(b.dtype), b.to(a.device)) for a, b in pairs)


def out_of_memory(error: BaseException) -> bool:
    # The allocators of CPU, MPS and XPU raise a plain RuntimeError, as does a kernel that finds no room.
    words = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def as_ours(card: str, model_id: str | None, base: str | None) -> str:
    """sentence-transformers' model card, with the lines of its example that are otherwise here."""
    placeholder = "sentence_transformers_model_id"
    unknown = "<!-- - **Base model:** [Unknown](https://huggingface.co/unknown) -->\n"
    for theirs, ours in (
        (unknown, f"- **Base model:** {base} (a folder)\n" if base else ""),
        ("pip install -U sentence-transformers", "pip install 'mlpool[st]'"),
        ("from sentence_transformers import SentenceTransformer\n", "import mlpool\n"),
        ("model = SentenceTransformer(", "model = mlpool.load("),
        (f'mlpool.load("{placeholder}"', f'mlpool.load("{model_id or placeholder}"'),
    ):
        card = card.replace(theirs, ours)
    return card
