"""A few families of the census, those in which something was once wrong; the census itself, and its tables."""

from __future__ import annotations

import census
import families
import pytest
import tables
import torch
from census import Row, examine

WORKS = [
    "llama", "gemma4_text", "gemma4_unified_text", "higgs_audio_v2", "deepseek_v32+index_topk=4",
    "glm_moe_dsa+index_topk=4", "stablelm",
]  # fmt: skip


@pytest.mark.parametrize("family", WORKS)
def test_what_works(family):
    row = examine(family, "eager")
    assert (row.outcome, row.taps, row.reload) == ("works", "ok", "ok"), row


def test_an_encoder_whose_windows_differ_by_layer():
    row = examine("neomme", "eager")
    assert (row.outcome, row.taps) == ("encoder", "ok"), row


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "the first token does not answer"),
        ("lfm2", "the first token does not answer"),
        ("llama4_text", "chunk"),
        ("gemma3", "Gemma3Model is multimodal"),
        ("phi4_multimodal", "several lists of layers"),
        ("bart", "encoder-decoder"),
        ("canine", "CanineModel has no one table of token embeddings"),
        ("kyutai_speech_to_text", "KyutaiSpeechToTextModel has no one table of token embeddings"),
    ],
)
def test_what_is_refused_says_why(family, reason):
    row = examine(family, "eager")
    assert row.outcome == "refused"
    assert reason in row.reason
    assert row.faults == []


@pytest.mark.parametrize("family", ["deepseek_v32", "axk2", "doge", "llama4_text", "gemma3", "clip_text_model"])
def test_what_cannot_be_packed_is_refused(family):
    row = examine(family, "packed")
    assert row.outcome == "refused"
    assert row.causal_packed.startswith("refused: ValueError: ")


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_taps_of_families_whose_hidden_states_are_other_rows(family):
    assert examine(family, "eager").taps == "ok: hidden_states[:-2] and [-1]"


def test_taps_of_a_last_state_that_is_kept_without_its_norm():
    model = families.build("clip_text_model")
    assert census._taps(model) == "ok: hidden_states[1:-1] and last_hidden_state"


def test_falcon_h1_says_attention_only(caplog):
    from mlpool.pooling.base import log_once

    log_once.cache_clear()
    assert examine("falcon_h1", "eager").outcome == "works"
    assert (
        "falcon_h1 made bidirectional: its attention alone; the Mamba half of every layer stays causal" in caplog.text
    )


def test_the_probe_is_not_fooled():
    model = families.build("llama")
    assert not any(map(any, census.probe(model, census._padded(census.LENGTHS))))
    model.config.is_causal = False
    assert all(map(all, census.probe(model, census._padded(census.LENGTHS))))
    forward = type(model.layers[1]).forward
    model.layers[1].forward = lambda hidden, attention_mask=None, **rest: forward(
        model.layers[1], hidden, attention_mask=torch.full((8, 8), -1e9).triu(1), **rest
    )
    answers = census.probe(model, census._padded(census.LENGTHS[:1] * 2))
    assert [all(layer) for layer in answers] == [True, False, True, True]


def test_a_census_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    path, tried = tmp_path / "census.csv", []
    monkeypatch.setattr(census, "examine", lambda *what: tried.append(what) or Row(*what, outcome="works"))
    census.run(path, ["a"], set())
    path.write_text(path.read_text() + "b,eager,wor")
    done = {(row.family, row.backend) for row in census.read(path)}
    assert done == {("a", backend) for backend in census.BACKENDS}


def test_faults_are_counted_and_tabled(tmp_path):
    rows = [
        Row("llama", "eager", "works", taps="ok", reload="silently wrong: layers [0] look ahead"),
        Row("llama", "sdpa", "false refusal", "AttentionCheckError: llama | is not sound"),
        Row("other", "eager", "refused", "ValueError: not this one"),
    ]
    assert census.summary(rows).endswith("unclear error: 0, silently wrong: 1, false refusal: 1")
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    readme.write_text(f"before\n{tables.START}\nold\n{tables.END}\nafter\n")
    tables.write_tables(rows, readme, page)
    line = "| llama | ok | false refusal | – | – | ok | silently wrong |"
    assert readme.read_text().splitlines()[3:] == [
        "| --- | --- | --- | --- | --- | --- | --- |",
        line,
        tables.END,
        "after",
    ]
    assert "| other | refused | – | – | – | – | – | not this one |" in page.read_text()
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        tables.write_tables(rows, readme, page)
