"""Layer states of texts, taken once from a frozen base and kept on disk, memory-mapped.

    states/states.json         whose they are: model, texts, how their tokens were pooled, sizes
    states/part-00000.npy      [n, L, D+1] float16: of each row D numbers, and the power of two that they are multiplied
                               by, so that massive activations stay within float16's range
    states/part-00000.sha256   written after it: a part counts where its digest agrees

A kill at any moment loses the part that was being taken.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.base.modules import Module
from torch import Tensor

from ..embedder import Embedder
from ..embedder.adapters import has_adapter
from ..embedder.identity import identity
from ..files import check_folder_name, check_room, read_json, replacing, sha256, write_json, write_text
from ..show import progress

PLAN = "states.json"
PART = 512  # rows
ROOM = (
    "the layer states of the texts; name a folder on a larger disk (states:), or take fewer texts (data.limit) or "
    "layers (layers, depth)"
)
_TOP = 14  # a row's numbers are brought below 2^14: float16 ends at 2^16, and loses digits below 2^-14 alone
Text = tuple[str, str]  # its prompt, which may be empty, and the text


class KeptStates:
    """Layer states [N, L, D] of N texts, by row; see `take_states`.

    Attributes:
        shape: (N, L, D). identity: a hash of model, texts and pooling.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.shape: tuple[int, int, int] = (plan["texts"], plan["layers"], plan["hidden_size"])
        self.identity = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
        self._parts = [np.load(path, mmap_mode="r") for path, _ in _parts(folder, plan["texts"])]

    def rows(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """[n, L, D] float32, in the order of `rows`."""
        wanted = np.asarray(rows, np.int64)
        out = np.empty((len(wanted), *self.shape[1:]), np.float32)
        for part in np.unique(wanted // PART):
            here = wanted // PART == part
            out[here] = unpacked(self._parts[part][wanted[here] % PART])
        return torch.from_numpy(out)


def packed(states: Tensor) -> NDArray[np.float16]:
    """[n, L, D] of any finite size → [n, L, D+1] float16: of each row its D numbers over 2^e, and e."""
    wide = states.float().cpu().numpy()
    _, exponent = np.frexp(np.abs(wide).max(-1, keepdims=True))
    exponent = np.where(exponent == 0, 0, exponent - _TOP)
    return np.concatenate([np.ldexp(wide, -exponent), exponent], -1).astype(np.float16)


def unpacked(kept: NDArray[np.float16]) -> NDArray[np.float32]:
    """What `packed` was given, to 11 bits."""
    return np.ldexp(kept[..., :-1].astype(np.float32), kept[..., -1:].astype(np.int32))


def take_states(
    embedder: Embedder, texts: Sequence[Text], folder: str | Path, *, token_budget: int | None = None
) -> KeptStates:
    """Layer states of texts, as an embedder's pool would read them: those that are kept already, and the rest taken.

    Args:
        embedder: of a design that reads layers, without an adapter; its pool does not matter.
        texts: each once. folder: new, or with states of this very model and these very texts, whole or begun.
        token_budget: tokens a forward; None as in `encode`.

    Raises:
        ValueError: a folder with states of another model, other texts or otherwise pooled (what differs is said) or
            damaged; an adapter; a state that is not finite (its text is named).
        OSError: the disk has no room; how much is needed is said, and nothing is begun.
    """
    folder = Path(folder)
    plan = plan_of(embedder, texts)
    todo = missing(folder, plan)
    check_room(folder, disk_need(plan, sum(count for _, count in todo)), ROOM)
    if not (folder / PLAN).is_file():
        write_json(folder / PLAN, plan)
    modules: Any = OrderedDict(backbone=embedder.backbone, rows=_Rows())
    taker = Embedder(modules=modules, device=str(embedder.device)).eval()
    done = len(texts) - sum(count for _, count in todo)
    with progress("layer states", "text", len(texts), initial=done) as bar:
        for path, count in todo:
            start = int(path.stem.rpartition("-")[2]) * PART
            with replacing(path) as new:
                np.save(new, packed(_take(taker, texts[start : start + count], plan, token_budget, bar)))
            write_text(path.with_suffix(".sha256"), sha256(path))
    return KeptStates(folder, plan)


def plan_of(embedder: Embedder, texts: Sequence[Text]) -> dict[str, Any]:
    """Whose states they are to be, as states.json says it; ValueError of a base that is not frozen, or not read."""
    backbone = embedder.backbone
    if has_adapter(backbone.model):
        raise ValueError(
            "this embedder has an adapter, which training would change under the kept states; merge it first (mlpool "
            "merge), or go on with `mlpool train`"
        )
    if not backbone._design.reads_all_layers:
        raise ValueError(f"{backbone.design} reads tokens of the last layer, and kept are rows of layers")
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode())
    return {
        "model": identity(backbone), "design": backbone.design, "token_pooling": backbone._design.token_pooling,
        "skip_tokens": backbone.skip_tokens, "max_seq_length": backbone.max_seq_length,
        "texts_sha256": digest.hexdigest(), "texts": len(texts),
        "layers": backbone.num_layers if backbone.layers is None else len(backbone.layers),
        "hidden_size": backbone.hidden_size,
    }  # fmt: skip


def missing(folder: Path, plan: dict[str, Any]) -> list[tuple[Path, int]]:
    """The parts that are not kept yet, each with its rows.

    Raises:
        ValueError: the folder holds other states, or something else.
    """
    check_folder_name(folder)
    parts = _parts(folder, plan["texts"])
    if not folder.is_dir() or not any(folder.iterdir()):
        return parts
    if not (folder / PLAN).is_file():
        raise ValueError(f"{folder} holds no {PLAN}: it is no folder of kept states; name a new or empty one (states:)")
    kept = read_json(folder / PLAN, dict, "delete the folder, or name another (states:)")
    if changed := [name for name in sorted({*kept, *plan}) if kept.get(name) != plan.get(name)]:
        found = ", ".join(f"{name} was {kept.get(name)!r}, is {plan.get(name)!r}" for name in changed)
        raise ValueError(
            f"{folder} keeps the states of another model or of other texts: {found}. Name another folder (states:), or "
            "delete this one"
        )
    return [(path, count) for path, count in parts if not _is_whole(path)]


def disk_need(plan: dict[str, Any], rows: int | None = None) -> int:
    """Bytes of so many rows; of all by default."""
    return (plan["texts"] if rows is None else rows) * plan["layers"] * (plan["hidden_size"] + 1) * 2


def _parts(folder: Path, texts: int) -> list[tuple[Path, int]]:
    """Every part and its rows."""
    starts = range(0, texts, PART)
    return [(folder / f"part-{start // PART:05d}.npy", min(PART, texts - start)) for start in starts]


def _is_whole(path: Path) -> bool:
    digest = path.with_suffix(".sha256")
    return path.is_file() and digest.is_file() and digest.read_text(encoding="utf8") == sha256(path)


class _Rows(Module):
    """In the place of a pooler: the layers' rows themselves, one after the other, [B, L·D]."""

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        features["sentence_embedding"] = features["layer_states"].flatten(1)
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        raise NotImplementedError


@torch.inference_mode()
def _take(taker: Embedder, texts: Sequence[Text], plan: dict[str, Any], token_budget: int | None, bar: Any) -> Tensor:
    """[n, L, D] of one part."""
    taker.backbone.arrange()
    out = torch.empty(len(texts), plan["layers"], plan["hidden_size"])
    for prompt in dict.fromkeys(prompt for prompt, _ in texts):
        places = [i for i, text in enumerate(texts) if text[0] == prompt]
        tokens = taker.backbone.token_ids([texts[i][1] for i in places], prompt or None)
        budget = token_budget or taker.default_budget(taker.device)
        for part, rows in taker._batches(tokens, budget, len(places), taker.device):
            out[[places[i] for i in part]] = rows.float().cpu().unflatten(1, out.shape[1:])
            bar.update(len(part))
    if wrong := (~out.isfinite().all(-1).all(-1)).nonzero().flatten().tolist():
        raise ValueError(
            f"{len(wrong)} texts have states that are NaN or infinite, the first {texts[wrong[0]][1][:80]!r}; load "
            "with dtype: float32 or bfloat16, and look at them"
        )
    return out
