"""bidirectional and causal: families and backends, what reaches flash-attention, saving, and undoing."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import logging
import pickle
import sys
import types
from collections.abc import Iterable

import models
import pytest
import torch
from models import DECODERS, ENCODERS, REFUSED, WINDOWED, D, L, V, alone, build, pad, texts, transformers
from torch import Tensor, nn

from mlpool.attention import AttentionCheckError, bidirectional, causal, check_attention, is_bidirectional
from mlpool.attention.families import NO_LIMIT, attentions, window_of
from mlpool.taps import Taps, find_layers

BACKENDS = ("eager", "sdpa", "flex_attention")


def taken(names: Iterable[str], backends: Iterable[str]) -> list:
    """Every family on every backend that the library lets it take."""
    pairs = [(name, backend) for name in names for backend in backends if (name, backend) not in REFUSED]
    return [pytest.param(*pair, id="-".join(pair)) for pair in pairs]


MATRIX = taken(DECODERS, BACKENDS)
TRAINED = [case for case in MATRIX if case.values[1] != "flex_attention"]  # torch: no flex backward on a CPU
flex_uncompiled = models.flex_uncompiled
pytestmark = pytest.mark.usefixtures("flex_uncompiled")


def run(model: nn.Module, batch: dict, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs)[0]


def outputs(model: nn.Module, rows: list[Tensor], side: str = "right") -> list[Tensor]:
    """The last states of each text, [n, D], from one padded batch."""
    batch = pad(rows, side)
    hidden = run(model, batch)
    return [h[m.bool()] for h, m in zip(hidden, batch["attention_mask"], strict=True)]


def lone(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    return [run(model, alone(row))[0] for row in rows]


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def reach(model: nn.Module, batch: dict, row: int = 0) -> list[Tensor]:
    """For each layer alone, bool [T, T]: does its output at i answer to noise on its own input at j?"""
    trunk, layers = find_layers(model)
    calls: list = [None] * len(layers)
    handles = [
        layer.register_forward_pre_hook(lambda _, a, k, i=i: calls.__setitem__(i, (a, k)), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    run(trunk, batch, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for layer, (args, kwargs) in zip(layers, calls, strict=True):
        plain = first(layer, args, kwargs)[row]
        answers = []
        for j in range(plain.shape[0]):
            hidden = args[0].clone()
            hidden[row, j] += torch.randn(D, generator=torch.Generator().manual_seed(j))
            answers.append((first(layer, (hidden, *args[1:]), kwargs)[row] - plain).abs().amax(-1) > 1e-6)
        found.append(torch.stack(answers, 1))
    return found


def first(layer: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    with torch.no_grad():
        output = layer(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def state(model: nn.Module) -> dict:
    """Everything that undoing has to restore."""
    ours = ("_output_capturing_hooks_installed",)
    plain = (bool, int, float, str, type(None))
    found = {"": model.config.to_dict(), "dict": dict(vars(model.config))}
    for name, module in model.named_modules():
        found[name] = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in ours}
        found[f"{name} forward"] = "forward" in vars(module)
        found[f"{name} hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
        found[f"{name} names"] = sorted(set(vars(module)) - set(ours))
    return found


# --- families and backends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), MATRIX)
def test_every_layer_reads_both_ways_and_padding_does_not_matter(name, backend):
    model, rows = build(name, backend), texts()
    before = lone(model, rows)
    assert not is_bidirectional(model)
    bidirectional(model)
    assert is_bidirectional(model)
    for batch in (alone(rows[0]), pad(rows)):
        assert all(layer.all() for layer in reach(model, batch))
    expected = lone(model, rows)
    assert apart(expected, before) > 1e-2
    error = max(apart(outputs(model, rows, side), expected) for side in ("left", "right", "mixed"))
    assert error <= 1e-5
    causal(model)
    assert apart(lone(model, rows), before) == 0.0
    assert not any(layer.triu(1).any() for layer in reach(model, pad(rows)))


@pytest.mark.parametrize(("name", "backend"), TRAINED)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients(name, backend, checkpointing):
    """The first token's output has a gradient with respect to the last token, the same padded and alone."""
    model, rows = build(name, backend), texts()
    bidirectional(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    weights = torch.randn(D, generator=torch.Generator().manual_seed(3))

    def gradient(batch: dict, row: int) -> Tensor:
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        out = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
        kept = batch["attention_mask"][row].bool()
        (out[row][kept][0] * weights).sum().backward()
        return embeds.grad[row][kept]

    for text in (0, 2):
        expected = gradient(alone(rows[text]), 0)
        assert expected[-1].norm() > 1e-4
        for side in ("left", "right"):
            got = gradient(pad(rows, side), text)
            assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("name", "backend"), taken(DECODERS, ("eager", "sdpa")))
