"""What must not change an embedding or a gradient: padding, packing, batch, layout, memory, and what others hold."""

import itertools

import pytest
import torch
from conftest import differentiate, last, leaves_of, make_mask, make_states, multi, ours, randomise, use, use_rows
from torch import Tensor
from torch.nn.functional import pad

from mlpool import EosPool, LastLayerPool, LayerWeightsPool, MeanPool, MultiLayerPool
from mlpool.pooling import mix

D, L, B, T = 16, 4, 4, 6


def kinds(target, **options):
    """Every pool, with either token pooling where it has one."""
    for how in ("last", "mean"):
        yield multi(D, L, target, token_pooling=how, **options)
        yield last(D, target, token_pooling=how, **options)
        if not options:
            scalar = LayerWeightsPool(D, L, token_pooling=how, backend=target.backend).to(target.device)
            torch.nn.init.normal_(scalar.weights)
            yield scalar
    if not options:
        yield from (EosPool(D, backend=target.backend), MeanPool(D, backend=target.backend))


def embed(pool, states, mask=None, **where):
    if isinstance(pool, MultiLayerPool | LayerWeightsPool):
        return pool(states, mask, includes_embedding=False, **where)
    return pool(states, mask, **where)


def used_states(pool, states):
    """All layers, or the last one where the pool reads no other."""
    return states if isinstance(pool, MultiLayerPool | LayerWeightsPool) else states[-1:]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def batch(target, padding="right"):
    return make_states(L, (B, T, D), target), make_mask(B, T, padding).to(target.device)


def packed(states, mask):
    """The kept tokens of every layer [total, D], and their offsets."""
    return [s[mask.bool()] for s in states], pad(mask.sum(1).cumsum(0), (1, 0)).int()


def test_left_right_more_and_no_padding(target):
    states, mask = batch(target)
    for pool in kinds(target):
        want = embed(pool, states, mask)
        lengths = mask.sum(1).tolist()
        shifted = [torch.stack([row.roll(T - n, 0) for row, n in zip(s, lengths, strict=True)]) for s in states]
        close(embed(pool, shifted, mask.flip(1)), want)
        wider = [pad(s, (0, 0, 2, 3), value=9.0) for s in states]
        close(embed(pool, wider, pad(mask, (2, 3))), want)
        for i, n in enumerate(lengths):
            close(embed(pool, [s[i : i + 1, :n] for s in states], torch.ones_like(mask[:1, :n])), want[i : i + 1])


def test_any_batch_composition(target):
    """Alone, in another order, or among others: 1e-5."""
    states, mask = batch(target)
    for pool in itertools.chain(kinds(target), (p.eval() for p in kinds(target, choices={"memory": "recompute"}))):
        want = embed(pool, states, mask)
        for index in ([2], [3, 1, 0, 2], [1, 1, 3, 3, 0, 2, 2, 2]):
            close(embed(pool, [s[index] for s in states], mask[index]), want[index])


def test_packed_equals_padded(target):
    """Embedding and gradients; [total, D] and [1, total, D]; with room before and after the texts."""
    for padding, pool in itertools.product(("left", "right"), kinds(target)):
        states, mask = batch(target, padding)
        states = used_states(pool, states)
        want = ours(pool, states, embed, mask)
        rows, offsets = packed(states, mask)
        roomy = [pad(r, (0, 0, 2, 1), value=torch.nan) for r in rows]
        for flat, where, cut in (
            (rows, offsets, slice(None)), ([r[None] for r in rows], offsets.long(), slice(None)),
            (roomy, offsets + 2, slice(2, -1)),
        ):  # fmt: skip
            got = ours(pool, flat, embed, cu_seqlens=where)
            for name, value in want.items():
                if name.startswith("states"):
                    rest = got[name].reshape(-1, D)
                    close(rest[cut], value[mask.bool()])
                    assert not rest[: cut.start or 0].any()
                else:
                    close(got[name], value)


def test_token_mask_equals_leaving_the_tokens_out(target):
    """A BOS and an instruction masked out, padded and packed, is the batch without them."""
    states, mask = batch(target, "none")
    keep = mask.clone()
    keep[:, 0] = 0
    keep[1, :4] = 0
    for pool in kinds(target):
        rows, offsets = packed(states, keep)
        want = embed(pool, rows, cu_seqlens=offsets)
        close(embed(pool, states, mask, token_mask=keep), want)
        close(embed(pool, states, keep), want)
        everything, all_offsets = packed(states, mask)
        for token_mask in (keep.reshape(-1), keep.reshape(1, -1).bool()):
            close(embed(pool, everything, cu_seqlens=all_offsets, token_mask=token_mask), want)


