"""What InfoNCE keeps of a batch and what it embeds twice, by the memory that there is."""

import pytest
import torch
from conftest import peak
from loss_models import VARIANTS, TinyLlama, assert_same, column, random_texts, run
from torch import nn

from mlpool.training import losses, memory
from mlpool.training.losses import InfoNCE


@pytest.mark.parametrize("variant", ["hard negatives", "masks"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_fits_is_kept_and_the_rest_embedded_twice(share, variant, monkeypatch):
    """The same numbers as both extremes, with dropout on; nothing runs twice where everything fits."""
    columns, model, runs = [column(t) for t in random_texts()], TinyLlama().train(), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))  # the second forward stops at the last tensor needed
    results, counts = {}, {}
    needed: list[int] = []

    def free(_) -> int:
        return int((share * sum(needed) + needed[0] + gradients) / memory.SHARE) + 1

    gradients = sum(p.nbytes for p in model.parameters())
    how_many = memory.how_many

    def judge(first, tokens, *rest):
        needed[:] = [first * n // tokens[0] + 1 for n in tokens[1:]]
        needed.insert(0, first)
        return how_many(first, tokens, *rest)

    monkeypatch.setattr(memory, "free_bytes", free)
    monkeypatch.setattr(losses, "how_many", judge)
    for cached in ("auto", True, False):
        runs.clear()
        results[cached] = run(InfoNCE(model, cached=cached, mini_batch_tokens=24, **VARIANTS[variant]), columns)
        counts[cached] = len(runs)
    assert_same(results["auto"], results[True], 1e-6)
    assert_same(results["auto"], results[False], 1e-6)
    assert counts[True] == 2 * counts[False]
    if share == 1:
        assert counts["auto"] == counts[False]
    elif share == 0:
        assert counts["auto"] == counts[True] - 1
    else:
        assert counts[False] < counts["auto"] < counts[True] - 1


def test_what_a_token_costs_is_what_autograd_keeps():
    """Against the profiler's record of what is alive behind a forward."""
    model, features = TinyLlama().train(), column([[2 + i % 48 for i in range(60)]] * 8)
    with memory.saved_bytes(model) as saved:
        value = model(features)["sentence_embedding"].sum()
    count = saved()
    del value
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        value = model(features)["sentence_embedding"].sum()
    alive = sum(e.nbytes() for e in profiler.kineto_results.events() if e.name() == "[memory]")
    assert value.requires_grad
    assert 0.8 * alive < count < 1.2 * alive


def test_how_many_mini_batches_fit(monkeypatch):
    """A fifth is left, gradients that are still to come, and one mini-batch more."""
    model = nn.Linear(10, 10, bias=False)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 10_000)
    device = torch.device("cpu")
    assert memory.how_many(1000, [100] * 20, model, device) == 1 + (8000 - 400 - 1000) // 1000
    model.weight.grad = torch.zeros(10, 10)
    assert memory.how_many(1000, [100, 50, 50, 50], model, device) == 4
    assert memory.how_many(7000, [100, 50, 10], model, device) == 1
    assert memory.how_many(9000, [100, 1], model, device) == 1


def test_free_memory_is_the_system_s_within_the_container(monkeypatch, tmp_path):
    device = torch.device("cpu")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = memory.free_bytes(device)
    assert 1 << 20 < whole < 1 << 50
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(device) > 1 << 20
    (tmp_path / "memory.max").write_text("4000000\n")
    assert memory.free_bytes(device) == 1_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(device) == 250_000


def test_memory_falls_with_mini_batch_tokens():
    model = TinyLlama().train()
    texts = [[[2 + (i + j + c) % 48 for j in range(64)] for i in range(32)] for c in range(2)]
    columns = [column(t) for t in texts]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def step(cached=True, **options):
        loss = InfoNCE(model, cached=cached, **options)
        return peak(lambda: loss(columns, None).backward())

    step(mini_batch_tokens=512)
    plain = step(cached=False, mini_batch_tokens=512)
    peaks = [step(mini_batch_tokens=64 * 64 // n) for n in (1, 2, 4, 8, 16)]
    print(f"plain {plain / 1e6:.1f} MB, cached in 1, 2, 4, 8, 16 mini-batches {[f'{p / 1e6:.1f}' for p in peaks]}")
    assert peaks == sorted(peaks, reverse=True)
    assert 3 * peaks[3] <= min(plain, peaks[0])
