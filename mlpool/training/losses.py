"""InfoNCE over batches far larger than the memory for activations: hard, in-batch and cross-device negatives.

Cached gradients (GradCache, arXiv 2101.06983): embed all texts and drop the activations, take the loss of the whole
batch on the embeddings, then embed mini-batch by mini-batch again to carry the embeddings' gradients to the weights.
Here every mini-batch is one `torch.utils.checkpoint`, which replays random state and autocast exactly. So there is one
graph and one backward pass, and each parameter receives its gradient once: DDP averages once, FSDP2 reduces once,
accumulation and gradient scaling need no care, and DeepSpeed ZeRO-2, which refuses a second one, sees none.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mlpool_kernels import contrast
from mlpool_kernels.contrast import bound_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..pooling.base import check_choice, check_positive, log_once
from .memory import how_many, saved_bytes
from .mini_batches import Features, TokenCounts, check_columns, embed_mini_batch, group, is_packed, split, text_keys
from .processes import (
    agree,
    check_cacheable,
    check_equal_sizes,
    is_sharded,
    ring_contrast,
    without_wrapper,
    world_size,
)
from .teacher import Teacher

FALSE_NEGATIVES = ("none", "duplicates", "margin")
CACHED = ("auto", True, False)


class InfoNCE(nn.Module):
    """-log of the softmax share of an anchor's positive among its negatives, cosine / temperature, mean over anchors.

    A loss for `SentenceTransformerTrainer`: columns anchor, positive, then any number of hard negatives. Scores are
    computed in float32 (float64 for float64 embeddings), whatever the model's precision.

    Args:
        model: a SentenceTransformer, or what the trainer wraps it into (DDP, FSDP2, DeepSpeed).
        temperature: τ, 0.05 as in the paper (cosine × 20).
        in_batch_negatives: also the other texts' positives and hard negatives; without, an anchor's own hard ones only.
        gather_across_devices: in-batch negatives of all processes. Each takes the loss of its own anchors against
            everyone's documents, which pass by in a ring, so that none holds them all; the backward pass sums the
            gradients of all processes at each embedding, and with DDP's mean over processes the weights get exactly
            the gradient of the mean over all anchors.
        symmetric: the mean of this loss and of the one from positives to anchors.
        cached: True embeds twice and keeps the activations of one mini-batch at a time, False keeps all. "auto" keeps
            those of as many mini-batches as memory allows, the longest first, and embeds the others twice: none, where
            all fit. What a token costs is measured on the first mini-batch, which is kept; memory is the GPU's, or
            what the system says is available. All with the same numbers.
        mini_batch_tokens: tokens per mini-batch, those that are computed: of text alone where the model runs packed,
            else padding included. Texts of all columns are sorted by length together, and each mini-batch is packed, or
            trimmed to its own longest; a text longer than this has a mini-batch to itself. None (with cached=False): no
            limit. A model that runs padded gets B texts at most: as many forwards as columns, and never more padding
            than if each column were padded by itself.
        false_negatives: which negatives to leave out of the softmax.
            "none": none.
            "duplicates": the same token ids as the positive or as the anchor (prompts belong to the text), and the
            positive of an anchor with the same token ids.
            "margin": also those that score above the positive's own score + `margin`, or above `factor` × it, judged
            without gradient on the full embeddings. Of both, the lower bound decides.
        margin, factor: for "margin"; margin is 0.1 when neither is given.
        matryoshka_dims: train the leading d numbers of the embedding, for each d given, re-normalised; the loss is the
            sum weighted by `matryoshka_weights` (default 1 each). Costs no further forward. None: all numbers, once.
        teacher: a larger model's scores or embeddings as a second target, added to this loss.

    Raises: ValueError for options that contradict each other, and for features that fit none of it, when called.

    Under FSDP2 the whole model is unsharded while a mini-batch is embedded again; processes agree on the number of
    mini-batches, as each forward is a collective there. Labels are a teacher's alone: positions say which text is the
    positive.

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
        cached: bool | Literal["auto"] = "auto",
        mini_batch_tokens: int | None = 16_384,
        false_negatives: str = "none",
        margin: float | None = None,
        factor: float | None = None,
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0 or not math.isfinite(temperature):
            raise ValueError(f"temperature must be above 0 (cosine x 20 is 0.05), got {temperature!r}")
        check_choice("false_negatives", false_negatives, FALSE_NEGATIVES)
        if cached not in CACHED:
            raise ValueError(f"cached must be one of {CACHED}, got {cached!r}")
        if mini_batch_tokens is not None:
            check_positive(mini_batch_tokens=mini_batch_tokens)
        elif cached:
            raise ValueError(f"cached={cached} needs mini_batch_tokens, tokens per mini-batch; or pass cached=False")
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
        self.teacher = teacher
        if teacher is not None:
            teacher.check_width(getattr(model, "get_embedding_dimension", lambda: None)())
        self.matryoshka_dims, self.matryoshka_weights = _read_matryoshka(matryoshka_dims, matryoshka_weights)
        self.counts = TokenCounts()
        self.embeddings: Tensor | None = None  # of the last batch [columns, B, D], to say which text is at fault
        self._looked = false_negatives == "none"

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss of this process's anchors.

        Args:
            sentence_features: for each column, what the model's `preprocess` returns for B texts: attention_mask
                [B, T], input_ids and any other tensors per token [B, T, …] or per text [B, …]; padded on either side.
            labels: of the teacher; without one ignored.

        Returns: scalar, float32 (float64 for float64 embeddings).
        """
        columns = list(sentence_features)
        batch = check_columns(columns)
        if len(columns) == 2 and not self.in_batch_negatives:
            raise ValueError("in_batch_negatives=False needs hard negatives, but there are two columns only")
        keys = None if self.false_negatives == "none" else text_keys(columns)
        embeddings = self._embed(columns).unflatten(0, (len(columns), batch))
        self.embeddings = embeddings.detach()
        return self._loss(embeddings, keys, labels)

    # --- embedding -----------------------------------------------------------------------------------------------

    def _embed(self, columns: list[Features]) -> Tensor:
        """All texts, column after column: [columns · B, D]."""
        sharded = is_sharded(self.model)
        packed = is_packed(self.model)
        # Unpacked, a short query in a mini-batch of long positives costs as much as they do.
        most = len(columns[0]["attention_mask"]) * (len(columns) if packed else 1)
        batches = split(group(columns), self.mini_batch_tokens, most, agree if sharded else None, packed)
        again = without_wrapper(self.model)
        keep = len(batches)
        if self.cached and torch.is_grad_enabled():
            check_cacheable(self.model)
            keep = min(1, keep) if self.cached == "auto" else 0
        parts: list[Tensor] = []
        for i, (texts_of, texts) in enumerate(batches):
            first = [self.model] if i == 0 else []
            embed = partial(embed_mini_batch, first, again, texts_of, texts, packed)
            if i == 0 and keep == 1 < len(batches):
                with saved_bytes(self.model) as saved:
                    parts.append(embed(texts_of.tensors))
                keep = how_many(saved(), [g.computed(t, packed) for g, t in batches], self.model, parts[0].device)
                # A forward is a collective there: everyone embeds the same mini-batches twice.
                keep = -agree(-keep, parts[0].device) if sharded else keep
            elif i < keep:
                parts.append(embed(texts_of.tensors))
            else:
                # Under FSDP2 to the end, not to the last tensor needed: layers have work to do after their forward.
                with set_checkpoint_early_stop(not sharded):
                    parts.append(checkpoint(embed, texts_of.tensors, use_reentrant=False))
        if torch.is_grad_enabled():
            # Asked again: a model on a GPU packs itself in its first forward under autocast.
            self.counts.add(batches, is_packed(self.model))
        order = [g.places[text] for g, texts in batches for text in texts]
        embeddings = torch.cat(parts)
        return embeddings[torch.tensor(order).argsort().to(embeddings.device)]

    # --- the loss on embeddings ----------------------------------------------------------------------------------

    def _loss(self, embeddings: Tensor, keys: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """embeddings [columns, B, D]; keys [columns, B], equal where the texts are."""
        width, batch = embeddings.shape[-1], embeddings.shape[1]
        dims = self.matryoshka_dims or (width,)
        if max(dims) > width:
            raise ValueError(f"matryoshka_dims has {max(dims)}, but the embeddings have {width} numbers")
        together = self.gather_across_devices and world_size() > 1
        if together:
            check_equal_sizes(embeddings)
        elif embeddings.shape[:2].numel() == 2:
            log_once("InfoNCE got one anchor and one positive, no negative: its loss is 0")
        weights = self.matryoshka_weights or (1.0,) * len(dims)
        rising = sorted(zip(dims, weights, strict=True))
        dims = tuple(dim for dim, _ in rising)
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            if self.in_batch_negatives:
                losses = self._in_batch(embeddings, keys, dims, ring_contrast if together else contrast)
            else:
                losses = self._own(embeddings, keys, dims)
            self._look(losses)
            shares = embeddings.new_tensor([weight for _, weight in rising])
            loss = shares @ losses.sum(1) / batch
            if self.teacher is not None:
                loss = loss + self.teacher(embeddings, labels, self.temperature, dims, shares)
            return loss

    def _look(self, losses: Tensor) -> None:
        """Say of the first batch, for which a GPU may be waited for, that nothing is left to learn from."""
        if not self._looked and not losses.any():
            bounds = f"margin={self.margin}, factor={self.factor}" if self.false_negatives == "margin" else "the texts"
            log_once(
                f"false_negatives={self.false_negatives!r} leaves no negative to any of the first {losses.shape[1]} "
                f"anchors ({bounds}): their loss is 0, and nothing is learned from them"
            )
        self._looked = True

    def _in_batch(
        self, embeddings: Tensor, keys: Tensor | None, dims: Sequence[int], loss: Callable[..., Tensor]
    ) -> Tensor:
        """Anchors against all documents and, with symmetric, positives against all anchors: [dims, B]."""
        partners = torch.arange(embeddings.shape[1], device=embeddings.device)
        options = {"temperature": self.temperature, "dims": dims, "margin": self.margin, "factor": self.factor}
        documents = companions = None
        if keys is not None:
            # Of each text its key and its partner's; a hard negative has no partner.
            documents = torch.stack([keys[1:], torch.cat([keys[:1], keys[2:]])], -1).flatten(0, 1)
            companions = documents[: len(partners)].flip(1)
        # The keys of anchors as rows and as others: (anchor, positive).
        found = loss(
            embeddings[0], embeddings[1:].flatten(0, 1), partners, row_keys=companions, other_keys=documents, **options
        )
        if not self.symmetric:
            return found
        positives = None if documents is None else documents[: len(partners)]
        back = loss(embeddings[1], embeddings[0], partners, row_keys=positives, other_keys=companions, **options)
        return (found + back) / 2

    def _own(self, embeddings: Tensor, keys: Tensor | None, dims: Sequence[int]) -> Tensor:
        """Each anchor against its own documents: [dims, B]."""
        anchors, documents = embeddings[0], embeddings[1:].transpose(0, 1)

        def cosines(dim: int) -> Tensor:
            a, b = F.normalize(anchors[:, :dim], dim=-1), F.normalize(documents[..., :dim], dim=-1)
            return (b @ a[..., None]).squeeze(-1)

        hidden = torch.zeros(documents.shape[:2], dtype=torch.bool, device=embeddings.device)
        if keys is not None:
            hidden = (keys[1:] == keys[0]).logical_or_(keys[1:] == keys[1]).T
        if self.false_negatives == "margin":
            with torch.no_grad():
                scores = cosines(anchors.shape[1])
                hidden = hidden | (scores > bound_of(scores[:, :1], self.margin, self.factor))
        hidden[:, 0] = False
        targets = torch.zeros_like(hidden[:, 0], dtype=torch.int64)
        each = [(cosines(dim) / self.temperature).masked_fill(hidden, -math.inf) for dim in dims]
        return torch.stack([F.cross_entropy(scores, targets, reduction="none") for scores in each])

    # --- what the trainer and the model card ask -----------------------------------------------------------------

    @property
    def uses_gradient_cache(self) -> bool:
        """sentence-transformers' own mark of losses that embed again during the backward pass."""
        return bool(self.cached)

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        names = (
            "temperature", "in_batch_negatives", "gather_across_devices", "symmetric", "cached", "mini_batch_tokens",
            "false_negatives", "margin", "factor", "matryoshka_dims", "matryoshka_weights",
        )  # fmt: skip
        options = {name: getattr(self, name) for name in names}
        return options if self.teacher is None else {**options, "teacher": self.teacher.options()}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.get_config_dict().items())

    @property
    def citation(self) -> str:
        """BibTeX of what the options use."""
        used = [_INFONCE] + [_GRADCACHE] * bool(self.cached) + [_MATRYOSHKA] * (self.matryoshka_dims is not None)
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
