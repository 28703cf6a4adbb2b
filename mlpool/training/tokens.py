"""Token ids of training texts: made once, kept on disk by a hash of all they depend on, looked up by text.

    <key>/ids.bin      int32, the tokens of text after text
    <key>/index.npy    of each text, in the order of the hashes: its hash, where its tokens begin, how many, …
    <key>/tokens.json  what they are of, and the SHA-256 of both files; written last

The key is a hash of the texts, the prompt before them, the tokenizer, what frames a text and where it is cut: the same
run finds them again, resumed or not, and so does the next run on these texts. `datasets.map` keeps results, too, but by
a hash of the Arrow file, which `load_pairs` writes anew for every run, and it reads a damaged file back as it is.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor

from ..corpus.rows import BATCH
from ..embedder.backbone import Backbone
from ..embedder.identity import tokenizer_rules
from ..embedder.texts import TokenIds
from ..files import check_room, read_json, replacing, sha256, write_json
from ..show import progress, shorten
from .columns import SOURCE_NAME

logger = logging.getLogger("mlpool")
_IDS, _INDEX, _PLAN = "ids.bin", "index.npy", "tokens.json"
_DIGEST = "S16"  # 128 bits: two texts of one hash are not met
_ROW = np.dtype([("text", _DIGEST), ("start", "<i8"), ("tokens", "<i4"), ("skipped", "<i4"), ("uncut", "<i4")])
Column = tuple[datasets.Dataset, str]  # and its name in it


class KeptTokens:
    """The tokens of many texts under one prompt, memory-mapped; made by `keep_tokens`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = np.load(folder / _INDEX)
        self._texts = np.ascontiguousarray(index["text"])  # apart, since they are searched
        self._start, self._tokens = index["start"].copy(), index["tokens"].copy()
        self.skipped, self.uncut = index["skipped"].copy(), index["uncut"].copy()
        self._ids: Any = np.memmap(folder / _IDS, np.int32, "r") if self._tokens.any() else np.empty(0, np.int32)

    def __reduce__(self) -> Any:  # to a worker goes the place, not what lies there
        return KeptTokens, (self.folder,)

    def rows(self, digests: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Where each text is, by its hash; -1 where it is not."""
        rows = np.searchsorted(self._texts, digests)
        found = self._texts[np.minimum(rows, len(self._texts) - 1)] == digests
        return np.where(found, rows, -1)

    def ids(self, row: int) -> NDArray[np.int32]:
        start = self._start[row]
        return np.array(self._ids[start : start + self._tokens[row]])  # a copy: torch takes nothing that is read-only


def keep_tokens(backbone: Backbone, columns: Sequence[Column], prompt: str, folder: str | Path) -> KeptTokens:
    """The tokens of these columns' texts as `backbone.token_ids` makes them: found in a subfolder, or made and kept.

    Args:
        columns: each text is kept once. prompt: before each of them; may be empty. folder: of all that is kept.

    Raises:
        ValueError: as of `TextTokenizer`. OSError: no room on the disk; nothing is begun then.
    """
    digests, longest = _digests(columns, backbone, prompt)
    texts, first = np.unique(digests, return_index=True)
    order = np.argsort(first)
    # In their order, so that of one key all is the same to the last bit, and runs may make it side by side.
    plan = _plan(backbone, texts[order], prompt)
    place = Path(folder) / hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:32]
    if not _is_whole(place):
        check_room(place, 4 * longest + len(texts) * _ROW.itemsize, (
            "token ids of the training texts, at most; free some, or name a folder on a larger disk (data.cache_dir)"
        ))  # fmt: skip
        index = np.zeros(len(texts), _ROW)
        index["text"] = texts
        _make(backbone, columns, prompt, place, index, order, first)
        write_json(place / _PLAN, {**plan, "sha256": {name: sha256(place / name) for name in (_IDS, _INDEX)}})
    return KeptTokens(place)


def _digests(columns: Sequence[Column], backbone: Backbone, prompt: str) -> tuple[NDArray[np.bytes_], int]:
    """The hash of every text, and how many tokens there are at most: one a byte, and no more than are kept."""
    found, longest, extra = [], 0, len(prompt.encode()) + len(backbone.texts.prefix) + len(backbone.texts.suffix)
    for texts in _batches(columns, "hashing texts"):
        found.append(digests_of(texts))
        lengths = np.array([len(text.encode()) for text in texts]) + extra
        longest += int(np.minimum(lengths, backbone.max_seq_length or lengths).sum())
    return np.concatenate(found), longest


def digests_of(texts: Sequence[str]) -> NDArray[np.bytes_]:
    """[texts] of 16 bytes."""
    return np.array([hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts], _DIGEST)


def _plan(backbone: Backbone, texts: NDArray[np.bytes_], prompt: str) -> dict[str, Any]:
    """All that the tokens depend on."""
    framing, tokenizer = backbone.texts, backbone.tokenizer
    rules = json.dumps([type(tokenizer).__name__, tokenizer_rules(tokenizer)], sort_keys=True)
    return {
        "texts": len(texts), "texts_sha256": hashlib.sha256(texts.tobytes()).hexdigest(), "prompt": prompt,
        "tokenizer_sha256": hashlib.sha256(rules.encode()).hexdigest(), "prefix": framing.prefix,
        "suffix": framing.suffix, "include_prompt": framing.include_prompt, "include_bos": framing.include_bos,
        "max_seq_length": backbone.max_seq_length,
        "made_by": f"tokenizers {tokenizers.__version__}, transformers {transformers.__version__}",
    }  # fmt: skip


def _make(
    backbone: Backbone, columns: Sequence[Column], prompt: str, place: Path, index: NDArray[Any],
    order: NDArray[np.int64], first: NDArray[np.int64],
) -> None:  # fmt: skip
    """Write the tokens of each text of the index where it is `first` met, in that order, and the index itself."""
    met = first[order]
    seen = written = done = 0
    with replacing(place / _IDS) as new, new.open("wb") as file:
        for batch in _batches(columns, "tokenizing"):
            stop = int(np.searchsorted(met, seen + len(batch)))
            here = order[done:stop]
            tokens = backbone.token_ids([batch[i] for i in met[done:stop] - seen], prompt or None)
            lengths = np.array(tokens.lengths, np.int64)
            index["start"][here] = written + lengths.cumsum() - lengths
            index["tokens"][here], index["uncut"][here] = lengths, tokens.uncut
            index["skipped"][here] = 0 if tokens.skipped is None else tokens.skipped
            for ids in tokens.ids:
                file.write(ids.tobytes())
            seen, written, done = seen + len(batch), written + int(lengths.sum()), stop
    with replacing(place / _INDEX) as new:
        np.save(new, index)


def _batches(columns: Sequence[Column], what: str) -> Iterator[list[str]]:
    """The texts of all columns, in order; a bar on stderr, once it has taken a second."""
    total = sum(len(dataset) for dataset, _ in columns)
    with progress(what, "text", total, unit_scale=True, delay=1, leave=False) as bar:
        for dataset, name in columns:
            for batch in dataset.select_columns(name).with_format(None).iter(BATCH):
                yield batch[name]
                bar.update(len(batch[name]))


def _is_whole(place: Path) -> bool:
    """Whether all is there as it was written; what is damaged is said, and made again."""
    try:
        digests = read_json(place / _PLAN).get("sha256")
        damaged = {name: sha256(place / name) for name in (_IDS, _INDEX)} != digests
    except FileNotFoundError:
        return False
    except ValueError:
        damaged = True
    if damaged:
        logger.warning("the token ids kept in %s are damaged; they are made again", place)
    return not damaged


# --- to batches -------------------------------------------------------------------------------------------------------


class TokenCollator(SentenceTransformerDataCollator):
    """Rows of texts → the features of each column, as `Backbone.preprocess` makes them, from kept tokens.

    Args:
        kept: of each prompt, where its texts may be.
        of_sources: the prompts of each source's columns; under "" of rows that name no source. A batch may mix sources.
        backbone: whose tokens they are.
    """

    def __init__(
        self, kept: Mapping[str, Sequence[KeptTokens]], of_sources: Mapping[str, Mapping[str, str]], backbone: Backbone
    ) -> None:
        super().__init__(preprocess_fn=self._padded)
        self._kept, self.of_sources, self._pad = kept, of_sources, backbone.texts.pad
        self._skips = not (backbone.include_prompt and backbone.include_bos)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        return super().__call__([self._with_prompts(row) for row in features])

    def _with_prompts(self, row: dict[str, Any]) -> dict[str, Any]:
        """Each text as (prompt, text)."""
        prompts = self.of_sources[row.get(SOURCE_NAME, "")]
        texts = {n: (prompts.get(n, ""), v) for n, v in row.items() if isinstance(v, str) and n != SOURCE_NAME}
        return {**row, **texts}

    def _padded(self, inputs: Sequence[tuple[str, str]], **_: Any) -> dict[str, Tensor]:
        places: list[Any] = [None] * len(inputs)
        for prompt in {prompt for prompt, _ in inputs}:
            mine = [i for i, (own, _) in enumerate(inputs) if own == prompt]
            for i, place in zip(mine, self._find(prompt, [inputs[i][1] for i in mine]), strict=True):
                places[i] = place
        skipped = [int(kept.skipped[row]) for kept, row in places] if self._skips else None
        return TokenIds([kept.ids(row) for kept, row in places], skipped).padded(range(len(places)), self._pad)

    def uncut(self, source: str, column: str, texts: Sequence[str]) -> list[int]:
        """How many tokens each text of a column has, prompt and frame counted, before it is cut."""
        return [int(kept.uncut[row]) for kept, row in self._find(self.of_sources[source].get(column, ""), texts)]

    def _find(self, prompt: str, texts: Sequence[str]) -> list[tuple[KeptTokens, int]]:
        digests = digests_of(texts)
        found: list[Any] = [None] * len(texts)
        for kept in self._kept.get(prompt, ()):
            for i, row in enumerate(kept.rows(digests).tolist()):
                if row >= 0:
                    found[i] = kept, row
        if None in found:
            text = shorten(texts[found.index(None)])
            raise KeyError(f"no tokens are kept of {text} with the prompt {prompt!r}; was the data changed meanwhile?")
        return found
