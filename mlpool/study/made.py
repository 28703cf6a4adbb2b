"""A small data set made here, for a study where there is none: who did what, when and where, said in several ways.

    python -m mlpool.study.made DIR

writes text/ (for examples/tiny_decoder.py), pairs/made (question and sentence), sts/made (two sentences; the score is
how many of four facts they share, and 1 for no more than the same deed) and retrieval/made. The words of training,
development and test are the same, the combinations are not. It shows that everything runs, not which design is best.
"""

import functools
import itertools
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..files import write_text

TRAIN, TASKS = "pairs/made/train.jsonl", ["sts/made", "retrieval/made"]
LAST = "retrieval/made/qrels.tsv"  # to be written: where it is, all is
_PEOPLE = (
    "Ada", "Bruno", "Clara", "David", "Elena", "Farid", "Greta", "Henrik", "Ines", "Jonas", "Kira", "Liam", "Mona",
    "Nils", "Olga", "Pedro", "Quentin", "Rosa", "Samir", "Tara", "Ugo", "Vera", "Wanda", "Yusuf",
)  # fmt: skip
# Each deed and thing in two words: what a model has to learn is that they mean the same.
_DEEDS = (
    ("bought", "purchased"), ("repaired", "mended"), ("lost", "misplaced"), ("painted", "coloured"),
    ("sold", "gave away for money"), ("carried", "transported"), ("hid", "concealed"), ("cleaned", "washed"),
)  # fmt: skip
_THINGS = (
    ("car", "automobile"), ("sofa", "couch"), ("picture", "image"), ("coat", "jacket"), ("boat", "small ship"),
    ("bicycle", "bike"), ("lamp", "light"), ("clock", "timepiece"), ("rug", "carpet"), ("jar", "glass pot"),
)  # fmt: skip
_PLACES = ("Lisbon", "Oslo", "Cairo", "Lima", "Prague", "Kyoto", "Dublin", "Nairobi", "Quito", "Riga")
_TIMES = ("in the morning", "at noon", "in the evening", "at night", "on Monday", "on Friday", "in May", "in winter")


_SENTENCES = (
    "{person} {deed} the {thing} in {place} {time}.", "{time}, {person} {deed} the {thing} in {place}.",
    "It was {person} who {deed} the {thing} {time} in {place}.",
)  # fmt: skip
_QUESTIONS = (
    "Where was the {thing} that {person} {deed}?", "When was it that {person} {deed} the {thing}?",
    "Is it known when and where {person} {deed} the {thing}?",
)  # fmt: skip


class _Fact(NamedTuple):
    person: str
    deed: int
    thing: int
    place: str
    time: str


def write_data(folder: str | Path, seed: int = 0) -> Path:
    """Write the data set; the same files for the same seed. Returns the folder."""
    folder, rng = Path(folder), random.Random(seed)
    every = list(itertools.product(_PEOPLE, range(len(_DEEDS)), range(len(_THINGS)), _PLACES, _TIMES))
    facts = [_Fact(*values) for values in rng.sample(every, 12_000)]
    train, valid, held_out = facts[:8_000], facts[8_000:8_800], iter(facts[8_800:])
    _write(folder / "text/train.jsonl", ({"text": _story(train[i : i + 8], rng)} for i in range(0, 8_000, 4)))
    _write(folder / "text/valid.jsonl", ({"text": _story(valid[i : i + 8], rng)} for i in range(0, 800, 8)))
    _write(folder / TRAIN, ({"query": _question(f, rng), "positive": _sentence(f, rng)} for f in train))
    for split, size in (("dev", 300), ("test", 800)):
        _write(folder / f"sts/made/{split}.jsonl", (_scored(next(held_out), rng) for _ in range(size)))
    corpus = [next(held_out) for _ in range(600)]
    # Place and time are not asked for, so that a question without its answer's person, deed and thing has no answer.
    known = {fact[:3]: str(i) for i, fact in enumerate(corpus)}
    asked = [i for i, fact in enumerate(corpus) if known[fact[:3]] == str(i)][:400]
    place = folder / "retrieval/made"
    _write(place / "corpus.jsonl", ({"_id": str(i), "text": _sentence(f, rng)} for i, f in enumerate(corpus)))
    _write(place / "queries.jsonl", ({"_id": f"q{i}", "text": _question(corpus[i], rng)} for i in asked))
    lines = [f"q{i}\t{j}\t1\n" for i in asked for j, fact in enumerate(corpus) if fact[:3] == corpus[i][:3]]
    write_text(folder / LAST, "query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def _said(forms: tuple[str, ...], fact: _Fact, rng: random.Random) -> str:
    deed, thing = rng.choice(_DEEDS[fact.deed]), rng.choice(_THINGS[fact.thing])
    text = rng.choice(forms).format(person=fact.person, deed=deed, thing=thing, place=fact.place, time=fact.time)
    return text[0].upper() + text[1:]


_sentence, _question = functools.partial(_said, _SENTENCES), functools.partial(_said, _QUESTIONS)


def _scored(fact: _Fact, rng: random.Random) -> dict[str, str | float]:
    """Two sentences that differ in some of person, thing, place and time; also in the deed where in all four."""
    changed = rng.sample(range(4), rng.randint(0, 4))
    other = fact._asdict()
    for name, values in (("person", _PEOPLE), ("thing", range(len(_THINGS))), ("place", _PLACES), ("time", _TIMES)):
        if ("person", "thing", "place", "time").index(name) in changed:
            other[name] = rng.choice([value for value in values if value != other[name]])
    if len(changed) == 4 and rng.random() < 0.5:
        other["deed"] = rng.choice([deed for deed in range(len(_DEEDS)) if deed != fact.deed])
    score = 5.0 - len(changed) - (other["deed"] != fact.deed)
    return {"sentence1": _sentence(fact, rng), "sentence2": _sentence(_Fact(**other), rng), "score": score}


def _story(facts: list[_Fact], rng: random.Random) -> str:
    return " ".join(f"{_question(f, rng)} " * (rng.random() < 0.3) + _sentence(f, rng) for f in facts)


def _write(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m mlpool.study.made DIR")
    print(write_data(sys.argv[1]))
