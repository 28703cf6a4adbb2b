"""How alike a model's layers are, which of them scores best, and which ones its pool reads; defined in command.py."""

from __future__ import annotations

import csv
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..corpus.text_files import find_columns, find_files, kind_of, read_file
from ..evaluation.local import _sts_fault, read_jsonl
from ..files import replacing
from ..options import check_place
from ..show import aligned
from .correlation import Correlations
from .profiles import PoolProfile, reader_of
from .scores import LayerScores, Pairs, Scorer
from .states import FEWEST, poolings_of, windows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("mlpool")
_NAME = 40  # characters of a data set's name


# --- the API ----------------------------------------------------------------------------------------------------------


def analyse(
    model: SentenceTransformer,
    texts: Sequence[str] | None = None,
    pairs: Pairs | Mapping[str, Pairs] | None = None,
    *,
    token_pooling: str = "all",
    **options: Any,
) -> LayerReport:
    """Look inside a model's layers.

    Args:
        model: any SentenceTransformer whose layers are found; an embedder of `mlpool.load` for the pool's profile.
        texts: for correlations and profile. None: those of the pairs, in the same pass.
        pairs: for the scores; a data set, or several by name.
        token_pooling: "last", "mean", "unit_mean" or "all".
        options: window (texts whose states are in memory at once, and over which a term of the CKA is taken), prompt,
            token_budget, seed, progress; see `mlpool.analysis.states.windows`.

    Raises:
        ValueError: neither texts nor pairs, fewer than 4 of them, gold scores that are all alike or of another number,
            a model whose layers are not found.
    """
    poolings = poolings_of(token_pooling)
    sets = _checked(pairs)
    if not sets and not texts:
        raise ValueError("no texts: give texts, pairs or both")
    if texts is not None:
        _check_count(len(texts), "texts")
    alike, scorer, notes = Correlations(poolings), Scorer(poolings, sets), []
    reader = reader_of(model)
    if reader is None:
        notes.append("no profile: the model has no pool that reads several layers")
    began, cut = time.perf_counter(), _cut(model)
    with reader or nullcontext():
        if texts is not None:
            _pass(model, [(text,) for text in texts], poolings, [alike], options)
        else:
            _pass(model, scorer.groups, poolings, [alike, scorer], options)
    if texts is not None and sets:
        _pass(model, scorer.groups, poolings, [scorer], options)
    seconds = time.perf_counter() - began
    if (now := _cut(model)) > cut:
        notes.append(f"{now - cut} texts were cut at {model.max_seq_length} tokens")
    correlation = {(kind, p): value for p in poolings for kind, value in alike.of(p).items()}
    return LayerReport(
        alike.texts, poolings, correlation, scorer.scores() if sets else None,
        None if reader is None else reader.profile(), [*notes, *alike.notes(), *scorer.notes()], seconds,
    )  # fmt: skip


def layer_scores(
    model: SentenceTransformer, pairs: Pairs | Mapping[str, Pairs], *, token_pooling: str = "all", **options: Any
) -> LayerScores:
    """The score of every layer alone. Arguments and errors: see `analyse`."""
    sets = _checked(pairs)
    if not sets:
        raise ValueError("no pairs: a layer's score needs pairs of texts with gold scores")
    scorer = Scorer(poolings_of(token_pooling), sets)
    _pass(model, scorer.groups, scorer.poolings, [scorer], options)
    found = scorer.scores()
    for note in scorer.notes():
        logger.warning("%s", note)
    return found


def _pass(
    model: SentenceTransformer, groups: Sequence[tuple[str, ...]], poolings: Sequence[str], consumers: Sequence[Any],
    options: dict[str, Any],
) -> None:  # fmt: skip
    for window in windows(model, groups, poolings, **options):
        for consumer in consumers:
            consumer.add(window)


def _cut(model: Any) -> int:
    """How many texts an embedder of ours has cut so far."""
    return getattr(getattr(next(model.children(), None), "truncated", None), "count", 0)


def _check_count(count: int, what: str) -> None:
    if count < FEWEST:
        raise ValueError(f"{count} {what}: unbiased CKA is defined from {FEWEST} on; a stable figure takes hundreds")