def test_save_and_reload(name, backend, tmp_path):
    model, rows = build(name, backend), texts()
    before = lone(model, rows)
    bidirectional(model)
    expected = lone(model, rows)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation=backend).eval()

    by_itself = (name, backend) != ("StableLM", "sdpa")
    assert is_bidirectional(again) == by_itself
    assert (apart(lone(again, rows), expected) <= 1e-5) == by_itself
    assert apart(outputs(again, rows)[1:], expected[1:]) <= 1e-5  # in a padded batch StableLM is bidirectional too
    assert (apart(outputs(again, rows, "left"), expected) <= 1e-5) == (name != "GPT-2")
    bidirectional(again)
    assert apart(lone(again, rows), expected) <= 1e-5
    assert apart(outputs(again, rows, "left"), expected) <= 1e-5

    loaded = type(model).from_pretrained(tmp_path, attn_implementation=backend).eval()
    causal(loaded)  # by its config alone it was bidirectional
    assert apart(lone(loaded, rows), before) <= 1e-5
    check_attention(loaded, "causal")


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "Gemma2", "Gemma3"])
def test_serving_tools_find_their_flag(name, tmp_path):
    model = build(name)
    with bidirectional(model):
        model.save_pretrained(tmp_path)
        saved = transformers.AutoConfig.from_pretrained(tmp_path)
    assert saved.use_bidirectional_attention is True
    assert (name == "Gemma3") or saved.is_causal is False
    assert not getattr(model.config, "use_bidirectional_attention", None)


@pytest.mark.slow
def test_flex_attention_compiled():
    with torch.compiler.set_stance("default"):
        model, rows = build("Llama", "flex_attention"), texts()
        bidirectional(model)
        assert apart(outputs(model, rows, "left"), lone(model, rows)) <= 1e-5


# --- sliding windows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "backend"), taken(WINDOWED, BACKENDS))
def test_sliding_windows(name, backend, tmp_path):
    rows = texts()
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    for choice in ("keep", "full"):
        model = build(name, backend, among=WINDOWED)
        model.save_pretrained(tmp_path)  # the library notes class and dtype in the config
        before = state(model)
        bidirectional(model, sliding_window=choice)
        width = 9 if choice == "full" else 2 if name == "Gemma3" else 4  # Gemma3: 4 // 2 + 1, the end excluded
        for batch in (alone(rows[0]), pad(rows)):
            layers = reach(model, batch)
            assert torch.equal(layers[0], distance <= width)
            assert all(torch.equal(layer, distance <= width) or layer.all() for layer in layers)
        assert apart(outputs(model, rows, "mixed"), lone(model, rows)) <= 1e-5
        model.save_pretrained(tmp_path / choice)
        again = type(model).from_pretrained(tmp_path / choice, attn_implementation=backend).eval()
        assert apart(lone(again, rows), lone(model, rows)) <= 1e-5
        bidirectional(again, sliding_window=choice)
        assert apart(lone(again, rows), lone(model, rows)) <= 1e-5
        causal(model)
        assert state(model) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_gemma3_is_as_if_constructed_bidirectional(backend):
    patched, rows = build("Gemma3", backend, among=WINDOWED), texts()
    bidirectional(patched)
    constructed = build("Gemma3", backend, among=WINDOWED, use_bidirectional_attention=True)
    assert patched.config.sliding_window == constructed.config.sliding_window == 3
    expected = lone(constructed, rows)
    assert apart(lone(patched, rows), expected) == 0.0
    before = vars(constructed.config).copy()
    bidirectional(constructed)  # it is already: its window is not halved again
    assert vars(constructed.config) == before
    assert apart(lone(constructed, rows), expected) == 0.0