def test_masks_of_any_dtype(target):
    states, mask = batch(target)
    for pool in kinds(target):
        want = embed(pool, states, mask)
        for dtype in (torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16):
            assert torch.equal(embed(pool, states, mask.to(dtype)), want)


def test_texts_of_one_token(target):
    """One text of one token, alone and packed: last and mean are the same."""
    states = make_states(L, (1, 1, D), target)
    for pool in kinds(target):
        want = embed(pool, states, torch.ones(1, 1, device=target.device))
        assert torch.isfinite(want).all()
        close(embed(pool, [s[0] for s in states], cu_seqlens=torch.tensor([0, 1])), want)
    rows = make_states(L, (3, D), target)
    for pool in kinds(target):
        want = embed(pool, [r[:, None] for r in rows], torch.ones(3, 1, device=target.device))
        close(embed(pool, rows, cu_seqlens=torch.arange(4)), want)


def test_strides_change_nothing(target):
    """Transposed, sliced and D-strided states, layers of different strides."""
    _, mask = batch(target)
    base = torch.randn(T, B, 2 * D, device=target.device).transpose(0, 1)
    views = [base[..., :D], base[..., ::2], base[..., D:], base[:, :1, :D].expand(B, T, D)]
    for layers in (views, *([v] * L for v in views)):
        for pool in (multi(D, L, target), last(D, target)):
            want = ours(pool, [v.contiguous() for v in used_states(pool, layers)], embed, mask)
            got = ours(pool, used_states(pool, layers), embed, mask)
            for name, value in want.items():
                close(got[name], value)


def test_strided_layer_states(target):
    pool = multi(D, L, target)
    for rows in (
        torch.randn(L, B, D).transpose(0, 1), torch.randn(B, L, 2 * D)[..., ::2], torch.randn(B, D, L).mT,
        torch.randn(B, 1, D).expand(B, L, D),
    ):  # fmt: skip
        rows = rows.to(target.device)
        want, got = (ours(pool, [x], use_rows) for x in (rows.contiguous(), rows))
        for name, value in want.items():
            close(got[name], value)


def test_layer_states_equal_hidden_states(target):
    """Rows gathered outside give the same; the embedding layer is left out or never given."""
    states, mask = batch(target)
    for pool in (multi(D, L, target), LayerWeightsPool(D, L, backend=target.backend).to(target.device)):
        want = embed(pool, states, mask)
        last_row = mask.sum(1) - 1
        rows = torch.stack([s[torch.arange(B), last_row] for s in states], 1)
        close(pool(layer_states=rows), want)
        close(pool((torch.full_like(states[0], torch.nan), *states), mask), want)


@pytest.mark.parametrize("layers", [[0], [-1], [0, 2], [-3, -1], [1, 2, 3], [0, 1, 2, 3]])
def test_layers_subset(layers, target):
    """A pool of some layers is the pool of just those; the residual starts from the last one read."""
    states, mask = batch(target)
    chosen = [states[i] for i in layers]
    some = randomise(MultiLayerPool(D, L, 5, 2, 8, layers=layers, backend=target.backend)).to(target.device)
    alone = multi(D, len(layers), target)
    alone.load_state_dict(some.state_dict())
    want = embed(alone, chosen, mask)
    close(embed(some, states, mask), want)
    last_row = mask.sum(1) - 1
    rows = torch.stack([s[torch.arange(B), last_row] for s in states], 1)
    close(some(layer_states=rows), want)
    close(some(layer_states=rows[:, layers]), want)


