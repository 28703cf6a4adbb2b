"""What `mlpool layers` is given: pairs, texts, and the model."""

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..attention.check import claims_bidirectional
from ..corpus.rows import kind_of
from ..corpus.text_files import find_columns, find_files, read_file
from ..embedder import base_model
from ..embedder.backbone import Backbone
from ..embedder.embedder import Embedder
from ..embedder.loading import open_model, read_modules
from ..embedder.pooler import Pooler
from ..evaluation.local import read_jsonl, scored_fault
from ..options import check_place
from ..pooling import MeanPool
from ..trunk import find_layers
from .scores import Pairs

logger = logging.getLogger("mlpool")

_NAME = 40  # characters of a data set's name


def read_pairs(path: str | Path) -> Pairs:
    """Pairs of a .jsonl file with sentence1, sentence2 and score; errors name file and line."""
    found, *others = find_files(path)
    if others or kind_of(found) != ".jsonl" or found.suffix == ".gz":
        raise ValueError(f"{path}: pairs are read from a .jsonl file with sentence1, sentence2 and score")
    rows = list(read_jsonl(found, scored_fault))
    return Pairs([r["sentence1"] for r in rows], [r["sentence2"] for r in rows], [float(r["score"]) for r in rows])


def read_texts(path: str | Path, column: str | None = None) -> list[str]:
    """Texts of .txt, .jsonl, .csv or .parquet; empty ones are left out, which is said. Errors as of `read_file`."""
    paths = find_files(path)
    columns = find_columns(paths, column)
    rows = [row.text for file in paths for row in read_file(file, columns)]
    texts = [text for text in rows if text.strip()]
    if not texts:
        raise ValueError(f"no texts in {path}")
    if len(texts) < len(rows):
        logger.warning("%s: %d empty texts are left out", path, len(rows) - len(texts))
    return texts


def holds_pairs(path: str) -> bool:
    """Whether the first row of a .jsonl file has two sentences."""
    if not Path(path).is_file() or not path.endswith(".jsonl"):
        return False
    return "sentence1" in next(read_jsonl(Path(path)), {})


def sample(rows: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """At most `limit` of them, drawn at random, in their order."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    return [rows[i] for i in sorted(np.random.default_rng(seed).choice(len(rows), limit, replace=False))]


def name_sets(paths: Sequence[str]) -> list[str]:
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
    check_place(name)
    no_model = Path(name).is_dir() and not (Path(name) / "config.json").is_file()
    if attention is not None or no_model or read_modules(name, {}):
        return open_model(name, attention and f"mean-{attention}", device, dtype, max_seq_length)
    hub = {**base_model.hub_options({}), "trust_remote_code": False}
    transformer, tokenizer = base_model.load_model(name, hub, {"dtype": dtype})
    own = "bidirectional" if claims_bidirectional(*find_layers(transformer)) else "causal"
    backbone = Backbone(transformer, tokenizer, f"mean-{own}", max_seq_length=max_seq_length)
    modules: Any = OrderedDict(backbone=backbone, pooler=Pooler(MeanPool(backbone.hidden_size)))
    return Embedder(modules=modules, device=device)


def time_encode(model: Any, texts: Sequence[str], options: dict[str, Any]) -> float:
    options = {k: v for k, v in options.items() if v is not None and (k == "prompt" or isinstance(model, Embedder))}
    began = time.perf_counter()
    model.encode(list(texts), **options)
    return time.perf_counter() - began