def test_a_window_of_full_reach_is_written_as_such():
    model = build("Mistral", among=WINDOWED)
    bidirectional(model, sliding_window="full")
    assert model.config.sliding_window is None
    model = build("Qwen3", among=WINDOWED)
    bidirectional(model, sliding_window="full")
    assert model.config.sliding_window == NO_LIMIT
    assert model.config.layer_types[0] == "sliding_attention"


# --- flash-attention, by a stand-in --------------------------------------------------------------------------------


def attend(q, k, v, causal=False, window_size=(-1, -1), softmax_scale=None, softcap=0.0):
    """What flash-attention computes, [B, T, H, d], step by step."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = ((left >= 0) & (-ahead > left)) | ((right >= 0) & (ahead > right))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.fixture
def flash(monkeypatch):
    """A flash_attn package that records the arguments of every call: [(function, causal, window_size)]."""
    import transformers.modeling_flash_attention_utils as utils

    calls: list[tuple] = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        calls.append(("fixed", causal, window_size))
        return attend(q, k, v, causal, window_size, softmax_scale, softcap)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append(("varlen", causal, window_size))
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_k
        parts = [
            attend(a[None], b[None], c[None], causal, window_size, softmax_scale, softcap)[0]
            for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
        return torch.cat(parts)

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    # The library keeps what it loaded; it must load ours now and forget it afterwards.
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(utils, name, None)
    for name in ("_flash_with_kvcache_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(utils, name, None, raising=False)
    return calls


def on_flash(name: str, among=None) -> nn.Module:
    """Built on eager, since the library looks for the package when it builds; then switched."""
    model = build(name, among=among, dtype=flash_dtype(name))
    model.config._attn_implementation = "flash_attention_2"
    return model


def flash_dtype(name: str) -> torch.dtype:
    """float32 is never flash-attention's, but exact here; the library cannot pass it from GPT-2's Conv1D layers."""
    return torch.float16 if name == "GPT-2" else torch.float32


FLASH = [name for name in DECODERS if name != "Falcon"]  # chooses its attention class when it is built


@pytest.mark.parametrize("name", FLASH)
def test_arguments_that_reach_flash_attention(name, flash):
    rows = texts()
    model = on_flash(name)
    run(model, alone(rows[0]))
    assert {call[1] for call in flash} == {True}, "the stand-in is not in the way"
    flash.clear()
    bidirectional(model)
    assert flash
    assert not any(is_causal for _, is_causal, _ in flash)
    reference = build(name, dtype=flash_dtype(name))
    bidirectional(reference)
    expected = lone(reference, rows)
    tolerance = 1e-5 if flash_dtype(name) == torch.float32 else 2e-2
    flash.clear()
    assert apart(lone(model, rows), expected) <= tolerance
    assert set(flash) == {("fixed", False, (-1, -1))}
    flash.clear()
    error = max(apart(outputs(model, rows, side), expected) for side in ("left", "right"))
    assert error <= tolerance
    assert set(flash) == {("varlen", False, (-1, -1))}
    assert len(flash) == 2 * L


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_flash_attention_in_the_recompute(name, reentrant, flash):
    model = on_flash(name)
    bidirectional(model, check=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for batch in (alone(texts()[0]), pad(texts())):
        flash.clear()
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        out = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
        assert len(flash) == L
        out.sum().backward()
        assert len(flash) == 2 * L
        assert not any(is_causal for _, is_causal, _ in flash)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_that_reach_flash_attention(name, flash):
    """One token less to each side than the other backends see; Gemma3's own mode is the same on all."""
    rows = texts((9, 9))
    for choice in ("keep", "full"):
        model = on_flash(name, WINDOWED)
        bidirectional(model, sliding_window=choice)
        flash.clear()
        got = lone(model, rows)
        side = 2 if name == "Gemma3" else 3
        windows = {window for _, _, window in flash}
        everywhere = name in ("Mistral", "Phi3")
        expected = {(side, side)} if everywhere else {(side, side), (-1, -1)}
        assert windows == (expected if choice == "keep" else {(-1, -1)})
        if choice == "full" or name == "Gemma3":
            reference = build(name, among=WINDOWED)
            bidirectional(reference, sliding_window=choice)
            assert apart(got, lone(reference, rows)) <= 1e-5


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in DECODERS if (name, "sdpa") not in REFUSED])
def test_torch_flash_attention_on_a_gpu(name):
    """Unpadded batches run on nothing but FlashAttention; then everything runs on what the library chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = build(name, "sdpa", dtype=torch.bfloat16).cuda()
    bidirectional(model)
    batch = {key: value.cuda() for key, value in alone(texts()[0]).items()}
    always_masked = name in ("Gemma3", "Falcon")  # they build a mask for unpadded batches too
    with contextlib.nullcontext() if always_masked else sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = run(model, batch)
    exact = build(name, "eager").cuda()
    bidirectional(exact)
    assert (got.float() - run(exact, batch)).norm() <= 3e-2 * run(exact, batch).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2"])
def test_compiled_and_packaged_backends_on_a_gpu(backend):
    if backend == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    with torch.compiler.set_stance("default"):
        model = build("Llama", backend, dtype=torch.bfloat16).cuda()
        bidirectional(model)
        report = check_attention(model)
        assert report.bidirectional
        assert report.backend == backend
        causal(model)
        check_attention(model, "causal")


# --- undoing, wrapping, copying ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_everything_is_restored(name):
    model = build(name)
    before = state(model)
    rows = texts()
    expected = outputs(model, rows)
    with bidirectional(model) as inside:
        assert inside is model
        assert (model.config.is_causal is False) if name != "Gemma3" else model.config.use_bidirectional_attention
        flags = [m.is_causal for m in model.modules() if "is_causal" in vars(m)]
        assert len(flags) == L
        assert not any(flags)
    assert state(model) == before
    assert apart(outputs(model, rows), expected) == 0.0
    handle = bidirectional(model, check=False)
    assert handle.model is model
    assert is_bidirectional(model)
    assert causal(model) is model
    assert state(model) == before
    causal(model)  # harmless
    assert state(model) == before


def reloaded(model: nn.Module, folder) -> nn.Module:
    """Saved as it stands, and loaded."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("again", [True, False], ids=["bidirectional again", "as loaded"])
