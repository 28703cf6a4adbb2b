"""The texts of all columns of a batch in mini-batches of tokens: grouped, sorted, trimmed or packed, embedded."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..pooling.tokens import note_offsets

Features = Mapping[str, Any]


@dataclass
class Group:
    """Texts of columns that can share a forward: the same features, the same settings.

    tensors: per token [N, T, …] or per text [N, …]. settings: what belongs to no text (a prompt's length, a task).
    left: padded on the left. widths: the places that each text takes when trimmed. lengths: its tokens. places: of each
    text in the whole batch, column after column.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    left: bool
    widths: list[int]
    lengths: list[int]
    places: list[int]

    def width(self, texts: Sequence[int]) -> int:
        return max(self.widths[text] for text in texts)

    def tokens(self, texts: Sequence[int]) -> int:
        """Tokens of text."""
        return sum(self.lengths[text] for text in texts)

    def computed(self, texts: Sequence[int], packed: bool) -> int:
        """Tokens that a forward of these texts computes: those of the text, or as many as the longest has for each."""
        return self.tokens(texts) if packed else len(texts) * self.width(texts)

    def fitting(self, texts: Sequence[int], budget: int, packed: bool) -> int:
        """How many of `texts`, the longest first, a forward of `budget` tokens takes: one at least."""
        if not packed:
            return max(1, budget // max(1, self.widths[texts[0]]))
        ends = itertools.accumulate(self.lengths[text] for text in texts)
        return max(1, sum(1 for _ in itertools.takewhile(lambda end: end <= budget, ends)))


def check_columns(columns: list[Features]) -> int:
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


def group(columns: list[Features]) -> list[Group]:
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


def _merge(columns: list[Features], members: list[int], settings: dict[str, Any]) -> Group:
    masks = [columns[i]["attention_mask"] != 0 for i in members]
    spans = [torch.stack((m.int().argmax(1), m.flip(1).int().argmax(1), m.sum(1)), 1) for m in masks]
    # Of each text: free places before its first and after its last token, and its tokens.
    before_first, after_last, lengths = map(list, zip(*torch.cat(spans).tolist(), strict=True))
    free = list(zip(before_first, after_last, strict=True))
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
    return Group(tensors, settings, left, widths, lengths, places)


def _fit(value: Tensor, width: int, left: bool, fill: Tensor) -> Tensor:
    """value [B, T, …] trimmed or padded to [B, width, …]."""
    value = value[:, -width:] if left else value[:, :width]
    missing = fill.expand(value.shape[0], width - value.shape[1], *fill.shape)
    return torch.cat((missing, value) if left else (value, missing), 1)


def split(
    groups: list[Group], budget: int | None, most: int, agree: Callable[[int, torch.device], int] | None, packed: bool
) -> list[tuple[Group, list[int]]]:
    """Mini-batches of at most `most` texts, longest first, of at most `budget` tokens computed or of one text.

    `packed`: no padding is computed, so none is counted. `agree` maps this process's number of mini-batches to
    everyone's; the largest are halved until there are as many.
    """
    batches = []
    for group in groups:
        order = sorted(range(len(group.widths)), key=lambda text: -group.widths[text])
        while order:
            size = most if budget is None else min(most, group.fitting(order, budget, packed))
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


@dataclass
class TokenCounts:
    """What a training embeds: tokens of text, and tokens computed for them, each text once however often it is run."""

    text: int = 0
    computed: int = 0

    def add(self, batches: Sequence[tuple[Group, list[int]]], packed: bool) -> None:
        self.text += sum(group.tokens(texts) for group, texts in batches)
        self.computed += sum(group.computed(texts, packed) for group, texts in batches)

    def __str__(self) -> str:
        return f"tokens computed / tokens of text {self.computed / max(1, self.text):.2f}"


def embed_mini_batch(
    first: list[nn.Module], again: nn.Module, group: Group, texts: list[int], packed: bool, tensors: dict[str, Tensor]
) -> Tensor:
    """The texts' embeddings [n, D]: the first call by the model in `first`, if there is one, all others by `again`.

    tensors: the group's, given by themselves for `torch.utils.checkpoint`. Features are copied out for every call:
    modules write into them.
    """
    features = (_packed if packed else _trimmed)(group, texts, tensors)
    model = first.pop() if first else again
    return model({**features, **group.settings})["sentence_embedding"]  # type: ignore[no-any-return]


def _trimmed(group: Group, texts: list[int], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """[n, T, …] with the T that the longest of the texts needs."""
    mask = tensors["attention_mask"]
    rows, width = torch.tensor(texts, device=mask.device), group.width(texts)
    part = slice(mask.shape[1] - width, None) if group.left else slice(width)
    return {n: t[rows, part] if t.shape[:2] == mask.shape else t[rows] for n, t in tensors.items()}


def _packed(group: Group, texts: list[int], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The texts one behind the other, as `Backbone.forward` takes them: input_ids [1, total], per token [total, …]."""
    mask = tensors["attention_mask"]
    rows = torch.tensor(texts, device=mask.device)
    kept = mask[rows] != 0
    features = {n: t[rows][kept] if t.shape[:2] == mask.shape else t[rows] for n, t in tensors.items()}
    ends = [0, *itertools.accumulate(group.lengths[text] for text in texts)]
    offsets = torch.tensor(ends, dtype=torch.int32, device=mask.device)
    note_offsets(offsets, ends)
    del features["attention_mask"]
    return {**features, "input_ids": features["input_ids"][None], "cu_seqlens": offsets}


def text_keys(columns: list[Features]) -> Tensor:
    """[columns, B] int64: 64 bits of a hash of each text's token ids, so equal where these are."""
    keys = []
    for column in columns:
        if "input_ids" not in column:
            raise ValueError(f"false_negatives compares input_ids, but the features are {sorted(column)}")
        masks, ids = (column["attention_mask"] != 0).cpu(), column["input_ids"].cpu()
        texts = (row[mask].numpy().tobytes() for row, mask in zip(ids.long(), masks, strict=True))
        keys.append([int.from_bytes(hashlib.blake2b(t, digest_size=8).digest(), signed=True) for t in texts])
    return torch.tensor(keys, device=columns[0]["attention_mask"].device)


def is_packed(model: nn.Module) -> bool:
    """Whether the model computes no padding and takes packed texts: a `Backbone` that is packed."""
    return any(getattr(module, "packed", False) is True for module in model.modules())
