"""Tokens of training texts: the same as made in the batch, made once, found again, never read damaged."""

import json
import pickle

import pytest
import torch

datasets = pytest.importorskip("datasets")
import tiny  # noqa: E402
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator  # noqa: E402

from mlpool.training.mixture import Mixture, TrainingSource  # noqa: E402
from mlpool.training.tokens import keep_tokens  # noqa: E402
from mlpool.training.train import collate_kept  # noqa: E402

TEXTS = [*(text for text in tiny.TEXTS if text.strip()), "one", "two </s>", "all of them " * 20]
PAIRS = datasets.Dataset.from_dict({
    "anchor": [*TEXTS, "one"], "positive": [*reversed(TEXTS), "a"], "negative_1": [TEXTS[0]] * (len(TEXTS) + 1),
})  # fmt: skip
PROMPTS = {"query": "how many ", "document": ""}


def files_of(folder) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.*"))}


@pytest.fixture
def never(monkeypatch):
    """A call after which no text may be tokenized."""
    from mlpool.embedder.texts import TextTokenizer

    def refuse(*_, **__):
        raise AssertionError("tokenized again")

    return lambda: monkeypatch.setattr(TextTokenizer, "__call__", refuse)


@pytest.mark.parametrize(
    "options", [{}, {"include_prompt": False}, {"include_bos": False, "frame": "both"}, {"max_seq_length": 12}]
)
def test_a_batch_is_what_it_was_without_kept_tokens(tmp_path, options, never):
    embedder = tiny.embedder("mean-causal", prompts=PROMPTS, **options)
    rows = [PAIRS[i] for i in (3, 0, len(TEXTS), 5, 8, 2)]
    prompts = {"anchor": PROMPTS["query"]}
    expected = SentenceTransformerDataCollator(preprocess_fn=embedder.preprocess, prompts=prompts)(rows)
    uncut = tiny.embedder("mean-causal", **{**options, "max_seq_length": 128})[0].token_ids(TEXTS, PROMPTS["query"])
    collator = collate_kept(embedder, [Mixture([TrainingSource("", PAIRS)])], tmp_path)
    never()
    for made in (collator, pickle.loads(pickle.dumps(collator))):  # as it goes to a worker of the loader
        found = made(rows)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name
            assert value.dtype == found[name].dtype
    assert collator.uncut("", "anchor", TEXTS) == uncut.lengths


def test_a_batch_of_several_sources_has_the_prompt_of_each(tmp_path):
    embedder = tiny.embedder("mean-causal", prompts=PROMPTS)
    sources = [TrainingSource("a", PAIRS, prompts={"query": "of a "}), TrainingSource("b", PAIRS)]
    mixed = Mixture(sources)
    collator = collate_kept(embedder, [mixed], tmp_path)
    rows = [mixed.dataset()[i] for i in (0, len(PAIRS), 1)]
    found = collator(rows)
    for row, prompt, text in zip(found["anchor_input_ids"], ("of a ", "how many ", "of a "), rows, strict=True):
        ids = embedder[0].token_ids([text["anchor"]], prompt).ids[0].tolist()
        assert row[: len(ids)].tolist() == ids
    other = Mixture([TrainingSource("a", PAIRS, prompts={"query": "other "})])
    with pytest.raises(ValueError, match=r"source 'a' has other prompts in data\.eval than in data\.train"):
        collate_kept(embedder, [mixed, other], tmp_path)
    with pytest.raises(KeyError, match="no tokens are kept of 'unheard of'"):
        collator([{"anchor": "unheard of", "positive": "one", "dataset_name": "a"}])


def test_texts_are_tokenized_once(tmp_path, never):
    columns = [(PAIRS, name) for name in PAIRS.column_names]
    backbone = tiny.embedder("mean-causal")[0]
    kept = keep_tokens(backbone, columns, "", tmp_path)
    assert len(kept.uncut) == len(set(TEXTS))
    others = [
        keep_tokens(backbone, columns, "one ", tmp_path),
        keep_tokens(backbone, columns[:1], "", tmp_path),
        keep_tokens(tiny.embedder("mean-causal", max_seq_length=12)[0], columns, "", tmp_path),
        keep_tokens(tiny.embedder("mean-causal", frame="both")[0], columns, "", tmp_path),
        keep_tokens(tiny.embedder("mean-causal", include_bos=False, frame="both")[0], columns, "", tmp_path),
    ]
    places = {one.folder for one in (kept, *others)}
    # The first column holds all texts that there are: it is found, not made.
    assert len(places) == len(others)
    before = files_of(tmp_path)
    never()
    assert keep_tokens(tiny.embedder("mean-causal")[0], columns, "", tmp_path).folder == kept.folder
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("damage", ["a bit", "cut", "a file gone", "no json", "another json"])
def test_damaged_tokens_are_made_again_and_said(tmp_path, damage, caplog):
    backbone, columns = tiny.embedder("mean-causal")[0], [(PAIRS, "anchor")]
    folder = keep_tokens(backbone, columns, "", tmp_path).folder
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    content = whole["ids.bin"]
    match damage:
        case "a bit":
            (folder / "ids.bin").write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "cut":
            (folder / "index.npy").write_bytes(whole["index.npy"][:-8])
        case "a file gone":
            (folder / "ids.bin").unlink()
        case "no json":
            (folder / "tokens.json").write_text("{")
        case "another json":
            (folder / "tokens.json").write_text(json.dumps({"sha256": 5}))
    keep_tokens(backbone, columns, "", tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert ("are damaged; they are made again" in caplog.text) == (damage != "a file gone")


def test_a_full_disk_is_said_before_anything_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 100}))
    with pytest.raises(OSError, match=r"token ids of the training texts, at most; .*data\.cache_dir"):
        keep_tokens(tiny.embedder("mean-causal")[0], [(PAIRS, "anchor")], "", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_text_without_a_token_is_an_error_and_leaves_nothing_behind(tmp_path):
    backbone = tiny.embedder("mean-causal", append_eos=False)[0]
    blank = datasets.Dataset.from_dict({"anchor": ["one", ""]})
    with pytest.raises(ValueError, match="has no token"):
        keep_tokens(backbone, [(blank, "anchor")], "", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_rows_that_name_no_source_have_the_embedders_own_prompts(tmp_path):
    embedder = tiny.embedder("mean-causal", prompts=PROMPTS)
    trained, evaluated = (
        Mixture([TrainingSource("", PAIRS)]),
        Mixture([TrainingSource("a", PAIRS, 1.0, {"query": "a "})]),
    )
    collator = collate_kept(embedder, [trained, evaluated], tmp_path)
    assert collator.of_sources == {"": {"anchor": "how many "}, "a": {"anchor": "a "}}