@pytest.mark.parametrize("name", DECODERS)
def test_causal_after_a_reload_is_causal_at_the_first_call(name, again, tmp_path):
    model, rows = build(name), texts()
    expected = outputs(model, rows)
    bidirectional(model, check=False)
    model = reloaded(model, tmp_path)
    if again:
        bidirectional(model, check=False)
    assert causal(model) is model
    check_attention(model, "causal")
    assert apart(outputs(model, rows), expected) <= 1e-6


def test_windows_after_a_reload(tmp_path):
    """Gemma3's own mode halves the window once, at construction."""
    model, rows = build("Gemma3", among=WINDOWED), texts()
    windows = [m.sliding_window for m in attentions(model)]
    causal_states = outputs(model, rows)
    bidirectional(model)
    halved, expected = [m.sliding_window for m in attentions(model)], outputs(model, rows)
    model = reloaded(model, tmp_path)
    bidirectional(model)
    assert [m.sliding_window for m in attentions(model)] == halved
    assert apart(outputs(model, rows), expected) <= 1e-6
    causal(model)
    assert [m.sliding_window for m in attentions(model)] == windows
    assert apart(outputs(model, rows), causal_states) <= 1e-6


def test_a_block_on_a_model_that_was_saved_bidirectional_leaves_it_so(tmp_path):
    model = build("Llama")
    bidirectional(model, check=False)
    model = reloaded(model, tmp_path)
    with bidirectional(model):
        pass
    assert is_bidirectional(model)
    with bidirectional(model):
        causal(model)
    assert not is_bidirectional(model)


