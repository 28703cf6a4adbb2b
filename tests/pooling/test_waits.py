"""How often the host waits for the device: once a forward, for all checks together, however the batch is given.

Counted on the CPU by what a wait is on a GPU: a value, or a shape that depends on values, asked of a tensor.
"""

import pytest
import torch
from conftest import last, make_mask, make_states, multi, use
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlpool import LayerWeightsPool, MeanPool
from mlpool.attention import pack
from mlpool.attention.packed import Packing
from mlpool.pooling import gather
from mlpool.pooling.tokens import note_offsets, select_tokens
from mlpool.taps import Taps

B, T, D, L = 3, 5, 16, 4
STATES, MASK = make_states(L, (B, T, D)), make_mask(B, T)
PACKED = [s[MASK.bool()] for s in STATES]
OFFSETS = torch.nn.functional.pad(MASK.sum(1).cumsum(0), (1, 0)).int()


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Where no pool looks at the size of its input: on a CPU that costs next to nothing."""
    for place in ("multi_layer", "last_layer", "mix"):
        monkeypatch.setattr(f"mlpool.pooling.{place}.check_range", lambda *_: None)


class Waits(TorchDispatchMode):
    """`count` of the waits while it is entered."""

    def __enter__(self):
        self.count, self.functions = 0, _Functions(self)
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self.functions.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for a in args
            if isinstance(a, list | tuple)
            for i in a
        )
        self.count += masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
        # Without `output_size` its result's size is read from the device.
        self.count += name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """What never reaches the dispatcher on the CPU."""

    def __init__(self, waits):
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.waits.count += getattr(func, "__name__", "") in ("tolist", "numpy", "cpu")
        return func(*args, **(kwargs or {}))


def waits(run) -> int:
    with Waits() as counted:
        run()
    return counted.count


def test_waits_are_counted():
    x = torch.tensor([1, 0, 2])
    for run in (x[0].item, x.tolist, x.nonzero, lambda: bool(x.any()), lambda: x[x > 0], lambda: int(x.max())):
        assert waits(run) == 1
    assert waits(lambda: x.cumsum(0).float().mean()) == 0


GIVEN = {
    "integers": (STATES, {"attention_mask": MASK}),
    "floats": (STATES, {"attention_mask": MASK.float()}),
    "two masks of floats": (STATES, {"attention_mask": MASK.float(), "token_mask": MASK.float()}),
    "packed": (PACKED, {"cu_seqlens": OFFSETS}),
    "packed and a mask of floats": (PACKED, {"cu_seqlens": OFFSETS, "token_mask": torch.ones(len(PACKED[0]))}),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("how", ["last", "mean"])
def test_pools_wait_once(how, given):
    states, where = GIVEN[given]
    mask = {"attention_mask": where.get("attention_mask"), **where}
    pools = (multi(D, L, token_pooling=how), LayerWeightsPool(D, L, token_pooling=how))
    for pool in pools:
        assert waits(lambda pool=pool: pool(states, includes_embedding=False, **mask)) == 1
    for pool in (last(D, token_pooling=how), MeanPool(D)):
        assert waits(lambda pool=pool: pool(states[-1], **mask)) == 1
    assert waits(lambda: gather(states, token_pooling=how, **mask)) == 1


def test_gradients_wait_for_nothing():
    for how in ("last", "mean"):
        states = [s.clone().requires_grad_() for s in STATES]
        out = use(multi(D, L, token_pooling=how), states, MASK)
        assert waits(lambda out=out: out.sum().backward()) == 0


def test_offsets_whose_values_are_known():
    """Noted values are taken without a wait, until somebody changes the offsets; and they are checked all the same."""
    offsets = OFFSETS.clone()
    note_offsets(offsets, offsets.tolist())
    assert waits(lambda: gather(PACKED, cu_seqlens=offsets)) == 0
    offsets[1] += 1
    assert waits(lambda: gather(PACKED, cu_seqlens=offsets)) == 1
    note_offsets(offsets, offsets.tolist())
    with pytest.raises(ValueError, match="there are 2 packed rows"):
        gather([s[:2] for s in PACKED], cu_seqlens=offsets)


@pytest.fixture(scope="module")
def model():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=D, num_hidden_layers=L, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24,
    )  # fmt: skip
    return transformers.LlamaModel(config).eval()


@pytest.mark.parametrize("mask", [MASK, MASK.float()], ids=["integers", "floats"])
@pytest.mark.parametrize("how", ["last", "mean"])
def test_packing_taps_and_pool_wait_once(model, how, mask, monkeypatch):
    """Packing reads the lengths; the taps of every layer and the pool behind them ask for nothing more."""
    pack(model)
    counts = {"pack": [], "select": []}

    def counted(name, function):
        def run(*args, **options):
            with Waits() as seen:
                result = function(*args, **options)
            counts[name].append(seen.count)
            return result

        return run

    monkeypatch.setattr(Packing, "_pack", counted("pack", Packing._pack))
    monkeypatch.setattr("mlpool.taps.select_tokens", counted("select", select_tokens))
    pool = multi(D, L, token_pooling=how)
    with torch.inference_mode(), Taps(model, how) as taps:
        model(input_ids=torch.ones(B, T, dtype=torch.long), attention_mask=mask)
        assert waits(lambda: pool(layer_states=taps.take())) == 0
    assert counts == {"pack": [1], "select": [0]}