def _checked(pairs: Pairs | Mapping[str, Pairs] | None) -> dict[str, Pairs]:
    sets = {"pairs": pairs} if isinstance(pairs, Pairs) else dict(pairs or {})
    for name, (first, second, scores) in sets.items():
        if not len(first) == len(second) == len(scores):
            raise ValueError(f"{name}: {len(first)} and {len(second)} texts with {len(scores)} scores")
        _check_count(len(first), f"pairs in {name}")
        if len(set(scores)) == 1:
            raise ValueError(f"{name}: every score is {scores[0]}, so no correlation is defined")
    return sets


# --- what comes out ---------------------------------------------------------------------------------------------------


@dataclass
class LayerReport:
    """What `analyse` found; prints as a table.

    Attributes:
        texts: how many the correlations are of. token_poolings: those of `analyse`.
        correlation: by (kind, token pooling), kind "pearson" or "cka": [L+1, L+1].
        scores: of the pairs, or None. profile: of the pool, or None.
        notes: what was not defined, cut or left out. seconds: the whole analysis took.
        encode_seconds: what a plain encode of the same texts took, where it was measured.
    """

    texts: int
    token_poolings: tuple[str, ...]
    correlation: dict[tuple[str, str], NDArray[np.float64]]
    scores: LayerScores | None
    profile: PoolProfile | None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    encode_seconds: float | None = None

    @property
    def num_layers(self) -> int:
        """L, the embedding not counted."""
        return len(next(iter(self.correlation.values()))) - 1

    def save(self, directory: str | Path) -> list[Path]:
        """Write layers_correlation.csv (kind, token_pooling, layer_i, layer_j, value) and .png, and what scores and
        profile write; returns the paths."""
        from .plots import heat_maps

        path = Path(directory) / "layers_correlation.csv"
        with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["kind", "token_pooling", "layer_i", "layer_j", "value"])
            for (kind, pooling), values in self.correlation.items():
                for (i, j), value in np.ndenumerate(values):
                    writer.writerow([kind, pooling, i, j, f"{value:.6f}"])
        titles = {"pearson": "Pearson's r over dimensions", "cka": "linear CKA"}
        heat_maps(
            {f"{titles[kind]}, {pooling}": values for (kind, pooling), values in self.correlation.items()},
            "layer", "layer", path.with_suffix(".png"),
        )  # fmt: skip
        paths = [path, path.with_suffix(".png")]
        for part in (self.scores, self.profile):
            paths += part.save(directory) if part is not None else []
        return paths

    def __str__(self) -> str:
        lines = [["layer"] + [head for pooling in self.token_poolings for head in self._heads(pooling)]]
        lines[0] += ["read by the pool"] if self.profile else []
        for layer in range(self.num_layers + 1):
            cells = [str(layer)] + [cell for pooling in self.token_poolings for cell in self._cells(pooling, layer)]
            if self.profile:
                weights = dict(zip(self.profile.layers, self.profile.mean, strict=True))
                cells.append(f"{weights[layer]:.4f}" if layer in weights else "–")
            lines.append(cells)
        return "\n".join([aligned(lines[0], lines[1:], left=0), "", *self._reading()])

    def _heads(self, pooling: str) -> list[str]:
        heads = ["r to next", "CKA to last", *(["score"] if self.scores else [])]
        return [f"{pooling}: {head}" for head in heads]

    def _cells(self, pooling: str, layer: int) -> list[str]:
        pearson, cka = self.correlation["pearson", pooling], self.correlation["cka", pooling]
        cells = [f"{pearson[layer, layer + 1]:.3f}" if layer < self.num_layers else "–", f"{cka[layer, -1]:.3f}"]
        if self.scores:
            star = "*" if layer == self.scores.best(pooling) else " "
            cells.append(f"{self.scores.mean(pooling)[layer]:.4f}{star}")
        return cells

    def _reading(self) -> list[str]:
        lines = [f"{self.texts} texts; layer 0 is the embedding. r: Pearson's over dimensions; CKA: linear, unbiased."]
        if self.scores:
            lines.append(self.scores.reading())
        lines += [str(self.profile)] if self.profile else []
        lines += [f"Note: {note}" for note in self.notes]
        if self.encode_seconds:
            lines.append(
                f"The analysis took {self.seconds:.1f} s, {self.seconds / self.encode_seconds:.2f}x of a plain encode "
                f"of the same texts ({self.encode_seconds:.1f} s)"
            )
        return lines


# --- files and models -------------------------------------------------------------------------------------------------


