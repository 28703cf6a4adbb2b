"""The folded queries and values that evaluation keeps: never stale, whatever changed the weights."""

import copy
import io
import pickle

import pytest
import torch
from conftest import last, make_mask, make_states, multi, randomise, use
from mlpool_kernels import Plan, Rates, reference

from mlpool import LastLayerPool, MultiLayerPool
from mlpool.pooling import folding

D, L = 16, 4
FORMS = [{"keys": k, "values": v} for k in ("absorbed", "plain") for v in ("absorbed", "early")]
KINDS = [pytest.param(multi, id="multi"), pytest.param(last, id="last")]
EVALUATIONS = [torch.no_grad, torch.inference_mode]


class Fixture:
    """A pool whose cache is filled, and what it must now give: the equations with its present weights."""

    def __init__(self, kind, target, choices=None, evaluation=torch.no_grad):
        self.pool = kind(D, target=target, choices=choices or FORMS[0]).eval()
        self.states = make_states(L, (3, 5, D), target)
        self.mask, self.evaluation = make_mask(3, 5).to(target.device), evaluation
        self.check()
        assert self.pool._cache is not None

    def embed(self):
        with self.evaluation():
            return use(self.pool, self.states, self.mask)

    def want(self):
        pool = self.pool
        parameters = {name: p.detach().float() for name, p in pool.named_parameters()}
        with torch.no_grad():
            if isinstance(pool, MultiLayerPool):
                return reference.multi_layer_pool(self.states, self.mask, parameters, 2, pool.token_pooling)
            return reference.last_layer_pool(self.states[-1], self.mask, parameters, 2, pool.token_pooling)

    def check(self, **tolerance):
        """Twice: what a first call stored must serve the second."""
        for _ in range(2):
            torch.testing.assert_close(self.embed().float(), self.want(), **{"atol": 1e-5, "rtol": 1e-4, **tolerance})

    def changes(self, change, **tolerance):
        before = self.embed().clone()
        change(self.pool)
        assert (self.embed().float() - before.float()).abs().max() > 1e-3
        self.check(**tolerance)


@pytest.fixture(params=[(k, f, e) for k in (multi, last) for f in FORMS for e in EVALUATIONS],
                ids=lambda p: f"{p[0].__name__}-{'-'.join(p[1].values())}-{p[2].__name__}")  # fmt: skip
def filled(request, target):
    kind, choices, evaluation = request.param
    return Fixture(kind, target, choices, evaluation)


OPTIMISERS = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
    # torch has a fused one for CPUs alone
    "Adagrad": lambda p: torch.optim.Adagrad(p := list(p), lr=0.1, fused=p[0].device.type == "cpu"),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("kind", KINDS)
def test_optimiser_step(kind, optimiser, target):
    """Fused optimisers do not raise a weight's version; also where the pool stays in eval mode all the while."""
    filled = Fixture(kind, target)
    optimiser = OPTIMISERS[optimiser](filled.pool.parameters())

    def step(pool, train=True):
        pool.train(train)
        (use(pool, filled.states, filled.mask) * torch.arange(D, device=target.device)).sum().backward()
        pool.eval()
        filled.embed()
        optimiser.step()

    filled.changes(step)
    filled.changes(lambda pool: step(pool, train=False))


@pytest.mark.parametrize("write", ["in place", "replaced"])
@pytest.mark.parametrize("flip", ["train then eval", "eval"])
def test_data_writes(filled, write, flip):
    """`.data` bumps no version: a train()/eval() flip drops the cache, be it eval() in eval mode."""

    def change(pool):
        for p in pool.parameters():
            if write == "in place":
                p.data.mul_(0.5).add_(0.1)
            else:
                p.data = 0.5 * p.data + 0.1
        (pool.train() if flip == "train then eval" else pool).eval()

    filled.changes(change)


def test_in_place_without_gradients(filled):
    def write(pool):
        with torch.no_grad():
            for p in (pool.query_weight, pool.value_weight):
                p.add_(0.5 * torch.randn_like(p))

    filled.changes(write)


