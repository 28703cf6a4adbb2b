"""The kernels as `kernels.get_local_kernel` loads them: each public op and layer against plain torch.

    pytest tests/test_hub.py                        in a folder that kernels/hub.py wrote, on whatever device is there

Against float64 at most twice the error of plain torch in the same dtype, of gradients three times. A tenth of what the
dtype resolves is no error.
"""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

FOLDER = Path(os.environ.get("MLPOOL_KERNELS_HUB", Path(__file__).resolve().parents[1]))
hub = kernels.get_local_kernel(FOLDER)
reference = importlib.import_module(f"{hub.__name__}.reference")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
B, T, L, D, R, H, HEAD = 5, 11, 3, 32, 6, 2, 8
LENGTHS = (11, 7, 1, 4, 9)


def parameters(seed=0):
    """Of a pool, none of them zero, in float64."""
    torch.manual_seed(seed)
    shapes = {
        "latents": (R, D), "key_norm_weight": (D,), "key_norm_bias": (D,), "latent_norm_weight": (D,),
        "latent_norm_bias": (D,), "query_weight": (H * HEAD, D), "key_weight": (H * HEAD, D),
        "value_weight": (H * HEAD, D), "output_weight": (D, H * HEAD), "ff_norm_weight": (D,), "ff_norm_bias": (D,),
        "ff_in_weight": (8 * D, D), "ff_in_bias": (8 * D,), "ff_out_weight": (D, 4 * D), "ff_out_bias": (D,),
    }  # fmt: skip
    return {name: torch.randn(shape, dtype=torch.float64) * shape[-1] ** -0.5 for name, shape in shapes.items()}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def mask():
    return (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()


def same(ours, plain, inputs, dtype):
    """Values and gradients of both, of the inputs rounded to `dtype`, against plain torch in float64."""
    torch.manual_seed(1)
    rounded = {name: value.to(DEVICE, dtype) if value.is_floating_point() else value.to(DEVICE)
               for name, value in inputs.items()}  # fmt: skip
    found = {}
    weights = None
    for name, function, kind in (("truth", plain, torch.float64), ("plain", plain, dtype), ("ours", ours, dtype)):
        leaves = {key: value.detach().to(kind).requires_grad_() if value.is_floating_point() else value
                  for key, value in rounded.items()}  # fmt: skip
        out = function(**leaves)
        weights = torch.randn(out.shape, dtype=torch.float64, device=DEVICE) if weights is None else weights
        (out.double() * weights).sum().backward()
        grads = {key: leaf.grad for key, leaf in leaves.items() if leaf.is_floating_point()}
        found[name] = {"out": out.detach(), **grads}
    for key, truth in found["truth"].items():
        assert truth is not None, key
        got = [found[name][key].double() for name in ("plain", "ours")]
        plain_error, our_error = ((value - truth).norm() / truth.norm() for value in got)
        least = torch.finfo(dtype).eps / 10
        assert our_error <= max((2 if key == "out" else 3) * plain_error, least), (key, our_error, plain_error)


def tokens():
    """Where each text lies, as `gather` is told."""
    keep = mask().bool()
    starts = torch.arange(B) * T
    count = keep.sum(1)
    return [t.to(DEVICE) for t in (starts, starts + T, starts + count - 1, count, keep.flatten())]


# --- the ops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["last", "mean", "unit_mean"])
def test_gather(how, dtype):
    def ours(**states):
        return hub.gather(list(states.values()), *tokens(), how != "last", unit=how == "unit_mean")

    def plain(**states):
        return reference.gather(list(states.values()), mask().to(DEVICE), how)

    torch.manual_seed(0)
    same(ours, plain, {f"layer{i}": random(B, T, D) for i in range(L)}, dtype)


def cross(states, keep=None, **p):
    return reference.cross_attention(states, p, H, keep)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", ["plain", "absorbed"])
@pytest.mark.parametrize("values", ["early", "late", "absorbed"])
def test_pool_in_every_form(keys, values, dtype):
    """fold_queries, fold_values, pool with cross_attend and embed behind it: what a pool's forward is made of."""

    def ours(states, **p):
        plan = hub.Plan(keys=keys, values=values, memory="save")
        key, value, output = p["key_weight"], p["value_weight"], p["output_weight"]
        folded = key if keys == "absorbed" else None
        queries = hub.fold_queries(
            p["latents"], p["latent_norm_weight"], p["latent_norm_bias"], p["query_weight"], folded, H
        )
        if values == "absorbed":
            value, output = hub.fold_values(value, output, H), None
        weights = hub.Weights(
            p["layer_weights"], p["key_norm_weight"], p["key_norm_bias"], queries, None if keys == "absorbed" else key,
            value, output, p["latents"], p["ff_norm_weight"], p["ff_norm_bias"], p["ff_in_weight"], p["ff_in_bias"],
        )  # fmt: skip
        return hub.pool([states], None, None, weights, p["ff_out_weight"], p["ff_out_bias"], H, plan)[0]

    same(ours, cross, {"states": random(B, L, D), "layer_weights": random(L, D), **parameters()}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(dtype):
    def ours(product, bias, y_mean, base, gate):
        return hub.embed(product, bias, y_mean.to(torch.promote_types(y_mean.dtype, torch.float32)), base, gate, True,
                         product.dtype)  # fmt: skip

    def plain(product, bias, y_mean, base, gate):
        return F.normalize(base + gate * (product + bias + y_mean), dim=-1)

    shapes = {"product": (B, D), "bias": (D,), "y_mean": (B, D), "base": (B, D), "gate": (D,)}
    same(ours, plain, {name: random(*shape) for name, shape in shapes.items()}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contrast(dtype):
    """Documents 2 and 7 are the same text, which is a false negative of row 2; with prefixes of the vectors."""
    dims, partners = [8, D], torch.arange(B)
    texts = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2, 8])
    other_keys = torch.stack([texts + 100, torch.cat([torch.arange(B), texts[B:] + 100])], 1)
    row_keys = torch.stack([torch.arange(B), texts[:B] + 100], 1)

    def ours(rows, others):
        return hub.contrast(
            rows, others, partners.to(DEVICE), temperature=0.2, dims=dims, row_keys=row_keys.to(DEVICE),
            other_keys=other_keys.to(DEVICE),
        )  # fmt: skip

    def plain(rows, others):
        hidden = torch.zeros(B, len(others), dtype=torch.bool, device=DEVICE)
        hidden[2, 7] = True
        losses = []
        for d in dims:
            scores = F.normalize(rows[:, :d], dim=-1) @ F.normalize(others[:, :d], dim=-1).T / 0.2
            scores = scores.masked_fill(hidden, float("-inf"))
            losses.append(F.cross_entropy(scores, partners.to(DEVICE), reduction="none"))
        return torch.stack(losses)

    torch.manual_seed(0)
    same(ours, plain, {"rows": random(B, D), "others": random(len(texts), D)}, dtype)


def test_choose_takes_the_plan_of_which_predict_says_the_least():
    sizes = hub.Sizes(batch=8, keys=25, hidden=896, latents=768, heads=32, head_dim=2048, width=3584)
    module = importlib.import_module(f"{hub.__name__}.plan")
    rates = module.default_rates("cpu", 4)
    options = {"training": False, "cached": True, "triton": False, "itemsize": 4, "memory_bytes": 8 << 30}
    plan = hub.choose(sizes, **options, rates=rates)
    others = [module.Plan(keys=k, values=v, memory="recompute") for k in module.KEYS for v in module.VALUES]
    took = {p: sum(hub.predict(sizes, p, rates, itemsize=4).values()) for p in (plan, *others)}
    assert min(took.values()) > 0
    assert took[plan] <= min(took.values()) / module.GAIN


# --- the layers -------------------------------------------------------------------------------------------------------


@use_kernel_forward_from_hub("CrossAttentionPool")
class PlainPool(nn.Module):
    """As a model has it: its own parameters, plain torch."""

    def __init__(self, values):
        super().__init__()
        self.num_heads = H
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, states, key_mask=None):
        return reference.cross_attention(states, dict(self.named_parameters()), self.num_heads, key_mask)[0]


