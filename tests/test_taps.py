"""Taps against `output_hidden_states=True`: values, gradients, memory."""

import itertools
import weakref

import pytest
import torch
from tapped import FAMILIES, D, L, T, V, batch, build, classes, close, embed, expected, gradients, same_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlpool.pooling.tokens import select_tokens
from mlpool.taps import Taps, _add_rows, _pool_rows, _Tap
from mlpool.trunk import find_layers


@pytest.mark.parametrize("how", ["last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hidden_states(family, how):
    model = build(family)
    before = classes(model)
    for padding in ("left", "right", "mixed"):
        inputs = batch(padding)
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
            with Taps(model, how) as taps:
                model(**inputs)
                got = taps.take()
        assert got.shape == (3, L, D)
        close(got, expected(states, how, inputs["attention_mask"]))
    inputs = embed(model, batch("mixed"))
    output = model(**inputs, output_hidden_states=True)
    reference = expected(output.hidden_states, how, inputs["attention_mask"])
    wanted = gradients(model, inputs, reference, output.last_hidden_state)
    with Taps(model, how) as taps:
        output = model(**inputs)
        same_gradients(gradients(model, inputs, taps.take(), output.last_hidden_state), wanted)
    assert classes(model) == before


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bert"])
@pytest.mark.parametrize("skip_tokens", [0, 1])
def test_unit_mean(family, skip_tokens):
    """Values and gradients, with a gradient of the last state beside; the model's first tokens left out."""
    model, inputs = build(family), embed(build(family), batch("mixed"))
    mask = inputs["attention_mask"]
    kept = mask * (mask.cumsum(1) > skip_tokens)
    output = model(**inputs, output_hidden_states=True)
    reference = expected(output.hidden_states, "unit_mean", kept)
    wanted = gradients(model, inputs, reference, output.last_hidden_state)
    with Taps(model, "unit_mean", skip_tokens=skip_tokens) as taps:
        output = model(**inputs)
        got = taps.take()
        close(got, reference)
        same_gradients(gradients(model, inputs, got, output.last_hidden_state), wanted)
    with pytest.raises(ValueError, match="skip_tokens=1 leaves the first tokens out of a mean, and"):
        Taps(model, skip_tokens=1)


@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bert"])
def test_checkpointing(family, reentrant, how):
    model = build(family)
    inputs = embed(model, batch("mixed"))
    states = model(**inputs, output_hidden_states=True).hidden_states
    wanted = gradients(model, inputs, expected(states, how, inputs["attention_mask"]))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    runs = []
    find_layers(model)[1][0].register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    with Taps(model, how) as taps:
        model(**inputs, use_cache=False)
        got = taps.take()
        same_gradients(gradients(model, inputs, got), wanted)
        assert not taps._rows  # the recompute leaves nothing behind
    assert runs in ([True] * 2, [False, True], [True])  # see the module's note on where hooks run


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_the_model(reentrant):
    model = build("Llama")
    inputs = embed(model, batch("mixed"))
    states = model(**inputs, output_hidden_states=True).hidden_states
    wanted = gradients(model, inputs, expected(states, "mean", inputs["attention_mask"]))
    with Taps(model, "mean") as taps:

        def run(embeds):
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
            return taps.take()

        got = torch.utils.checkpoint.checkpoint(run, inputs["inputs_embeds"], use_reentrant=reentrant)
        same_gradients(gradients(model, inputs, got), wanted)


@pytest.mark.parametrize("how", ["last", "mean"])
@pytest.mark.parametrize("head", ["Model", "ForCausalLM"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(head, how, checkpointing):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(build("Llama", head), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    # Layer 0 stays frozen: its hidden state has no gradient unless the inputs have one.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and ".layers.0." not in name)
    inputs = batch("mixed")

    def grads(states):
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
        model.zero_grad()
        (states * weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.eval()
    states = model(**inputs, output_hidden_states=True).hidden_states
    reference = expected(states, how, inputs["attention_mask"])
    wanted = grads(reference)
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        model.train()
    with Taps(model, how) as taps:
        model(**inputs, use_cache=False)
        got = taps.take()
        close(got, reference)
        same_gradients(grads(got), wanted)


@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_packed(family, how):
    model = build(family)
    ids = torch.randint(3, V, (1, 9), generator=torch.Generator().manual_seed(3))
    position = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 0]])
    offsets = torch.tensor([0, 4, 5, 8], dtype=torch.int32)  # one row behind the last text
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    inputs = {"inputs_embeds": embeds, "position_ids": position, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    states = model(**inputs, output_hidden_states=True).hidden_states[1:]
    if how == "unit_mean":
        states = [nn.functional.normalize(h, dim=-1) for h in states]
    texts = [[h[0, s:e] for s, e in itertools.pairwise(offsets)] for h in states]
    pooled = [torch.stack([t[-1] if how == "last" else t.mean(0) for t in layer]) for layer in texts]
    reference = torch.stack(pooled, 1)
    wanted = gradients(model, inputs, reference)
    with Taps(model, how) as taps:
        model(**inputs)
        got = taps.take()
        close(got, reference)
        same_gradients(gradients(model, inputs, got), wanted)
        del inputs["cu_seq_lens_q"], inputs["cu_seq_lens_k"]
        keep = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1])
        taps.expect(cu_seqlens=offsets, token_mask=keep)
        model(**inputs)
        dense = torch.stack([h[0] for h in states], 1)
        groups = [dense[rows] for rows in ([1, 2], [4], [6, 7])]
        close(taps.take(), torch.stack([g[-1] if how == "last" else g.mean(0) for g in groups]))


def test_token_mask_holds_for_one_forward():
    model, inputs = build("Llama"), batch("right")
    mask = inputs["attention_mask"]
    token_mask = torch.ones_like(mask)
    token_mask[:, 0] = 0
    with torch.no_grad(), Taps(model, "mean") as taps:
        states = model(**inputs, output_hidden_states=True).hidden_states
        taps.expect(token_mask=token_mask)
        model(**inputs)
        close(taps.take(), expected(states, "mean", mask * token_mask))
        model(**inputs)
        close(taps.take(), expected(states, "mean", mask))
        taps.expect(token_mask=1 - token_mask)
        model(**inputs)
        close(taps.take(), torch.stack([h[:, 0] for h in states[1:]], 1))


def test_masks_other_than_2d():
    model, inputs = build("Llama"), batch("right")
    mask = inputs["attention_mask"]
    dense = torch.tril(torch.ones(T, T, dtype=torch.bool)) & mask[:, None, None].bool()
    with torch.no_grad(), Taps(model) as taps:
        states = model(**inputs, output_hidden_states=True).hidden_states
        with pytest.raises(ValueError, match="4-dimensional"):
            model(inputs["input_ids"], dense)  # by position
        with pytest.raises(TypeError, match="expect"):
            model(input_ids=inputs["input_ids"], attention_mask={"full_attention": dense})
        taps.expect(attention_mask=mask)
        model(inputs["input_ids"], dense)
        close(taps.take(), expected(states, "last", mask))
        model(inputs["input_ids"])
        assert taps.take().shape == (3, L, D)


@pytest.mark.parametrize("how", ["last", "mean"])
def test_layers_by_index(how):
    model, inputs = build("Llama", "ForCausalLM"), batch("left")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        reference = expected(states, how, inputs["attention_mask"])
        for layers in ([-1], [0], [2, 0], (-2, 0)):
            with Taps(model, how, layers) as taps:
                model(**inputs)
                close(taps.take(), reference[:, list(layers)])
    for wrong in ([], [3], [-4], [0, -3], [True], ["0"]):
        with pytest.raises(ValueError, match="layers must"):
            Taps(model, how, wrong)
    with pytest.raises(ValueError, match="token_pooling"):
        Taps(model, "first")


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, return_dict):
    model, inputs = build("Llama").to(dtype), batch("mixed")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        for how, tolerance in (("last", 0.0), ("mean", 1e-14 if dtype == torch.float64 else 8e-3)):
            with Taps(model, how) as taps:
                model(**inputs, return_dict=return_dict)
                close(taps.take(), expected(states, how, inputs["attention_mask"]), tolerance)


def test_autocast_does_not_reach_the_mean():
    model, inputs = build("Llama"), batch("mixed")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), Taps(model, "mean") as taps:
        states = model(**inputs, output_hidden_states=True).hidden_states
        model(**inputs)
        assert states[1].dtype == torch.float32
        close(taps.take(), expected(states, "mean", inputs["attention_mask"]))