FOLDED = ["latents", "latent_norm_bias", *(f"{n}_weight" for n in ("latent_norm", "query", "key", "value", "output"))]


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_that_is_folded(kind, name, target):
    for choices in FORMS:
        filled = Fixture(kind, target, choices)
        with torch.no_grad():
            getattr(filled.pool, name).add_(torch.randn_like(getattr(filled.pool, name)))
        filled.check()


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(filled, assign):
    other = randomise(copy.deepcopy(filled.pool), seed=5)
    filled.changes(lambda pool: pool.load_state_dict(other.state_dict(), assign=assign))


def test_load_through_a_parent(target):
    filled = Fixture(multi, target)
    parent = torch.nn.Sequential(filled.pool)
    state = {name: t + 0.3 for name, t in parent.state_dict().items()}
    filled.changes(lambda pool: parent.load_state_dict(state))


def test_new_parameter_object(filled):
    def replace(pool):
        pool.query_weight = torch.nn.Parameter(pool.query_weight.detach() * 3)
        pool.value_weight = torch.nn.Parameter(pool.value_weight.detach() * -1)

    filled.changes(replace)


def test_change_of_dtype(filled):
    filled.pool.bfloat16()
    filled.states = [s.bfloat16() for s in filled.states]
    assert filled.embed().dtype == torch.bfloat16
    filled.states = [s.float() for s in filled.states]
    filled.pool.float()
    filled.check()


def test_autocast_and_back(filled, target):
    with torch.autocast(target.device, torch.bfloat16):
        low = filled.embed()
    torch.testing.assert_close(low.float(), filled.want(), atol=0.05, rtol=0)
    filled.check()


@pytest.mark.parametrize("kind", KINDS)
def test_built_under_inference_mode_used_under_no_grad(kind, target):
    """What inference_mode stored serves no_grad and a training step afterwards."""
    filled = Fixture(kind, target, evaluation=torch.inference_mode)
    cached = filled.pool._cache
    assert not any(t is not None and t.is_inference() for t in cached[1])
    filled.evaluation = torch.no_grad
    filled.check()
    assert filled.pool._cache is cached
    filled.pool.train()
    use(filled.pool, filled.states, filled.mask).sum().backward()
    filled.pool.eval()
    filled.check()


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_made_under_inference_mode(kind, target):
    """They have no version; the pool still works."""
    with torch.inference_mode():
        filled = Fixture(kind, target, evaluation=torch.inference_mode)
    filled.check()


def test_only_evaluation_caches(filled):
    """Neither in training mode, nor where gradients are on."""
    use(filled.pool, filled.states, filled.mask)
    assert filled.pool._cache is None
    filled.pool.train()
    filled.embed()
    assert filled.pool._cache is None


def test_the_cache_is_used(filled, monkeypatch):
    monkeypatch.setattr(type(filled.pool), "_fold", None)
    filled.embed()


@pytest.mark.parametrize("kind", KINDS)
def test_one_key_and_many(kind, target):
    """A batch of one-token texts needs no queries; the next batch does."""
    filled = Fixture(kind, target)
    states, mask = filled.states, filled.mask
    filled.states, filled.mask = [s[:, :1] for s in states], mask[:, :1]
    filled.check()
    filled.states, filled.mask = states, mask
    filled.check()


