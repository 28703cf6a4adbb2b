"""`mlpool layers`: how alike a model's layers are, which of them scores best, and which ones its pool reads.

Layers are counted as transformers counts hidden_states: 0 is the embedding, L the last, behind the final norm. The
state of a text in a layer is that of its last token (EOS, SEP), the mean over its tokens, or the mean of them each
brought to unit length (unit_mean); prompt and special tokens included unless the model's settings leave them out. All
layers are read in one pass (see states.py).

Correlation of layers i and j
    pearson   Pearson's r of a text's two states over their D numbers, averaged over texts: do the layers write the
              same numbers into the same dimensions? (The paper's figure 1 does not say over what it correlates. Over
              the texts, dimension by dimension, would need D correlations per pair of layers and hide that a few
              dimensions hold most of a state.)
    cka       linear CKA: do the layers place the texts alike, up to rotation and scale? Centred, by the unbiased
              estimator of HSIC (Song et al. 2012), averaged over random windows of texts (Nguyen et al.,
              arXiv 2010.15327) and only then divided. An average over windows estimates the HSIC of all texts without
              bias; where one window holds all texts, it is that. May be slightly negative.

Score of a layer
    Without any training (the paper's figure 2): Spearman's correlation of cosines with the gold scores of --pairs, and
    mteb's main score on the --tasks of --local, of any kind; every layer and token pooling from one pass over the
    texts. With several data sets, their mean. The best layer is chosen on this very data, so its lead is flattering.
    A model cut there (mlpool.load(..., depth=k)) is as fast as the last line says, by the time spent in each layer.
"""

import argparse
import sys
from typing import Any

from .. import options
from ..corpus.text_files import find_files
from ..evaluation.local import SPLITS, local_tasks
from ..evaluation.tasks import import_mteb
from . import FEWEST, POOLINGS, WINDOW


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Correlation between layers, score of each layer, and what a trained pool reads; in one pass."
    parser.epilog = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model", help="folder or Hub name of a base model, a saved embedder or a sentence-transformers model")
    add("--texts", metavar="FILE", help="texts for correlation and profile: .txt, .jsonl, .csv or .parquet; pairs with "
        "scores (sts/stsb/dev.jsonl) serve for all figures (default: those of --pairs)")  # fmt: skip
    add("--text-column", metavar="NAME", help="of .jsonl, .csv and .parquet (default: text, or the only one)")
    add("--pairs", metavar="FILE", nargs="+", default=[], help=".jsonl with sentence1, sentence2 and score, for the "
        "score of each layer; several are averaged")  # fmt: skip
    add("--tasks", type=options.names, metavar="NAME[,NAME]", help="tasks of --local, sts/stsb, or a kind of them "
        "(default: all)")  # fmt: skip
    add("--local", metavar="DIR", help="score the layers on the tasks in DIR, as of `mlpool eval --local`")
    add("--split", choices=SPLITS, default="dev", help="of --local (default: %(default)s)")
    add("--token-pooling", choices=(*POOLINGS, "all"), default="all", help="(default: %(default)s)")
    add("--attention", choices=("causal", "bidirectional"), help="of a base model (default: its own)")
    add("--prompt", help="put before each text (default: the model's default prompt)")
    add("--limit", type=int, metavar="N", help="of each file take N rows at random")
    add("--window", type=options.positive, default=WINDOW, metavar="N", help="texts in memory at once (default: "
        "%(default)s)")  # fmt: skip
    add("--token-budget", type=options.positive, metavar="N", help="tokens a forward, of mlpool's models (default: as "
        "in encode)")  # fmt: skip
    add("--seed", type=int, default=0, help="of sample and windows (default: %(default)s)")
    add("--time", action="store_true", help="also encode the texts plainly, before and after, and say what it cost")
    options.add_max_seq_length(parser)
    options.add_device(parser)
    options.add_dtype(parser)
    add("-o", "--output", metavar="DIR", help="write CSV files and plots")


def run(args: argparse.Namespace) -> None:
    if args.limit is not None and args.limit < FEWEST:
        raise ValueError(f"--limit must be at least {FEWEST}, got {args.limit}")
    if args.tasks and not args.local:
        raise ValueError("--tasks names folders in DIR of --local DIR; pass it, too")
    if args.texts:
        find_files(args.texts)
    options.check_place(args.model)
    paths, texts = [str(path) for path in find_files(args.pairs)] if args.pairs else [], None
    from .inputs import holds_pairs, load_model, name_sets, read_pairs, read_texts, sample, time_encode
    from .layers import Pairs, analyse, check_count, checked

    if args.texts and args.text_column is None and holds_pairs(args.texts):
        paths.insert(0, args.texts)
    elif args.texts:
        texts = sample(read_texts(args.texts, args.text_column), args.limit, args.seed)
    if not paths and texts is None and not args.local:
        raise ValueError("no texts: name a file with --texts or --pairs, or tasks with --local")
    sets = {}
    for name, path in zip(name_sets(paths), paths, strict=True):
        pairs = read_pairs(path)
        rows = sample(list(zip(*pairs, strict=True)), args.limit, args.seed)
        sets[name] = Pairs(*zip(*rows, strict=True)) if rows else pairs
    checked(sets)  # before a model is loaded
    if texts is not None:
        check_count(len(texts), "texts")
    tasks = _tasks(args)
    model = load_model(args.model, args.attention, args.device, args.dtype, args.max_seq_length)
    used = {"prompt": args.prompt, "token_budget": args.token_budget}
    every = [*(texts or []), *(text for first, second, _ in sets.values() for text in (*first, *second))]
    report = scores = None  # of what was not asked for
    if every:
        before = time_encode(model, every, used) if args.time else 0.0
        report = analyse(
            model, texts, sets, token_pooling=args.token_pooling, window=args.window, seed=args.seed, **used
        )  # fmt: skip
        if args.time:
            report.encode_seconds = (before + time_encode(model, every, used)) / 2
        scores = report.scores
    if tasks:
        from .task_scores import task_scores

        found, some = task_scores(
            model, tasks, token_pooling=args.token_pooling, window=args.window, token_budget=args.token_budget
        )  # fmt: skip
        scores, every = found if scores is None else scores + found, every or some
    if report is not None:
        report.scores = scores
    print(scores if report is None else report)
    if scores is not None:
        print(_depth(model, scores, every, used))
    if args.output:
        print("wrote", *(report or scores).save(args.output), file=sys.stderr)  # type: ignore[union-attr]


def _tasks(args: argparse.Namespace) -> list[Any]:
    """Those of --local, read when they are scored."""
    if not args.local:
        return []
    import_mteb()
    return local_tasks(args.local, args.tasks, args.split)


def _depth(model: Any, scores: Any, texts: list[str], used: dict[str, Any]) -> str:
    """Where the model may be cut, and what that gains."""
    from .speed import MOST, seconds_by_depth

    step = -(-len(texts) // MOST)
    some = texts[::step]
    pooling, layer = scores.best_depth()
    seconds = seconds_by_depth(model, some, **used)
    best, last = scores.mean(pooling)[layer], scores.mean(pooling)[-1]
    return (
        f"Best depth: {layer} of {len(seconds) - 1} layers, {pooling} of tokens, {best:.4f} (all layers: {last:.4f}); "
        f"cut there by depth={layer}, {len(some) / seconds[layer]:.3g} texts/s, {seconds[-1] / seconds[layer]:.2f}x "
        f"of the whole model's {len(some) / seconds[-1]:.3g}"
    )