# --- starts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_pools_start_at_eos_and_mean_pooling(dtype, target):
    states, mask = batch(target, "left")
    states = [s.to(dtype) for s in states]
    for how, simple in (("last", EosPool(D, backend=target.backend)), ("mean", MeanPool(D, backend=target.backend))):
        want = simple(states, mask)
        for make in (MultiLayerPool, LastLayerPool):
            sizes = (D, L) if make is MultiLayerPool else (D,)
            options = {"token_pooling": how, "backend": target.backend}
            gated = make(*sizes, residual=True, **options).to(target.device, dtype)
            assert torch.equal(embed(gated, states, mask), want)
            # Their row is brought to another length first, which rounds it.
            mixes = [make(*sizes, **options)]
            mixes += [LayerWeightsPool(*sizes, start="last", **options)] if make is MultiLayerPool else []
            for mixed in mixes:
                got = embed(mixed.to(target.device, dtype), states, mask)
                torch.testing.assert_close(got, want, atol=0, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("start", ["last", "all", [0.5, -1, 0.0, 2]])
def test_starts(start, target):
    """The pools that mix layers of one length start at the mix, and nothing else."""
    states, mask = batch(target)
    rows = torch.stack([s[torch.arange(B), mask.sum(1) - 1] for s in states], 1)
    weights = {"last": [0, 0, 0, 1.0], "all": [0.25] * 4}.get(start if isinstance(start, str) else "", start)
    unit = torch.nn.functional.normalize(rows * torch.tensor([1, 1e3, 1, 1e-3], device=target.device)[:, None], dim=-1)
    want = torch.einsum("l,bld->bd", torch.tensor(weights, device=target.device), unit) * D**0.5
    for pool in (
        MultiLayerPool(D, L, start=start, normalize=False, backend=target.backend),
        LayerWeightsPool(D, L, start=start, normalize=False, backend=target.backend),
    ):
        got = pool.to(target.device)(layer_states=rows * torch.tensor([1, 1e3, 1, 1e-3], device=target.device)[:, None])
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
        assert type(pool)(**pool.config()).config() == pool.config()


@pytest.mark.parametrize("kind", [multi, last])
def test_the_first_step_moves_the_embedding(kind, target):
    """A gate of zero would hold the pooler back; here what ends the branch has a gradient, then all have."""
    states, mask = batch(target)
    sizes = (D, L) if kind is multi else (D,)
    pool = (MultiLayerPool if kind is multi else LastLayerPool)(*sizes, backend=target.backend).to(target.device)
    before = use(pool, states, mask)
    before[:, 0].sum().backward()
    ends = {name for name, p in pool.named_parameters() if p.grad.norm() > 1e-3}
    assert ends >= {"output_weight", "ff_out_weight", "ff_out_bias"}
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.sub_(1e-2 * parameter.grad.sign())
    pool.zero_grad()
    use(pool, states, mask)[:, 0].sum().backward()
    assert all(p.grad.any() for p in pool.parameters())
    assert (use(pool, states, mask) - before).abs().max() > 1e-2


def test_softmax_layer_weights_are_the_mix_of_elmo(target):
    states, mask = batch(target)
    pool = LayerWeightsPool(D, L, mix="softmax", normalize=False, backend=target.backend).to(target.device)
    rows = torch.stack([s[torch.arange(B), mask.sum(1) - 1] for s in states], 1)
    close(embed(pool, states, mask), rows.mean(1))
    torch.nn.init.normal_(pool.weights)
    torch.nn.init.constant_(pool.scale, 1.7)
    close(embed(pool, states, mask), 1.7 * torch.einsum("l,bld->bd", pool.weights.softmax(0), rows))


def test_rows_of_zeros_and_of_no_number(target, monkeypatch):
    """A row of zeros gives nothing and no gradient, to none of its neighbours NaN; one out of range is NaN."""
    rows = torch.randn(2, L, D, device=target.device)
    rows[0, 1] = 0
    for pool in (MultiLayerPool(D, L, start="all", backend=target.backend), LayerWeightsPool(D, L)):
        x0 = rows.clone().requires_grad_()
        pool.to(target.device)(layer_states=x0)[:, 0].sum().backward()
        assert x0.grad.isfinite().all()
        assert not x0.grad[0, 1].any()
        assert x0.grad[0, 0].any()
    # Where looking would mean to wait, as on a GPU, it is NaN and no silent zero.
    large = torch.full((1, 1, D), 1e30, device=target.device)
    monkeypatch.setattr(mix, "check_range", lambda states: None)
    assert mix.unit_rows(large).isnan().all()


def test_unit_length_unless_asked(target):
    states, mask = batch(target)
    for pool in (multi(D, L, target), last(D, target)):
        unit = embed(pool, states, mask)
        close(unit.norm(dim=1), torch.ones_like(unit[:, 0]))
        pool.normalize = False
        close(torch.nn.functional.normalize(embed(pool, states, mask), dim=1), unit)


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [multi, last])
def test_memory_choices_give_the_same_gradients(kind, target):
    states, mask = batch(target)
    results = []
    for memory in ("save", "recompute_ff", "recompute"):
        pool = kind(D, target=target, choices={"memory": memory})
        used = states if kind is multi else states[-1:]
        results.append(ours(pool, used, use, mask))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("memory", ["save", "recompute_ff", "recompute"])