# --- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p)), "torch.save"])
def test_copies(filled, copier):
    """Equal, and without the original's cache; deep ones share no weight."""
    if copier == "torch.save":
        file = io.BytesIO()
        torch.save(filled.pool, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copier(filled.pool)
    assert other._cache is None
    assert other.config() == filled.pool.config()
    want = filled.embed().clone()
    if copier is not copy.copy:
        randomise(filled.pool, 3)
    filled.pool = other
    assert torch.equal(filled.embed(), want)


# --- fold ----------------------------------------------------------------------------------------------------------


def test_fold(filled):
    """The same embeddings and attention weights; nothing shared with the original, nothing trainable."""
    pool, want = filled.pool, filled.embed().clone()
    folded = pool.fold()
    assert folded.folded
    assert not folded.training
    assert folded.query_weight is None
    assert folded.key_weight is None
    assert not any(p.requires_grad for p in folded.parameters())
    mine = {t.data_ptr() for t in folded.state_dict().values()}
    assert mine.isdisjoint(t.data_ptr() for t in pool.state_dict().values())
    for evaluation in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with evaluation():
            torch.testing.assert_close(use(folded, filled.states, filled.mask), want, atol=1e-6, rtol=0)
    attention = use(pool, filled.states, filled.mask, output_attentions=True)[1]
    torch.testing.assert_close(
        use(folded, filled.states, filled.mask, output_attentions=True)[1], attention, atol=1e-6, rtol=0
    )
    randomise(pool, 9)
    for again in (folded, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), folded.train()):
        with torch.no_grad():
            torch.testing.assert_close(use(again, filled.states, filled.mask), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("token_pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_fold_of_every_kind(kind, token_pooling, residual, target):
    pool = kind(D, target=target, token_pooling=token_pooling, residual=residual, choices={})
    states, mask = make_states(L, (3, 5, D), target), make_mask(3, 5).to(target.device)
    for values in ("early", "absorbed", "late"):
        pool.choices = {"values": values}
        torch.testing.assert_close(use(pool.fold(), states, mask), use(pool, states, mask).detach(), atol=1e-6, rtol=0)


def test_fold_of_the_released_sizes_is_smaller():
    pool = MultiLayerPool.paper(64, 4, num_latents=24, num_heads=4, head_dim=512, choices={"values": "early"})
    folded = pool.fold()
    assert folded.folded_queries.shape == (4 * 24, 64)
    fewer = pool.query_weight.numel() + pool.key_weight.numel() - folded.folded_queries.numel()
    assert sum(t.numel() for t in pool.parameters()) - sum(t.numel() for t in folded.state_dict().values()) == fewer


# --- plan() --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [MultiLayerPool(896, 24), LastLayerPool(896), LastLayerPool(896, token_pooling="last"),
                                  multi(D, L).fold()], ids=str)  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_plan_table(pool, training):
    """The printed sums are the sums of the rows, which are the cost model's and the reference's."""
    report = pool.plan(8, tokens=100, training=training)
    text = str(report)
    here, reference_sum = (sum(row[i] for row in report.rows) for i in (2, 3))
    assert f"{here / 1e9:>12.3f}{reference_sum / 1e9:>12.3f}" in text
    assert f"{reference_sum / here:.1f}x fewer" in text
    assert isinstance(report.plan, Plan)
    assert f"memory={report.plan.memory}" in text
    assert "B=8" in text
    assert ("training" if training else "inference") in text
    if not training:
        assert (report.plan.memory, report.saved_bytes) == ("recompute", 0)
    n = pool._plan_keys(100)
    inner, hidden, latents = pool.num_heads * pool.head_dim, pool.hidden_size, pool.num_latents
    flops = 2 * (2 * latents * hidden * inner + 2 * n * hidden * inner + 2 * latents * n * inner)
    assert reference_sum == flops + 2 * 3 * latents * hidden * pool.ff_mult * hidden


def test_plan_predicts_by_the_rates(monkeypatch):
    """Default rates are called so; fitted ones are named, predict, and choose."""
    pool = MultiLayerPool(64, 4)
    report = pool.plan(8)
    assert "rates: default" in str(report)
    assert f"{sum(report.seconds) * 1e3:>12.3f}" in str(report)
    assert pool.plan(16, training=True).seconds > report.seconds
    # A device of endless memory bandwidth and FLOP that counts its launches, and one that counts FLOP alone.
    for launch, product, values in ((1.0, 1e30, "absorbed"), (1e-30, 1.0, "early")):
        rates = Rates(product, 1e30, 1e30, 1e30, 1e30, 1e30, launch, "fitted for a test")
        monkeypatch.setattr(folding, "fitted_rates", lambda device, r=rates: {torch.float32: r})
        report = MultiLayerPool(256, 4).plan(8)
        assert report.plan.values == values
        assert (report.rates, "rates: fitted for a test" in str(report)) == (rates, True)


def test_plan_follows_the_overrides():
    for memory in ("save", "recompute_ff", "recompute"):
        choices = {"memory": memory, "keys": "plain", "values": "late"}
        report = MultiLayerPool(64, 4, choices=choices).plan(training=True)
        assert report.plan == Plan("plain", "late", "two", "chunked", memory)
        assert "plain keys" in str(report)
        assert (report.saved_bytes > 0) == (memory != "recompute")
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        MultiLayerPool(64, 4).plan(0)