def test_an_adapter_that_plain_peft_loads_is_causal_and_measured_so(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    bidirectional(model)
    assert is_bidirectional(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("Llama"), tmp_path)
    assert not is_bidirectional(loaded)
    bidirectional(loaded)
    assert is_bidirectional(loaded)


def test_a_model_on_meta():
    with torch.device("meta"):
        model = transformers.LlamaModel(build("Llama").config)
    for test in (bidirectional, check_attention, is_bidirectional):
        with pytest.raises(ValueError, match="LlamaModel is on the meta device, so nothing can be tried on it"):
            test(model)
    assert "is_causal" not in vars(model.config)
    bidirectional(model, check=False)
    model.to_empty(device="cpu").load_state_dict(build("Llama").state_dict())
    model.rotary_emb = build("Llama").rotary_emb
    assert check_attention(model).bidirectional


def test_windows_that_differ_by_layer():
    """The config then refuses to name one window, and the library has no causal model that runs so."""
    windows = {0: {"sliding_window": 9}, 1: {"sliding_window": 4}, 2: {"sliding_window": None}}
    config = transformers.MistralConfig(**models.HEAD, per_layer_config=windows)
    assert window_of(config) == 4
    with pytest.raises(ValueError, match="windows of mistral differ by layer; they can only be kept"):
        bidirectional(transformers.MistralModel(config), sliding_window="full")


def test_an_error_inside_the_block_undoes_too():
    model = build("Llama")
    with pytest.raises(KeyError), bidirectional(model):
        raise KeyError
    assert not is_bidirectional(model)


def test_a_second_call_checks_again_and_does_not_own_the_patch():
    model = build("Qwen3", among=WINDOWED)
    with bidirectional(model):
        with bidirectional(model):
            pass
        assert is_bidirectional(model)
        with pytest.raises(ValueError, match=r"already, with sliding_window='keep'.*causal\(model\)"):
            bidirectional(model, sliding_window="full")
        find_layers(model)[1][1].self_attn.is_causal = True
        model.config.is_causal = True
        with pytest.raises(AttentionCheckError):
            bidirectional(model)
    assert not is_bidirectional(model)


def test_only_this_instance_changes():
    one, other = build("Llama"), build("Llama")
    bidirectional(one)
    assert not is_bidirectional(other)
    assert not is_bidirectional(build("Llama"))
    assert is_bidirectional(one)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle])
def test_copies_are_patched_on_their_own(how):
    model, rows = build("GPT-2"), texts()
    bidirectional(model)
    other = how(model)
    assert apart(outputs(other, rows, "left"), lone(model, rows)) <= 1e-5
    causal(other)
    assert "is_causal" not in vars(other.config)
    assert not is_bidirectional(other)
    assert is_bidirectional(model)


def test_the_signature_stays():
    model = build("Llama")
    before = inspect.signature(model.forward)
    bidirectional(model)
    assert inspect.signature(model.forward) == before


def test_models_with_a_head():
    transformers.logging.set_verbosity_error()
    model = build("Llama", head="ForCausalLM")
    bidirectional(model)
    batch = pad(texts())
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 8] = 5
    assert (model(**batch).logits - model(**changed).logits)[0, 0].abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"past_key_values were passed to a bidirectional LlamaModel.*causal\(model\)"):
        model.generate(batch["input_ids"][:1], max_new_tokens=2)


