"""Mini-batches of a packed embedder: counted in tokens of text, sent without padding, the same numbers as padded."""

import pytest
import tiny
import torch

from mlpool.training.losses import InfoNCE

WORDS = ["how", "many", "layers", "does", "the", "pool", "read", "all", "of", "them", "and", "the", "last", "one", "is"]
# Lengths far apart, within and between columns.
COLUMNS = [
    [" ".join(WORDS[:n]) for n in lengths] for lengths in ([1, 2, 3, 15], [15, 4, 9, 2], [6, 1, 14, 12])
]  # fmt: skip


def made(packing: str = "auto", design: str = "multi-layer-bidirectional", **options) -> "tiny.Embedder":
    return tiny.embedder(design, "qwen2", packing=packing, **options).train()


def step(model, budget: int | None = 40, cached="auto", prompt: str | None = None):
    """The loss, its gradients, its counts, and the features of every call of the model."""
    calls = []
    hook = model[0].register_forward_pre_hook(lambda _, args: calls.append(dict(args[0])))
    loss = InfoNCE(model, cached=cached, mini_batch_tokens=budget)
    value = loss([model.preprocess(column, prompt=prompt) for column in COLUMNS], None)
    value.backward()
    hook.remove()
    return (
        value.item(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        loss.counts,
        calls,
    )


def tokens_of_text(model) -> int:
    return sum(sum(model[0].token_ids(column).lengths) for column in COLUMNS)


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_a_packed_mini_batch_is_counted_in_tokens_of_text_and_holds_nothing_else(budget):
    model = made()
    model[0].arrange()
    _, _, counts, calls = step(model, budget, cached=False)
    sizes = [call["input_ids"].numel() for call in calls]
    texts = [len(call["cu_seqlens"]) - 1 for call in calls]
    assert sum(sizes) == counts.computed == counts.text == tokens_of_text(model)
    assert sum(texts) == sum(map(len, COLUMNS))
    assert all(size <= budget or n == 1 for size, n in zip(sizes, texts, strict=True))
    if budget == 40:  # the next text, which is the longest of the next mini-batch, would not have gone in
        longest = [int(call["cu_seqlens"].diff().max()) for call in calls]
        assert all(size + after > budget for size, after in zip(sizes, longest[1:], strict=False))
    if budget == 10_000:
        assert len(calls) == 1  # columns of different lengths share a forward


@pytest.mark.parametrize("design", ["multi-layer-bidirectional", "last-layer-causal", "mean-bidirectional"])
@pytest.mark.parametrize("cached", [False, True])
def test_packed_and_padded_training_give_the_same_loss_and_gradients(design, cached):
    """The prompt is read and not pooled, so the mask of what is pooled is packed as well."""
    of = {}
    for packing in ("auto", "never"):
        model = made(packing, design, include_prompt=False)
        model[0].arrange()
        of[packing] = step(model, 40, cached, prompt="them twice ")
        assert model[0].packed == (packing == "auto")
    (ours, gradients, _, _), (theirs, expected, counts, _) = of["auto"], of["never"]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert counts.computed > counts.text  # what padding costs is counted, too


def test_with_gradient_checkpointing_the_packed_layers_are_run_again():
    expected = step(made())[1]
    model = made()
    model[0].model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in step(model)[1].items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_padding_is_counted_where_it_is_computed():
    model = made("never")
    _, _, counts, calls = step(model, cached=False)
    assert counts.computed == sum(call["input_ids"].numel() for call in calls)
    assert counts.text == sum(int(call["attention_mask"].sum()) for call in calls) == tokens_of_text(model)


def test_an_evaluation_is_not_counted():
    model = made()
    loss = InfoNCE(model)
    with torch.no_grad():
        loss([model.preprocess(column) for column in COLUMNS], None)
    assert loss.counts.text == loss.counts.computed == 0


def test_packed_texts_are_refused_by_a_model_that_runs_padded():
    model = made("never")
    model[0].arrange()
    with pytest.raises(ValueError, match="got packed texts"):
        model[0](model[0].token_ids(["one", "two"]).packed([0, 1]))
