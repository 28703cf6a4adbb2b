"""InfoNCE over batches far larger than the memory for activations: hard, in-batch and cross-device negatives.

Cached gradients (GradCache, arXiv 2101.06983): embed all texts and drop the activations, take the loss of the whole
batch on the embeddings, then embed mini-batch by mini-batch again to carry the embeddings' gradients to the weights.
Here every mini-batch is one `torch.utils.checkpoint`, which replays random state and autocast exactly. So there is one
graph and one backward pass, and each parameter receives its gradient once: DDP averages once, FSDP2 reduces once,
accumulation and gradient scaling need no care, and DeepSpeed ZeRO-2, which refuses a second one, sees none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..pooling.base import check_choice, check_positive, log_once

FALSE_NEGATIVES = ("none", "duplicates", "margin")

# Scores [rows, columns] that are alive at once, 128 MiB in float32: beyond, they are computed in blocks of rows, twice.
SCORES_AT_ONCE = 2**25

Features = Mapping[str, Any]


class InfoNCE(nn.Module):
    """-log of the softmax share of an anchor's positive among its negatives, cosine / temperature, mean over anchors.

    A loss for `SentenceTransformerTrainer`: columns anchor, positive, then any number of hard negatives. Scores are
    computed in float32 (float64 for float64 embeddings), whatever the model's precision.

    Args:
        model: a SentenceTransformer, or what the trainer wraps it into (DDP, FSDP2, DeepSpeed).
        temperature: τ, 0.05 as in the paper (cosine × 20).
        in_batch_negatives: also the other texts' positives and hard negatives; without, an anchor's own hard ones only.
        gather_across_devices: in-batch negatives of all processes. Their embeddings are gathered once, differentiably:
            each process takes the loss of its own anchors against everyone's documents, the backward pass sums the
            gradients of all processes at each embedding, and with DDP's mean over processes the weights get exactly
            the gradient of the mean over all anchors. (The other form, everyone's anchors on every process and
            gradients for its own slice alone, needs no second exchange but computes every score once per process.)
        symmetric: the mean of this loss and of the one from positives to anchors.
        cached: embed twice and keep activations of one mini-batch at a time, instead of keeping all. Same numbers.
        mini_batch_tokens: tokens per mini-batch, padding included. Texts of all columns are sorted by length together
            and each mini-batch is trimmed to its own longest; a text longer than this has a mini-batch to itself.
            None (with cached=False): no limit. A model that runs padded gets B texts at most: as many forwards as
            columns, and never more padding than if each column were padded by itself.
        false_negatives: which negatives to leave out of the softmax.
            "none": none.
            "duplicates": the same token ids as the positive or as the anchor (prompts belong to the text), and the
            positive of an anchor with the same token ids.
            "margin": also those that score above the positive's own score + `margin`, or above `factor` × it, judged
            without gradient on the full embeddings. Of both, the lower bound decides.
        margin, factor: for "margin"; margin is 0.1 when neither is given.
        matryoshka_dims: train the leading d numbers of the embedding, for each d given, re-normalised; the loss is the
            sum weighted by `matryoshka_weights` (default 1 each). Costs no further forward. None: all numbers, once.

    Raises: ValueError for options that contradict each other, and for features that fit none of it, when called.

    Under FSDP2 the whole model is unsharded while a mini-batch is embedded again; processes agree on the number of
    mini-batches, as each forward is a collective there. Labels are ignored: positions say which text is the positive.

    Source: arXiv 1807.03748 (InfoNCE), 2101.06983 (cached gradients), 2205.13147 (Matryoshka).
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.05,
        *,
        in_batch_negatives: bool = True,
        gather_across_devices: bool = False,
        symmetric: bool = False,
        cached: bool = True,
        mini_batch_tokens: int | None = 16_384,
        false_negatives: str = "none",
        margin: float | None = None,
        factor: float | None = None,
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0 or not math.isfinite(temperature):
            raise ValueError(f"temperature must be above 0 (cosine x 20 is 0.05), got {temperature!r}")
        check_choice("false_negatives", false_negatives, FALSE_NEGATIVES)
        if mini_batch_tokens is not None:
            check_positive(mini_batch_tokens=mini_batch_tokens)
        elif cached:
            raise ValueError("cached=True needs mini_batch_tokens, tokens per mini-batch; or pass cached=False")
        if not in_batch_negatives and (gather_across_devices or symmetric):
            raise ValueError("gather_across_devices and symmetric use in-batch negatives, but in_batch_negatives=False")
        if false_negatives == "margin":
            margin = 0.1 if margin is None and factor is None else margin
        elif margin is not None or factor is not None:
            raise ValueError(f"margin and factor need false_negatives='margin', got {false_negatives!r}")
        if factor is not None and not factor > 0:
            raise ValueError(f"factor must be above 0, got {factor!r}")
        self.model, self.temperature = model, float(temperature)
        self.in_batch_negatives, self.gather_across_devices = in_batch_negatives, gather_across_devices
        self.symmetric, self.cached, self.mini_batch_tokens = symmetric, cached, mini_batch_tokens
        self.false_negatives, self.margin, self.factor = false_negatives, margin, factor
        self.matryoshka_dims, self.matryoshka_weights = _read_matryoshka(matryoshka_dims, matryoshka_weights)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of this process's anchors.

        Args:
            sentence_features: for each column, what the model's `preprocess` returns for B texts: attention_mask
                [B, T], input_ids and any other tensors per token [B, T, …] or per text [B, …]; padded on either side.
            labels: ignored.

        Returns: scalar, float32 (float64 for float64 embeddings).
        """
        columns = list(sentence_features)
        batch = _check_columns(columns)
        if len(columns) == 2 and not self.in_batch_negatives:
            raise ValueError("in_batch_negatives=False needs hard negatives, but there are two columns only")
        keys = None if self.false_negatives == "none" else _text_keys(columns)
        embeddings = self._embed(columns).unflatten(0, (len(columns), batch))
        return self._loss(embeddings, keys)

    # --- embedding -----------------------------------------------------------------------------------------------

    def _embed(self, columns: list[Features]) -> Tensor:
        """All texts, column after column: [columns · B, D]."""
        groups = _group(columns)
        sharded = _is_sharded(self.model)
        # Unpacked, a short query in a mini-batch of long positives costs as much as they do.
        most = len(columns[0]["attention_mask"]) * (len(columns) if _is_packed(self.model) else 1)
        batches = _split(groups, self.mini_batch_tokens, most, _agree if sharded else None)
        again = _without_wrapper(self.model)
        keep = not (self.cached and torch.is_grad_enabled())
        if not keep:
            _check_cacheable(self.model)
        parts: list[Tensor] = []
        for i, (group, texts) in enumerate(batches):
            first = [self.model] if i == 0 else []
            embed = partial(_embed_mini_batch, first, again, group.settings, group.left, group.width(texts), texts)
            if keep:
                parts.append(embed(group.tensors))
            else:
                # Under FSDP2 to the end, not to the last tensor needed: layers have work to do after their forward.
                with set_checkpoint_early_stop(not sharded):
                    parts.append(checkpoint(embed, group.tensors, use_reentrant=False))
        order = [group.places[text] for group, texts in batches for text in texts]
        embeddings = torch.cat(parts)
        return embeddings[torch.tensor(order).argsort().to(embeddings.device)]

    # --- the loss on embeddings ----------------------------------------------------------------------------------

    def _loss(self, embeddings: Tensor, keys: Tensor | None) -> Tensor:
        """embeddings [columns, B, D]; keys [columns, B], equal where the texts are."""
        width, batch = embeddings.shape[-1], embeddings.shape[1]
        dims = self.matryoshka_dims or (width,)
        if max(dims) > width:
            raise ValueError(f"matryoshka_dims has {max(dims)}, but the embeddings have {width} numbers")
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            mine = torch.arange(batch, device=embeddings.device)
            if self.gather_across_devices and _world_size() > 1:
                _check_equal_sizes(embeddings)
                mine = mine + dist.get_rank() * batch
                embeddings = _AllGather.apply(embeddings).transpose(0, 1).flatten(1, 2)
                keys = None if keys is None else _AllGather.apply(keys).transpose(0, 1).flatten(1, 2)
            if embeddings.shape[:2].numel() == 2:
                log_once("InfoNCE got one anchor and one positive, no negative: its loss is 0")
            losses = [self._from_anchors(embeddings, keys, mine, dims)]
            if self.symmetric:
                losses.append(self._from_positives(embeddings, keys, mine, dims))
            return torch.stack(losses).mean() / batch

    def _from_anchors(self, embeddings: Tensor, keys: Tensor | None, mine: Tensor, dims: Sequence[int]) -> Tensor:
        """Anchors against documents: all, or each against its own."""
        if not self.in_batch_negatives:
            own = embeddings.transpose(0, 1)  # [B, columns, D]: one text's candidates are its own row
            same = None
            if keys is not None:
                k = keys.T
                same = (k[:, 1:] == k[:, :1]) | (k[:, 1:] == k[:, 1:2])
            return self._cross_entropy(own[:, :1], own[:, 1:], torch.zeros_like(mine), same, dims)

        def same_text(rows: Tensor) -> Tensor | None:
            if keys is None:
                return None
            anchors, positives = keys[0, rows, None], keys[1, rows, None]
            documents = keys[1:].flatten()
            same = (documents == positives) | (documents == anchors)
            same[:, : keys.shape[1]] |= keys[0] == anchors
            return same

        return self._in_blocks(embeddings[0], embeddings[1:].flatten(0, 1), mine, same_text, dims)

    def _from_positives(self, embeddings: Tensor, keys: Tensor | None, mine: Tensor, dims: Sequence[int]) -> Tensor:
        """Positives against all anchors."""

        def same_text(rows: Tensor) -> Tensor | None:
            if keys is None:
                return None
            anchors, positives = keys[0, rows, None], keys[1, rows, None]
            return (keys[0] == anchors) | (keys[0] == positives) | (keys[1] == positives)

        return self._in_blocks(embeddings[1], embeddings[0], mine, same_text, dims)

    def _in_blocks(
        self, texts: Tensor, others: Tensor, mine: Tensor, same_text: Callable[[Tensor], Tensor | None],
        dims: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """The sum over `mine` rows of `texts` [N, D] against `others` [M, D], where text i's partner is others[i]."""

        def block(texts: Tensor, others: Tensor, rows: Tensor) -> Tensor:
            return self._cross_entropy(texts[rows], others, rows, same_text(rows), dims)

        blocks = mine.split(max(1, SCORES_AT_ONCE // others.shape[0]))
        if len(blocks) == 1:
            return block(texts, others, mine)
        again = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
        return torch.stack([again(texts, others, rows) for rows in blocks]).sum()

    def _cross_entropy(
        self, texts: Tensor, others: Tensor, partners: Tensor, hidden: Tensor | None, dims: Sequence[int]
    ) -> Tensor:
        """texts [n, D] against others [M, D], or [n, 1, D] each against its own [n, M, D]; summed over n and dims."""

        def cosines(dim: int) -> Tensor:
            a, b = F.normalize(texts[..., :dim], dim=-1), F.normalize(others[..., :dim], dim=-1)
            return (a @ b.transpose(-1, -2)).flatten(1)

        if hidden is not None:
            if self.false_negatives == "margin":
                with torch.no_grad():
                    scores = cosines(texts.shape[-1])
                    hidden = hidden | (scores > self._bound(scores.gather(1, partners[:, None])))
            hidden = hidden.scatter(1, partners[:, None], False)
        total = texts.new_zeros(())
        for dim, weight in zip(dims, self.matryoshka_weights or (1.0,), strict=True):
            scores = cosines(dim) / self.temperature
            if hidden is not None:
                scores = scores.masked_fill(hidden, -math.inf)
            total = total + weight * F.cross_entropy(scores, partners, reduction="sum")
        return total

    def _bound(self, positive: Tensor) -> Tensor:
        """The score above which a negative is taken for a second positive."""
        bounds = [positive + self.margin] if self.margin is not None else []
        bounds += [positive * self.factor] if self.factor is not None else []
        return torch.stack(bounds).amin(0)

    # --- what the trainer and the model card ask -----------------------------------------------------------------

    @property
    def uses_gradient_cache(self) -> bool:
        """sentence-transformers' own mark of losses that embed again during the backward pass."""
        return self.cached

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        names = (
            "temperature", "in_batch_negatives", "gather_across_devices", "symmetric", "cached", "mini_batch_tokens",
            "false_negatives", "margin", "factor", "matryoshka_dims", "matryoshka_weights",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.get_config_dict().items())

    @property
    def citation(self) -> str:
        """BibTeX of what the options use."""
        used = [_INFONCE] + [_GRADCACHE] * self.cached + [_MATRYOSHKA] * (self.matryoshka_dims is not None)
        return "\n".join(used)


def _read_matryoshka(
    dims: Sequence[int] | None, weights: Sequence[float] | None
) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    if dims is None:
        if weights is not None:
            raise ValueError("matryoshka_weights needs matryoshka_dims")
        return None, None
    if not dims or len(set(dims)) < len(dims):
        raise ValueError(f"matryoshka_dims must be different sizes, at least one, got {list(dims)}")
    check_positive(**{f"matryoshka_dims[{i}]": d for i, d in enumerate(dims)})
    weights = (1.0,) * len(dims) if weights is None else tuple(float(w) for w in weights)
    if len(weights) != len(dims) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(f"matryoshka_weights must be {len(dims)} numbers, none below 0, got {list(weights)}")
    return tuple(dims), weights


# --- texts of all columns in mini-batches ------------------------------------------------------------------------


@dataclass
class _Group:
    """Texts of columns that can share a forward: the same features, the same settings.

    tensors: per token [N, T, …] or per text [N, …]. settings: what belongs to no text (a prompt's length, a task).
    left: padded on the left. widths: the places that each text takes when trimmed. places: of each text in the whole
    batch, column after column.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    left: bool
    widths: list[int]
    places: list[int]

    def width(self, texts: Sequence[int]) -> int:
        return max(self.widths[text] for text in texts)


def _check_columns(columns: list[Features]) -> int:
    """B, the same for all columns."""
    if len(columns) < 2:
        raise ValueError(f"InfoNCE needs an anchor and a positive column, got {len(columns)} column(s)")
    for i, column in enumerate(columns):
        mask = column.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ValueError(
                f"column {i} has no attention_mask [batch, tokens] but {sorted(column)}; InfoNCE takes padded texts "
                "(flattened input of a sentence-transformers model: unpad_inputs=False)"
            )
    sizes = {column["attention_mask"].shape[0] for column in columns}
    if len(sizes) > 1:
        raise ValueError(f"all columns must have the same number of texts, got {sorted(sizes)}")
    return sizes.pop()


def _group(columns: list[Features]) -> list[_Group]:
    """Columns that can share forwards, merged."""
    alike: list[tuple[dict[str, Any], list[int]]] = []
    for i, column in enumerate(columns):
        settings = {name: _setting(column, name) for name in column if not _is_of_texts(column, name)}
        for other, members in alike:
            if other == settings and columns[members[0]].keys() == column.keys():
                members.append(i)
                break
        else:
            alike.append((settings, [i]))
    return [_merge(columns, members, settings) for settings, members in alike]


def _is_of_texts(column: Features, name: str) -> bool:
    # prompt_length is one number for the batch, in whatever form it comes.
    return isinstance(column[name], Tensor) and name != "prompt_length"


def _setting(column: Features, name: str) -> Any:
    value = column[name]
    return int(value.flatten()[0]) if isinstance(value, Tensor) else value


def _merge(columns: list[Features], members: list[int], settings: dict[str, Any]) -> _Group:
    masks = [columns[i]["attention_mask"] != 0 for i in members]
    spans = [torch.stack((m.int().argmax(1), m.flip(1).int().argmax(1)), 1) for m in masks]
    free = torch.cat(spans).tolist()  # of each text: free places before its first and after its last token
    tokens = [m.shape[1] for m in masks for _ in range(m.shape[0])]
    # Padding on both sides (or holes at an end) stays as it is and is trimmed on the right.
    left = any(before for before, _ in free) and not any(after for _, after in free)
    widths = [t - (before if left else after) for t, (before, after) in zip(tokens, free, strict=True)]
    batch = masks[0].shape[0]
    padded = next((text for text, ends in enumerate(free) if ends[0 if left else 1]), None)
    tensors = {}
    for name in columns[members[0]].keys() - settings.keys():
        values = [columns[i][name] for i in members]
        if any(v.ndim == 0 or v.shape[0] != batch for v in values):
            raise ValueError(
                f"feature {name!r} is {list(values[0].shape)}, expected {batch} texts; InfoNCE takes texts"
            )
        if all(v.shape[:2] == m.shape for v, m in zip(values, masks, strict=True)):
            # What the tokenizer pads with: models may compute positions from it.
            fill = torch.zeros_like(values[0][0, 0])
            if padded is not None:
                fill = values[padded // batch][padded % batch, 0 if left else -1]
            values = [_fit(v, max(widths), left, fill) for v in values]
        tensors[name] = torch.cat(values)
    places = [i * batch + text for i in members for text in range(batch)]
    return _Group(tensors, settings, left, widths, places)


def _fit(value: Tensor, width: int, left: bool, fill: Tensor) -> Tensor:
    """value [B, T, …] trimmed or padded to [B, width, …]."""
    value = value[:, -width:] if left else value[:, :width]
    missing = fill.expand(value.shape[0], width - value.shape[1], *fill.shape)
    return torch.cat((missing, value) if left else (value, missing), 1)


def _split(
    groups: list[_Group], budget: int | None, most: int, agree: Callable[[int, torch.device], int] | None
) -> list[tuple[_Group, list[int]]]:
    """Mini-batches of at most `most` texts, longest first, of at most `budget` tokens with padding or of one text.

    `agree` maps this process's number of mini-batches to everyone's; the largest are halved until there are as many.
    """
    batches = []
    for group in groups:
        order = sorted(range(len(group.widths)), key=lambda text: -group.widths[text])
        while order:
            size = most if budget is None else min(most, max(1, budget // max(1, group.widths[order[0]])))
            batches.append((group, order[:size]))
            order = order[size:]
    wanted = agree(len(batches), groups[0].tensors["attention_mask"].device) if agree else len(batches)
    while len(batches) < wanted:
        i = max(range(len(batches)), key=lambda i: len(batches[i][1]))
        group, texts = batches[i]
        if len(texts) == 1:
            raise ValueError("processes hold batches of different sizes; set dataloader_drop_last=True")
        half = len(texts) // 2
        batches[i : i + 1] = [(group, texts[:half]), (group, texts[half:])]
    return batches


def _embed_mini_batch(
    first: list[nn.Module], again: nn.Module, settings: dict[str, Any], left: bool, width: int, texts: list[int],
    tensors: dict[str, Tensor],
) -> Tensor:  # fmt: skip
    """The texts' embeddings [n, D]: the first call by the model in `first`, if there is one, all others by `again`.

    Features are copied out for every call: modules write into them.
    """
    mask = tensors["attention_mask"]
    rows = torch.tensor(texts, device=mask.device)
    part = slice(mask.shape[1] - width, None) if left else slice(width)
    features = {n: t[rows, part] if t.shape[:2] == mask.shape else t[rows] for n, t in tensors.items()}
    model = first.pop() if first else again
    return model({**features, **settings})["sentence_embedding"]  # type: ignore[no-any-return]


def _text_keys(columns: list[Features]) -> Tensor:
    """[columns, B] int64: 64 bits of a hash of each text's token ids, so equal where these are."""
    keys = []
    for column in columns:
        if "input_ids" not in column:
            raise ValueError(f"false_negatives compares input_ids, but the features are {sorted(column)}")
        masks, ids = (column["attention_mask"] != 0).cpu(), column["input_ids"].cpu()
        texts = (row[mask].numpy().tobytes() for row, mask in zip(ids.long(), masks, strict=True))
        keys.append([int.from_bytes(hashlib.blake2b(t, digest_size=8).digest(), signed=True) for t in texts])
    return torch.tensor(keys, device=columns[0]["attention_mask"].device)


# --- several processes -------------------------------------------------------------------------------------------


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllGather(torch.autograd.Function):
    """x of every process, stacked; backward sums the gradients of all processes. (torch's own is deprecated.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def _check_equal_sizes(embeddings: Tensor) -> None:
    """A gather of unequal sizes would wait forever."""
    sizes = torch.tensor([[n, -n] for n in embeddings.shape], device=embeddings.device)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    if (sizes.sum(1) != 0).any():
        raise ValueError(
            f"embeddings [columns, batch, numbers] are {list(embeddings.shape)} here and up to {sizes[:, 0].tolist()} "
            "elsewhere; set dataloader_drop_last=True"
        )


def _agree(count: int, device: torch.device) -> int:
    """The largest `count` of all processes."""
    counts = torch.tensor(count, device=device)
    if _world_size() > 1:
        dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return int(counts)


def _is_packed(model: nn.Module) -> bool:
    """Whether the model computes no padding: a `Backbone` that is packed."""
    return any(getattr(module, "packed", False) is True for module in model.modules())


def _is_sharded(model: nn.Module) -> bool:
    """Whether a forward gathers weights from other processes: FSDP2, ZeRO-3."""
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters())


def _without_wrapper(model: nn.Module) -> nn.Module:
    """The model for all mini-batches but the first: DDP expects one forward, as there is one backward.

    Each further one would prepare it anew, in the middle of the backward pass too, and exchange buffers, a number of
    times that differs between processes.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    if isinstance(inner, DistributedDataParallel) or type(inner).__name__ == "DeepSpeedEngine":
        return inner.module  # type: ignore[no-any-return]
    return model


def _check_cacheable(model: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("cached=True does not run under FSDP 1; use FSDP2 (fsdp_version: 2) or cached=False")
    if hasattr(model, "_orig_mod") and _without_wrapper(model) is not model:
        raise ValueError("cached=True does not run under torch.compile around DDP; compile the model inside it instead")


_INFONCE = """@misc{oord2018representation,
    title = {Representation Learning with Contrastive Predictive Coding},
    author = {van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol},
    year = {2018}, eprint = {1807.03748}, archivePrefix = {arXiv},
}"""
_GRADCACHE = """@misc{gao2021scaling,
    title = {Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author = {Gao, Luyu and Zhang, Yunyi and Han, Jiawei and Callan, Jamie},
    year = {2021}, eprint = {2101.06983}, archivePrefix = {arXiv},
}"""
_MATRYOSHKA = """@misc{kusupati2022matryoshka,
    title = {Matryoshka Representation Learning},
    author = {Kusupati, Aditya and Bhatt, Gantavya and Rege, Aniket and others},
    year = {2022}, eprint = {2205.13147}, archivePrefix = {arXiv},
}"""
