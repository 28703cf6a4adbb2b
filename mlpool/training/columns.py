"""Which columns hold anchor, positive and negatives, and the texts in a row of them."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..corpus.rows import BadRow
from ..files import not_unicode
from ..show import shorten, some


class Form(NamedTuple):
    """Column names that go together. `graded`: such rows may carry a label that makes some of them no positives."""

    anchors: tuple[str, ...]
    positives: tuple[str, ...]
    graded: bool = True


# The first form that a source has both sides of is taken; letter case does not matter.
FORMS = (
    Form(
        ("anchor", "query", "queries", "question", "text", "sentence"),
        ("positive", "positives", "pos", "positive_passages", "positive_ctxs"),
        graded=False,
    ),
    Form(("premise",), ("entailment",), graded=False),
    Form(("anchor", "query", "queries", "question", "text"), ("passage", "document", "context", "answer", "response")),
    Form(("prompt", "instruction"), ("response", "completion", "output")),
    Form(("sent0",), ("sent1",)),
    Form(("sentence1",), ("sentence2",)),
    Form(("sentence_a",), ("sentence_b",)),
    Form(("text1",), ("text2",)),
    Form(("question1",), ("question2",)),
    Form(("premise",), ("hypothesis",)),
    Form(("title",), ("body", "abstract")),
)
# With every form, and numbered: negative_1, negative2, ….
NEGATIVES = (
    "negative", "negatives", "neg", "negs", "hard_negative", "hard_negatives", "hard_neg", "negative_passages",
    "hard_negative_ctxs", "contradiction",
)  # fmt: skip
LABELS = ("label", "labels", "score", "scores", "similarity", "similarity_score", "is_duplicate", "relevance", "nli")
ROLES = ("anchor", "positive", "negative")
_NUMBERED = re.compile(r"(.*?)_?(\d*)", re.DOTALL)
_SHOWN = 12  # column names in a message
SOURCE_NAME = "dataset_name"  # the column by which sentence-transformers tells the sources of rows apart


class Columns(NamedTuple):
    """The columns taken from one source. `negatives` None: in each row whatever is named like a negative."""

    anchor: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] | None

    def negatives_of(self, names: Sequence[str], where: str) -> list[str]:
        """The columns among `names` that hold negatives, by their number; ValueError as in `negative_columns`."""
        if self.negatives is None:
            return negative_columns(names, where)
        return [n for n in self.negatives if n in names]

    def __str__(self) -> str:
        roles = {"anchor": [self.anchor], "positive": self.positives}
        return ", ".join(f"{role} = {' + '.join(found)}" for role, found in roles.items())


def find_columns(names: Sequence[str], where: str, wanted: Mapping[str, str | Sequence[str]] | None = None) -> Columns:
    """Which of the columns `names` of the source `where` are the pair, by `wanted` or by their names.

    Raises:
        ValueError: nothing fits, more than one thing fits, or the rows carry a label; says what was found and what is
        accepted.
    """
    if wanted is not None:
        return _named(names, where, wanted)
    for form in FORMS:
        anchors = [n for n in names if n.lower() in form.anchors]
        positives = [n for n in names if n.lower() in form.positives]
        if not (anchors and positives):
            continue
        for role, found in (("anchor", anchors), ("positive", positives)):
            if len(found) > 1:
                raise ValueError(f"{where}: {_show(found)} could each be the {role}; name one by {_example(names)}")
        negatives = negative_columns(names, where)
        labels = [n for n in names if n.lower() in LABELS]
        if form.graded and labels and not negatives:
            raise ValueError(
                f"{where}: with a column {labels[0]!r} some rows may be no positives; keep those that are, without "
                f"that column, or, if all are, say so: {_example(anchors + positives)}"
            )
        return Columns(anchors[0], (positives[0],), None)
    pairs = "; ".join(f"{'/'.join(form.anchors)} with {'/'.join(form.positives)}" for form in FORMS)
    raise ValueError(
        f"{where}: no known columns. Found: {_show(names) or 'none'}. Known by name: {pairs}; with each "
        f"{'/'.join(NEGATIVES)} (also numbered: negative_1). Or name yours: "
        "columns={'anchor': …, 'positive': …, 'negative': [… or nothing]}"
    )


def negative_columns(names: Sequence[str], where: str) -> list[str]:
    """Columns named like negatives, by number. ValueError if they are of two kinds (`neg` and `negative_1`)."""
    found = []
    for name in names:
        base, number = _NUMBERED.fullmatch(name).groups()  # type: ignore[union-attr]  # it matches every name
        if base.lower() in NEGATIVES:
            found.append((base, int(number or 0), name))
    if len({base for base, *_ in found}) > 1:
        several = _show([name for *_, name in found])
        raise ValueError(f"{where}: {several} could each be the negatives; name them by columns=")
    return [name for *_, name in sorted(found)]


def texts_of(value: Any, column: str) -> list[str]:
    """The texts in a cell: a text, a passage {title, text}, or a list of either; title and text are joined by a space.

    Raises:
        BadRow: anything else, empty or blank text, or text that is no UTF-8.
    """
    if isinstance(value, str):
        if not value or value.isspace():
            raise BadRow("empty text", f"{column} is {'only whitespace' if value else 'empty'}")
        if (at := not_unicode(value)) is not None:
            raise BadRow("not UTF-8", f"{column} is not UTF-8 at character {at + 1}")
        return [value]
    if isinstance(value, list | tuple):
        # A list is its elements, so that the usual list of one text does not differ from that text.
        return [text for i, item in enumerate(value) for text in texts_of(item, f"{column}[{i}]")]
    if isinstance(value, dict) and "text" in value:
        text, title = value["text"], value.get("title")
        if isinstance(text, list):  # one dict of lists: how older versions of datasets store a list of passages
            titles = title if isinstance(title, list) else [None] * len(text)
            if len(titles) != len(text):
                raise BadRow("not text", f"{column} has {len(titles)} titles for {len(text)} texts")
            passages = [{"title": a, "text": b} for a, b in zip(titles, text, strict=True)]
            return texts_of(passages, column)
        found = texts_of(text, f"{column}.text")
        if isinstance(title, str) and title and not title.isspace():
            found = [f"{part} {found[0]}" for part in texts_of(title, f"{column}.title")]
        return found
    if value is None:
        raise BadRow("empty text", f"{column} is empty (null)")
    raise BadRow("not text", f"{column} is {type(value).__name__} {shorten(value, 40)}, expected text")


def text_columns(dataset: Any) -> list[str]:
    """The columns of texts of a set that `load_pairs` made."""
    kinds = {name: getattr(kind, "dtype", None) for name, kind in dataset.features.items()}
    return [name for name, kind in kinds.items() if kind == "string" and name != SOURCE_NAME]


def column_prompts(prompts: Mapping[str, str | None], columns: Sequence[str]) -> dict[str, str]:
    """An embedder's prompts by column: query of anchors, document of the rest; only those that there are."""
    query, document = (prompts.get(name) or "" for name in ("query", "document"))
    found = {name: query if name == "anchor" else document for name in columns}
    return {name: prompt for name, prompt in found.items() if prompt}


