"""What each item of a task contributed to its score, from mteb's predictions."""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .encoder import name_of

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

logger = logging.getLogger("mlpool")


def _data(task: "AbsTask") -> list[Any]:
    """The evaluated data of every subset and split."""
    data: Any = task.dataset
    return [data.get(subset, data)[split] for subset in task.hf_subsets for split in task.eval_splits]


def count_items(task: "AbsTask") -> int:
    """Pairs, queries or texts."""
    queries = task.metadata.type in ("Retrieval", "Reranking")
    return sum(len(data["relevant_docs"] if queries else data) for data in _data(task))


def keep_predictions(scratch: Path, folder: Path, task: "AbsTask") -> None:
    """mteb's own file, for what is no per-item result: clusters, similarities ranked as a whole."""
    if (path := scratch / task.prediction_file_name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.name)


def items_of(task: Any, scratch: Path, score: float) -> dict[str, Any] | None:
    """What `results.write_items` takes; None where the score is no mean or correlation over the items of one set."""
    path, data = scratch / task.prediction_file_name, _data(task)
    if len(data) != 1 or not path.is_file():
        return None
    predictions = json.loads(path.read_text())[task.hf_subsets[0]][task.eval_splits[0]]
    kind, metric = task.metadata.type, task.metadata.main_score
    if kind == "STS" and metric == "cosine_spearman":
        gold = data[0]["score"]
        return {"item": np.arange(len(gold)), "prediction": predictions["cosine_scores"], "gold": gold}
    values: dict[Any, float]
    if kind in ("Retrieval", "Reranking"):
        values = _per_query(task, data[0]["relevant_docs"], predictions)
    elif kind == "Classification" and metric == "accuracy" and not task.is_cross_validation:
        right = np.asarray(predictions) == np.asarray(data[0][task.label_column_name])  # [experiments, n]
        values = dict(enumerate(right.mean(0)))
    elif kind == "Summarization" and metric == "cosine_spearman":
        from scipy.stats import spearmanr

        pairs = zip(predictions["human_scores"], predictions["cosine_scores"], strict=True)
        values = {i: float(spearmanr(gold, predicted).statistic) for i, (gold, predicted) in enumerate(pairs)}
    else:
        return None
    if not values or abs(np.mean(list(values.values())) - score) > 1e-4:
        logger.warning("%s: no per-item results, as %s is not their mean", name_of(task), metric)
        return None
    return {"item": list(values), "value": list(values.values())}


def _per_query(task: Any, relevant: Any, found: dict[str, dict[str, float]]) -> dict[str, float]:
    """nDCG, MAP, recall or precision at the metric's cut-off, of each query, as mteb computes it; empty for others."""
    import pytrec_eval

    name, _, cut = task.metadata.main_score.partition("_at_")
    measure = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}.get(name)
    if measure is None or not cut.isdigit():
        return {}
    if task.ignore_identical_ids:
        found = {query: {d: s for d, s in docs.items() if d != query} for query, docs in found.items()}
    if task.skip_first_result:
        found = {q: dict(sorted(docs.items(), key=lambda pair: -pair[1])[1:]) for q, docs in found.items()}
    scores = pytrec_eval.RelevanceEvaluator(relevant, {f"{measure}.{cut}"}).evaluate(found)
    return {query: values[f"{measure}_{cut}"] for query, values in sorted(scores.items())}