def test_bitwise_from_run_to_run(memory, target):
    states, mask = batch(target)
    for pool in kinds(target, choices={"memory": memory}):
        used = used_states(pool, states)
        first, second = (ours(pool, used, embed, mask) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        with torch.no_grad():
            assert torch.equal(embed(pool, states, mask), embed(pool, states, mask))


def test_frozen_backbone_and_frozen_pool(target):
    """Without gradients for the states, the parameters' are the same; without the parameters', the states' are."""
    states, mask = batch(target)
    for pool in kinds(target, residual=True):
        used = used_states(pool, states)
        full = ours(pool, used, embed, mask)
        frozen = differentiate(embed(pool, used, mask), dict(pool.named_parameters()))
        assert all(torch.equal(frozen[name], full[name]) for name in frozen)
        leaves = leaves_of(torch.nn.Module(), [s.clone().requires_grad_() for s in used])
        pool.requires_grad_(False)
        alone = differentiate(embed(pool, list(leaves.values()), mask), leaves)
        for name in leaves:
            close(alone[name], full[name])
        # LoRA on the upper layers alone: the first layers' states need no gradient.
        upper = [s.clone() for s in used]
        upper[-1].requires_grad_()
        close(differentiate(embed(pool, upper, mask), {"last": upper[-1]})["last"], full[f"states[{len(used) - 1}]"])


def test_every_parameter_gets_a_gradient(target):
    """Zeros, never None, also where there is one key (design 2) and queries and keys do nothing: DDP needs them."""
    for how, tokens in (("last", T), ("mean", T), ("mean", 1)):
        states, mask = make_states(L, (B, tokens, D), target), make_mask(B, tokens).to(target.device)
        for pool in (last(D, target, token_pooling=how), multi(D, L, target, token_pooling=how)):
            embed(pool, states, mask).sum().backward()
            assert all(p.grad is not None for p in pool.parameters())
            if isinstance(pool, LastLayerPool) and (how == "last" or tokens == 1):
                idle = ("query_weight", "key_weight", "latent_norm_weight", "latent_norm_bias")
                assert not any(getattr(pool, name).grad.any() for name in idle)


# --- NaN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_padding_reaches_nothing(bad, target):
    """Whatever padding holds: the same embedding and gradients bit for bit, and no gradient for padding."""
    for padding, pool in itertools.product(("left", "right"), kinds(target)):
        states, mask = batch(target, padding)
        states = used_states(pool, states)
        gone = mask[:, :, None] == 0
        want, got = (
            ours(pool, used, embed, mask)
            for used in ([s.masked_fill(gone, 0) for s in states], [s.masked_fill(gone, bad) for s in states])
        )
        for name, value in want.items():
            close(got[name], value)
            if name.startswith("states"):
                assert not got[name].masked_select(gone).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("padding", ["left", "right", "packed"])
@pytest.mark.parametrize("row", range(B))
def test_a_nan_stays_in_its_text(row, padding, bad, target):
    """A text that holds NaN or Inf is NaN alone: no other embedding, and no other text's states' gradient."""
    states, mask = batch(target, "left" if padding == "left" else "right")
    others = [i for i in range(B) if i != row]
    for pool in kinds(target):
        used = [s.masked_fill((torch.arange(B, device=s.device) == row)[:, None, None], bad) for s in states]
        used = used_states(pool, used)
        if padding == "packed":
            rows, offsets = packed(used, mask)
            text = torch.repeat_interleave(torch.arange(B, device=mask.device), mask.sum(1))
            result = ours(pool, rows, embed, cu_seqlens=offsets)
            elsewhere = text != row
        else:
            result = ours(pool, used, embed, mask)
            elsewhere = others
        assert not torch.isfinite(result["output"][row]).all()
        assert torch.isfinite(result["output"][others]).all()
        for i in range(len(used)):
            assert torch.isfinite(result[f"states[{i}]"][elsewhere]).all(), f"{type(pool).__name__}, layer {i}"