def read_pairs(path: str | Path) -> Pairs:
    """Pairs of a .jsonl file with sentence1, sentence2 and score.

    Raises:
        FileNotFoundError: no such file (the nearest names). ValueError: file and line of what is wrong.
    """
    found, *others = find_files(path)
    if others or kind_of(found) != ".jsonl" or found.suffix == ".gz":
        raise ValueError(f"{path}: pairs are read from a .jsonl file with sentence1, sentence2 and score")
    rows = list(read_jsonl(found, _sts_fault))
    return Pairs([r["sentence1"] for r in rows], [r["sentence2"] for r in rows], [float(r["score"]) for r in rows])


def read_texts(path: str | Path, column: str | None = None) -> list[str]:
    """Texts of .txt, .jsonl, .csv or .parquet; empty ones are left out, which is said.

    Raises:
        FileNotFoundError, ValueError: see `mlpool.corpus.text_files`; no text at all.
    """
    paths = find_files(path)
    columns = find_columns(paths, column)
    rows = [row.text for file in paths for row in read_file(file, columns)]
    texts = [text for text in rows if text.strip()]
    if not texts:
        raise ValueError(f"no texts in {path}")
    if len(texts) < len(rows):
        logger.warning("%s: %d empty texts are left out", path, len(rows) - len(texts))
    return texts


def _holds_pairs(path: str) -> bool:
    """Whether the first row of a .jsonl file has two sentences."""
    if not Path(path).is_file() or not path.endswith(".jsonl"):
        return False
    return "sentence1" in next(read_jsonl(Path(path)), {})


def _sample(rows: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """At most `limit` of them, drawn at random, in their order."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    return [rows[i] for i in sorted(np.random.default_rng(seed).choice(len(rows), limit, replace=False))]


def _name_sets(paths: Sequence[str]) -> list[str]:
    """sts/stsb/dev.jsonl is called stsb/dev, with as much of its path as tells it from the others; short in a plot."""
    parts = [Path(path).resolve().with_suffix("").parts for path in paths]
    for count in range(2, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        names = [name if len(name) <= _NAME else "…" + name[1 - _NAME :] for name in names]
        if len(set(names)) == len(names):
            return names
    return [f"{Path(path).stem[: _NAME - 5]} ({i})" for i, path in enumerate(paths, 1)]


def load_model(
    name: str, attention: str | None = None, device: str | None = None, dtype: str = "auto",
    max_seq_length: int | None = None,
) -> Any:  # fmt: skip
    """A saved embedder or sentence-transformers model as it is, a base model with mean pooling.

    Args:
        attention: "causal" or "bidirectional", for base models; also makes one of a sentence-transformers model. None
            is the model's own.

    Raises:
        FileNotFoundError: no such model. ValueError: causal attention of an encoder, attention for a saved embedder.
    """
    from ..attention.check import claims_bidirectional
    from ..embedder.backbone import Backbone
    from ..embedder.backbone import load_model as load_transformer
    from ..embedder.embedder import Embedder
    from ..embedder.loading import open_model, read_modules
    from ..embedder.pooler import Pooler
    from ..pooling import MeanPool
    from ..taps import find_layers

    check_place(name)
    no_model = Path(name).is_dir() and not (Path(name) / "config.json").is_file()
    if attention is not None or no_model or read_modules(name, {}):
        return open_model(name, attention and f"mean-{attention}", device, dtype, max_seq_length)
    hub: dict[str, Any] = dict.fromkeys(("token", "cache_folder", "revision"))
    transformer, tokenizer = load_transformer(
        name, {**hub, "local_files_only": False, "trust_remote_code": False}, {"dtype": dtype}
    )
    own = "bidirectional" if claims_bidirectional(*find_layers(transformer)) else "causal"
    backbone = Backbone(transformer, tokenizer, f"mean-{own}", max_seq_length=max_seq_length)
    modules: Any = OrderedDict(backbone=backbone, pooler=Pooler(MeanPool(backbone.hidden_size)))
    return Embedder(modules=modules, device=device)


def time_encode(model: Any, texts: Sequence[str], options: dict[str, Any]) -> float:
    from ..embedder.embedder import Embedder

    options = {k: v for k, v in options.items() if v is not None and (k == "prompt" or isinstance(model, Embedder))}
    began = time.perf_counter()
    model.encode(list(texts), **options)
    return time.perf_counter() - began