def count(number: int, what: str) -> str:
    """1 row, 1,000 rows."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def _named(names: Sequence[str], where: str, wanted: Mapping[str, str | Sequence[str]]) -> Columns:
    """`find_columns` for names given by the user."""
    if not isinstance(wanted, Mapping) or set(wanted) - set(ROLES) or not {"anchor", "positive"} <= set(wanted):
        raise ValueError(f"columns must map 'anchor', 'positive' and, if any, 'negative' to names, got {wanted!r}")
    roles = {role: (given,) if isinstance(given, str) else tuple(given or ()) for role, given in wanted.items()}
    if len(roles["anchor"]) != 1 or not roles["positive"]:
        raise ValueError(f"columns needs one anchor and at least one positive, got {wanted!r}")
    for name in (*roles["anchor"], *roles["positive"]):
        if name not in names:
            raise missing_column(name, names, where)
    return Columns(roles["anchor"][0], roles["positive"], roles.get("negative", ()))


def missing_column(name: str, names: Sequence[str], where: str) -> ValueError:
    """The error for a column that the user named and the source lacks."""
    near = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{where} has no column {name!r}. Found: {_show(names) or 'none'}{hint}")


def _example(names: Sequence[str]) -> str:
    first, second = (*names, "…")[:2]
    return f"columns={{'anchor': {first!r}, 'positive': {second!r}}}"


def _show(names: Sequence[str]) -> str:
    return some([shorten(name) for name in names], _SHOWN)
