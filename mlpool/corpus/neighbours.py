"""The nearest of many embeddings, exactly, in bounded memory: piece after piece of what is on the disk."""

import importlib.util
from collections.abc import Callable

import numpy as np
import torch

from ..pooling.base import check_choice, log_once
from .text_store import Embeddings

SEARCHES = ("auto", "faiss", "torch")
_SCORES = 2**26  # held at once: 256 MiB
Found = tuple[np.ndarray, np.ndarray]  # scores [N, k] float32, falling, and rows [N, k] int64


def nearest(queries: np.ndarray, others: Embeddings, k: int, device: torch.device, search: str = "auto") -> Found:
    """The k of `others` with the highest inner product with each query.

    Held beside the result are one piece of `others` and its best k. The order of equal scores is not defined.

    Args:
        queries: float32 [N, D]. search: of `SEARCHES`, see `choose_search`.

    Returns: scores and rows; -inf and -1 where there are fewer than k.
    """
    by = _by_faiss if choose_search(search, device) == "faiss" else _by_torch(device)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for first, piece in others.pieces():
        found, at = by(queries, piece, min(k, len(piece)))
        scores, rows = np.concatenate([scores, found], 1), np.concatenate([rows, at + first], 1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
    return scores, rows


def choose_search(search: str, device: torch.device) -> str:
    """ "faiss", which may be missing, or "torch"; of "auto" faiss on a CPU where it is installed, else torch."""
    check_choice("search", search, SEARCHES)
    here = importlib.util.find_spec("faiss") is not None
    if search == "faiss" and not here:
        raise ModuleNotFoundError("search='faiss' needs faiss: pip install 'mlpool[mine]'; or search='torch'")
    if search == "auto" and device.type == "cpu" and not here:
        log_once("faiss is not installed (pip install 'mlpool[mine]'): torch searches, as exactly")
    return "faiss" if search == "faiss" or (search == "auto" and device.type == "cpu" and here) else "torch"


def _by_faiss(queries: np.ndarray, others: np.ndarray, k: int) -> Found:
    import faiss

    return faiss.knn(queries, others, k, metric=faiss.METRIC_INNER_PRODUCT)  # type: ignore[no-any-return]


def _by_torch(device: torch.device) -> Callable[[np.ndarray, np.ndarray, int], Found]:
    def by(queries: np.ndarray, others: np.ndarray, k: int) -> Found:
        documents, parts = torch.from_numpy(others).to(device), []
        for part in torch.from_numpy(queries).split(max(1, _SCORES // len(others))):
            parts.append([t.cpu() for t in (part.to(device) @ documents.T).topk(k, dim=1)])
        scores, rows = (torch.cat(side).numpy() for side in zip(*parts, strict=True))
        return scores, rows

    return by