def test_no_cache_is_kept_or_taken():
    model = build("Llama", use_cache=True)
    batch = alone(texts()[0])
    assert model(**batch).past_key_values is not None
    bidirectional(model)
    assert model(**batch).past_key_values is None
    assert model(**batch, use_cache=True).past_key_values is None
    assert model(batch["input_ids"], batch["attention_mask"]).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values"):
        model(**batch, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="past_key_values"):
        model(batch["input_ids"], batch["attention_mask"], None, transformers.DynamicCache())
    causal(model)
    assert model(**batch).past_key_values is not None


def test_gpt2_positions_given_by_hand_are_kept():
    model, rows = build("GPT-2"), texts()
    bidirectional(model)
    batch = pad(rows, "left")
    late = run(model, batch, position_ids=torch.arange(9).expand(3, 9) + 1)
    assert (late - run(model, batch)).abs().max() > 1e-2


def test_peft(tmp_path):
    peft = pytest.importorskip("peft")
    rows = texts()
    base = build("Llama")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.eval()
    with bidirectional(model):
        assert is_bidirectional(model)
        assert is_bidirectional(base)
        expected = lone(model, rows)
        assert apart(outputs(model, rows, "left"), expected) <= 1e-5
        model.save_pretrained(tmp_path)
    assert not is_bidirectional(model)
    again = peft.PeftModel.from_pretrained(build("Llama"), tmp_path).eval()
    assert not is_bidirectional(again), "the adapter's save came to hold the base's config: say so in the docs"
    bidirectional(again)
    assert apart(lone(again, rows), expected) <= 1e-5