def test_evaluation_keeps_rows_only():
    model, inputs = build("Llama"), batch("right")
    outputs = []
    for layer in find_layers(model)[1]:
        layer.register_forward_hook(lambda _m, _a, out: outputs.append(weakref.ref(out)))
    with torch.no_grad(), Taps(model, "mean") as taps:
        result = model(**inputs)
        assert [ref() for ref in outputs] == [None] * L
        assert all(row.shape == (3, D) and row.untyped_storage().nbytes() == 3 * D * 4 for row in taps._rows.values())
        last = weakref.ref(result.last_hidden_state)
        del result
        assert last() is None
        taken = weakref.ref(taps.take())
    assert taken() is None


@pytest.mark.parametrize("how", ["last", "mean"])
def test_backward_fills_one_dense_zero(how):
    class Zeros(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "zero" in str(func) and isinstance(out, torch.Tensor) and out.numel() == 3 * T * D:
                self.count += 1
            return out

    model, inputs = build("Llama"), batch("right")
    counts = []
    for tapped in (False, True):
        if tapped:
            with Taps(model, how) as taps:
                model(**inputs)
                states = taps.take()
        else:
            states = model(**inputs, output_hidden_states=True).hidden_states
            states = expected(states, how, inputs["attention_mask"])
        with Zeros() as zeros:
            states.sum().backward()
        counts.append(zeros.count)
    assert counts[1] <= 1, counts
    assert how == "mean" or counts[0] >= L


@pytest.mark.parametrize("how", ["last", "mean"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(how, packed):
    torch.manual_seed(0)
    keep = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    if packed:
        tokens = select_tokens((1, 8, 3), torch.device("cpu"), None, torch.tensor([1, 4, 7]), torch.arange(8) != 2)
        hidden = torch.randn(1, 8, 3, dtype=torch.float64, requires_grad=True)
    else:
        tokens = select_tokens((2, 4, 3), torch.device("cpu"), keep)
        hidden = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Tap.apply(x.sin(), tokens, how), hidden)
    assert torch.autograd.gradcheck(lambda x: _Tap.apply(x.sin(), tokens, how)[0], hidden)
    assert torch.autograd.gradcheck(lambda x: _Tap.apply(x.sin(), tokens, how)[1], hidden)
    assert torch.autograd.gradgradcheck(lambda x: _Tap.apply(x.sin(), tokens, how), hidden)
    incoming = torch.randn(8, 3, dtype=torch.float64)
    saved = incoming.clone()
    _add_rows(incoming, torch.randn(2, 3, dtype=torch.float64), tokens, how)
    assert torch.equal(incoming, saved)  # out of place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padding_does_not_leak(dtype):
    keep = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    hidden = torch.randn(2, 4, 3).to(dtype)
    tokens = select_tokens(hidden.shape, hidden.device, keep)
    clean = _pool_rows(hidden.flatten(0, 1), tokens, "mean")
    hidden[0, 2], hidden[1, 3] = float("nan"), float("inf")
    close(_pool_rows(hidden.flatten(0, 1), tokens, "mean"), clean, 2e-3)
    offsets = torch.tensor([0, 2, 5])
    packed = torch.cat([hidden[0, :2], hidden[1, :3], hidden[0, 2:3]])
    tokens = select_tokens((1, 6, 3), hidden.device, None, offsets)
    close(_pool_rows(packed, tokens, "mean"), clean, 2e-3)


def test_float16_sum_may_overflow():
    hidden = torch.full((2, 4, 3), 4e4, dtype=torch.float16)
    tokens = select_tokens(hidden.shape, hidden.device, torch.ones(2, 4))
    assert torch.equal(_pool_rows(hidden.flatten(0, 1), tokens, "mean"), hidden[:, 0])


@pytest.mark.parametrize(("how", "layers"), [("last", 1), ("mean", 2)])
def test_compile(how, layers):
    model, inputs = build("Llama", num_hidden_layers=layers), batch("mixed")
    inputs = embed(model, inputs)
    states = model(**inputs, output_hidden_states=True).hidden_states
    reference = expected(states, how, inputs["attention_mask"])
    wanted = gradients(model, inputs, reference)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(**inputs)  # taps may come before compiling or after
    with Taps(compiled, how) as taps:
        compiled(**inputs)
        got = taps.take()
        close(got, reference)
        same_gradients(gradients(model, inputs, got), wanted)
        with torch.no_grad():
            compiled(**inputs)
            close(taps.take(), reference.detach())
    compiled(**inputs)
    with pytest.raises(RuntimeError, match="no layer_states"):
        taps.take()
