"""The 47 MTEB tasks of arXiv 2409.02727 by type, and tasks chosen by name."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..version import need

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

BARE = "{instruction} "  # the paper's: the instruction and the text, nothing around them
EXACT_LENGTH = 512  # tokens at which the paper's own evaluation cuts

# SummEval is the paper's, and mteb's first version, whose score averages correlations with their p-values;
# SummEvalSummarization.v2 is the correlation alone.
PAPER: dict[str, tuple[str, ...]] = {
    "STS": ("BIOSSES", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark"),
    "Classification": (
        "AmazonPolarityClassification", "ToxicConversationsClassification", "ImdbClassification",
        "Banking77Classification", "EmotionClassification", "TweetSentimentExtractionClassification",
    ),
    "Retrieval": (
        "ArguAna", "NFCorpus", "FiQA2018", "SciFact", "Touche2020", "QuoraRetrieval", "TRECCOVID", "NQ", "SCIDOCS",
        "ClimateFEVER", "DBPedia", "MSMARCO", "HotpotQA", "FEVER",
    ),
    "Clustering": (
        "ArxivClusteringP2P", "ArxivClusteringS2S", "BiorxivClusteringP2P.v2", "BiorxivClusteringS2S.v2",
        "MedrxivClusteringP2P.v2", "MedrxivClusteringS2S.v2", "RedditClustering.v2", "RedditClusteringP2P.v2",
        "StackExchangeClustering.v2", "StackExchangeClusteringP2P.v2", "TwentyNewsgroupsClustering.v2",
    ),
    "Reranking": ("AskUbuntuDupQuestions", "MindSmallReranking", "SciDocsRR", "StackOverflowDupQuestions"),
    "PairClassification": ("TwitterURLCorpus", "SprintDuplicateQuestions", "TwitterSemEval2015"),
    "Summarization": ("SummEval",),
}  # fmt: skip


def mteb_tasks(names: str | Iterable[str]) -> "list[AbsTask]":
    """mteb's tasks by name. Needs mteb; loads no data.

    Args:
        names: "paper" (all 47), a type ("STS": the paper's tasks of it), or any name that mteb knows.

    Raises:
        ValueError: a name that is none of these; the nearest ones are given.
    """
    mteb = import_mteb()
    chosen: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        if name == "paper":
            chosen.update(dict.fromkeys(task for tasks in PAPER.values() for task in tasks))
        elif name in PAPER:
            chosen.update(dict.fromkeys(PAPER[name]))
        else:
            chosen[name] = None
    return [_task(mteb, name) for name in chosen]


def import_mteb() -> Any:
    """mteb, or an error that names the pip line."""
    return need("mteb", "evaluation needs {}: pip install 'mlpool[eval]'")


def _task(mteb: Any, name: str) -> "AbsTask":
    try:
        task = mteb.get_task(name)
    except KeyError:
        known = [*_known_names(), "paper", *PAPER]
        near = [k for k in known if k.lower() == name.lower()] + difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"nearest: {', '.join(dict.fromkeys(near))}" if near else f"groups: paper, {', '.join(PAPER)}"
        raise ValueError(f"no task {name!r} in mteb; {hint}") from None
    english = [s for s, langs in task.metadata.hf_subsets_to_langscripts.items() if langs == ["eng-Latn"]]
    if english:
        task.hf_subsets = english
    return task


def _known_names() -> set[str]:
    """Every task's name, without making the tasks, which takes seconds."""
    from mteb.abstasks import AbsTask

    names, classes = set(), [AbsTask]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        if cls.__module__.startswith("mteb.tasks") and hasattr(cls, "metadata"):  # not the bases of several tasks
            names.add(cls.metadata.name)
    return names