def test_a_sentence_transformer(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    words = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    build("Llama").save_pretrained(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w3")
    tokenizer.save_pretrained(tmp_path)
    inner = Transformer(str(tmp_path))
    model = st.SentenceTransformer(modules=[inner, Pooling(D, pooling_mode="mean")], device="cpu")
    sentences = ["w4 w5 w6 w7 w8", "w9 w10"]
    before = model.encode(sentences)
    with bidirectional(model):
        assert is_bidirectional(model)
        padded = model.encode(sentences)
        each = [model.encode(sentence) for sentence in sentences]
        assert abs(padded - each).max() <= 1e-5
        assert abs(padded - before).max() > 1e-3
    assert abs(model.encode(sentences) - before).max() <= 1e-6


def test_taps_above_and_below():
    model, rows = build("Llama"), texts()
    bidirectional(model)
    batch = pad(rows)
    expected = model(**batch, output_hidden_states=True).hidden_states[-1][0, 8]
    with Taps(model) as taps:
        model(**batch)
        assert is_bidirectional(model)  # looked at between a forward and its take
        assert torch.equal(taps.take()[0, -1], expected)
    causal(model)
    with Taps(model) as taps:
        bidirectional(model)
        model(**batch)
        assert torch.equal(taps.take()[0, -1], expected)
        causal(model)
    assert "forward" not in vars(model)
    bidirectional(model)
    taps = Taps(model)
    causal(model)  # out of order: what is left beneath the taps does nothing
    assert model(**batch, use_cache=True).past_key_values is not None
    taps.detach()
    assert not is_bidirectional(model)


def test_compiled():
    model, rows = build("GPT-2", "sdpa"), texts()
    bidirectional(model)
    batch = pad(rows, "left")
    with torch.compiler.set_stance("default"):
        got = run(torch.compile(model, backend="eager"), batch)
    assert (got - run(model, batch)).abs().max() <= 1e-5


# --- encoders and refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_encoders_are_left_as_they_are(name, backend, caplog):
    model = build(name, backend)
    before = state(model)
    from mlpool.pooling.base import log_once

    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "mlpool"):
        with bidirectional(model):
            assert state(model) == before
        bidirectional(model)
    # transformers warns of tiny configs in the same log, once a process
    said = [record.getMessage() for record in caplog.records if record.name == "mlpool"]
    assert len(said) == 1
    assert "reads both directions by itself: nothing is changed" in said[0]
    assert is_bidirectional(model)
    assert check_attention(model).bidirectional
    with pytest.raises(ValueError, match=r"is an encoder.*no causal form"):
        causal(model)


def test_alibi_is_said():
    from mlpool.pooling.base import log_once

    log_once.cache_clear()
    log = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("mlpool").addHandler(handler)
    try:
        for backend in ("eager", "sdpa"):
            model, rows = build("Falcon", backend, alibi=True), texts()
            bidirectional(model)
            assert apart(outputs(model, rows, "left"), lone(model, rows)) <= 1e-5
    finally:
        logging.getLogger("mlpool").removeHandler(handler)
    assert len(log) == 1
    assert "ALiBi" in log[0]


LLAMA4 = {**models.HEAD, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 4}


def test_families_that_cannot():
    model = transformers.Llama4TextModel(transformers.Llama4TextConfig(**LLAMA4)).eval()
    before = state(model)
    with pytest.raises(ValueError, match=r"llama4_text cannot be made bidirectional: .*chunk"):
        bidirectional(model)
    assert state(model) == before
    sizes = {"vocab_size": V, "hidden_size": D, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    neo = transformers.GPTNeoConfig(**sizes, attention_types=[[["global"], 2]], max_position_embeddings=64)
    with pytest.raises(ValueError, match="gpt_neo cannot be made bidirectional"):
        bidirectional(transformers.GPTNeoModel(neo))


def test_an_unknown_family_is_tried_and_undone():
    config = transformers.MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2, state_size=4)
    model = transformers.MambaModel(config).eval()
    before = state(model)
    with pytest.raises(AttentionCheckError, match=r"mamba on .*layers 0, 1 the first token does not answer"):
        bidirectional(model)
    assert state(model) == before
    torch.manual_seed(0)
    cohere = transformers.Cohere2Model(transformers.Cohere2Config(**models.HEAD, sliding_window=40)).eval()
    bidirectional(cohere)
    assert is_bidirectional(cohere)


def test_encoder_decoders():
    config = transformers.T5Config(vocab_size=V, d_model=D, num_layers=2, num_heads=2, d_kv=16, d_ff=48)
    for refuse in (bidirectional, causal, is_bidirectional, check_attention):
        with pytest.raises(ValueError, match="encoder-decoder"):
            refuse(transformers.T5Model(config))
    bidirectional(transformers.T5EncoderModel(config).eval())  # an encoder


def test_unknown_backends():
    for name in ("paged|sdpa", "my_attention"):
        model = build("Llama")
        model.config._attn_implementation = name
        with pytest.raises(ValueError, match=r"unknown attention backend .*eager, sdpa, flex_attention"):
            bidirectional(model)


def test_backends_that_a_family_cannot_use():
    model = build("Gemma2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"gemma2 cannot run on sdpa: .*soft-cap.*attn_implementation='eager'"):
        bidirectional(model)
    model = build("Gemma2", attn_logit_softcapping=None)
    model.config._attn_implementation = "sdpa"
    bidirectional(model)
    for backend in ("flex_attention", "mlpool_packed"):
        model = build("Falcon")
        model.config._attn_implementation = backend
        with pytest.raises(ValueError, match=f"falcon cannot run on {backend}: .*registry"):
            bidirectional(model)


def test_bad_arguments(monkeypatch):
    model = build("Llama")
    with pytest.raises(ValueError, match=r"sliding_window must be one of \('keep', 'full'\), got 'half'"):
        bidirectional(model, sliding_window="half")
    with pytest.raises(ValueError, match="no list of layers"):
        bidirectional(nn.Linear(2, 2))
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.2")
    for call in (bidirectional, causal):
        with pytest.raises(ImportError, match=r"transformers 5\.16\.2 is too old.*5\.17.*mlpool\[st\]"):
            call(model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'mlpool\[st\]'"):
        bidirectional(model)


def test_multimodal_models_are_refused():
    text = {**DECODERS["Gemma3"][1]}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 14, "patch_size": 14})
    model = transformers.Gemma3Model(config).eval()
    with pytest.raises(ValueError, match=r"multimodal.*Gemma3TextModel"):
        bidirectional(model)
    bidirectional(model.language_model)