@use_kernel_forward_from_hub("MaskedMean")
class PlainMean(nn.Module):
    def forward(self, hidden_states, attention_mask):
        weights = attention_mask[..., None].to(hidden_states.dtype)
        return (hidden_states * weights).sum(1) / weights.sum(1)


def kernelized(module):
    """The module with the forward of the layer of its name; raises where there is none for this device."""
    name = type(module).kernel_layer_name
    with use_kernel_mapping({name: {DEVICE: LocalLayerRepository(FOLDER, layer_name=name)}}, inherit_mapping=False):
        return kernelize(module, mode=Mode.TRAINING, device=DEVICE, use_fallback=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keys", "masked"), [(L, False), (L, True), (1, False)])
def test_a_kernelized_pool(keys, masked, dtype):
    keep = (torch.arange(keys) < torch.tensor([1, 2, 3, 2, 1])[:, None]).to(DEVICE) if masked else None
    given = {"states": random(B, keys, D), **parameters()}
    # Of one key the attention is 1 whatever the queries are: they have no gradient to compare.
    unread = ("query_weight", "key_weight", "latent_norm_weight", "latent_norm_bias") if keys == 1 else ()
    fixed = {name: given.pop(name) for name in unread}

    def run(make):
        def call(states, **p):
            p |= {name: value.to(states) for name, value in fixed.items()}
            return torch.func.functional_call(make(PlainPool(p)), p, (states, keep))

        return call

    assert kernelized(PlainPool(given | fixed)).forward.__func__ is hub.layers.CrossAttentionPool.forward
    same(run(kernelized), run(lambda pool: pool), given, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernelized_mean(dtype):
    pool = kernelized(PlainMean())
    assert pool.forward.__func__ is hub.layers.MaskedMean.forward
    torch.manual_seed(0)
    plain = PlainMean()
    keep = mask().to(DEVICE)
    same(lambda states: pool(states, keep), lambda states: plain(states, keep), {"states": random(B, T, D)}, dtype)


def test_padding_is_not_read():
    pool, keep = kernelized(PlainMean()), mask().to(DEVICE)
    states = torch.randn(B, T, D, device=DEVICE)
    before = pool(states, keep)
    states[keep == 0] = float("nan")
    assert torch.equal(pool(states, keep), before)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_digests_are_those_of_the_files():
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    for variant in sorted((FOLDER / "build").iterdir()):
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        assert metadata.name.python_name == "mlpool_kernels"


def test_ops_have_a_name_of_their_own():
    """So that this and another version, or the package itself, live in one process."""
    (variant,) = (v for v in (FOLDER / "build").iterdir() if Path(hub.__file__).is_relative_to(v.resolve()))
    identity = json.loads((variant / "metadata.json").read_text())["id"]
    assert hub.__name__ == identity
    assert {"pool", "gather", "contrast"} <= set(dir(getattr(torch.ops, identity)))
    assert "pool" not in dir(torch.ops.mlpool)


def test_the_card_names_every_public_name():
    card = (FOLDER / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\n")
    assert [name for name in hub.__all__ if name not in card] == []
