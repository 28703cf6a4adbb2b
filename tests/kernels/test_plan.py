"""The cost model: FLOP, seconds, and the plan that is chosen."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlpool_kernels import Plan, Sizes, choose
from mlpool_kernels import plan as cost_model

RELEASED = {"D=4096": Sizes(1, 32, 4096, 768, 32, 2048, 4 * 4096), "D=896": Sizes(1, 24, 896, 768, 32, 2048, 4 * 896)}


@pytest.mark.parametrize(("name", "reference_gflop", "here"), [("D=4096", 1175, 254), ("D=896", 206, 17.6)])
def test_flops_of_the_released_sizes(name, reference_gflop, here):
    """No more than the design's own table."""
    s = RELEASED[name]
    assert sum(cost_model.reference_flops(s).values()) / 1e9 == pytest.approx(reference_gflop, rel=0.01)
    plan = choose(s, training=False, cached=True, triton=True, itemsize=2, memory_bytes=1 << 37)
    cost = cost_model.key_flops(s, plan.keys)[0] + cost_model.value_flops(s, plan.values)[0]
    assert (cost + cost_model.feed_forward_flops(s)) / 1e9 <= 1.01 * here


@settings(max_examples=60, deadline=None)
@given(
    s=st.builds(
        Sizes, *(st.integers(1, most) for most in (256, 600, 4096, 768, 32, 2048, 16384))
    ), training=st.booleans(), triton=st.booleans(), memory=st.sampled_from([1 << 28, 1 << 33, 1 << 37]),
)  # fmt: skip
def test_the_cheapest_form_is_chosen(s, training, triton, memory):
    cached = not training
    plan = choose(s, training=training, cached=cached, triton=triton, itemsize=2, memory_bytes=memory)

    def cost(flops, form, moved=0):
        per_text, once = flops(s, form)
        return s.batch * (per_text + moved) + (0 if cached else once)

    copied = 0 if triton else 200 * s.keys * s.heads * s.hidden  # numbers of VO, by torch
    keys = {form: cost(cost_model.key_flops, form) for form in cost_model.KEYS}
    values = {form: cost(cost_model.value_flops, form, copied * (form != "late")) for form in cost_model.VALUES}
    if triton and cost_model.by_heads(s, Plan(values="early", mix="kernel")):
        values["late"] *= 2  # beside what a kernel mixes they have to save more than half
    for chosen, costs in ((plan.keys, keys), (plan.values, values)):
        assert costs[chosen] == min(costs.values())
    if not training:
        assert plan.memory == "recompute"
    elif plan.memory == "save":
        assert s.batch * cost_model.saved_bytes(s, plan, 2) <= 0.1 * memory
    assert triton or (plan.launches, plan.feed_forward) == ("two", "chunked")
    assert Plan.parse(str(plan)) == plan


def exact_plans(triton, one):
    """Every plan that a call can run as, memory aside."""
    for keys, values, launches, form, mix in itertools.product(
        cost_model.KEYS, cost_model.VALUES, cost_model.LAUNCHES, cost_model.FEED_FORWARD, cost_model.MIX
    ):
        impossible = launches == "one" and (keys == "plain" or not one)
        if not impossible and (triton or (form, mix) == ("chunked", "product")) and (values, mix) != ("late", "kernel"):
            yield Plan(keys, values, launches, form, "recompute", mix)


@settings(max_examples=60, deadline=None)
@given(
    s=st.builds(Sizes, *(st.integers(1, most) for most in (256, 300, 4096, 128, 32, 2048, 16384))),
    rates=st.builds(
        cost_model.Rates, *(st.floats(1e9, 1e15) for _ in range(6)), st.floats(1e-7, 1e-3), st.just("fitted for a test")
    ), triton=st.booleans(), masked=st.booleans(), cached=st.booleans(),
)  # fmt: skip
def test_rates_choose_the_fastest(s, rates, triton, masked, cached):
    def time(plan):
        return sum(cost_model.predict(s, plan, rates, itemsize=2, cached=cached).values())

    plan = choose(
        s, training=False, cached=cached, triton=triton, itemsize=2, memory_bytes=1 << 37, masked=masked, rates=rates
    )
    plans = list(exact_plans(triton, triton and not masked and s.keys <= 128))
    assert plan in plans
    assert time(plan) <= min(map(time, plans)) / cost_model.GAIN * (1 + 1e-9)


def test_predicted_seconds_are_those_of_the_rates():
    """With one rate at work at a time: FLOP over FLOP/s, launches, and what the backward and recomputing add."""
    s, never = Sizes(3, 24, 896, 64, 8, 64, 896), 1e30
    plan = Plan("absorbed", "early", "two", "chunked", "recompute")
    alone = cost_model.Rates(1e9, never, never, never, never, never, 1e-30, "")
    times = cost_model.predict(s, plan, alone, itemsize=2)
    flops = [
        cost_model.key_flops(s, "absorbed")[0],
        cost_model.value_flops(s, "early")[0],
        cost_model.feed_forward_flops(s),
    ]
    assert list(times.values()) == pytest.approx([3 * f / 1e9 for f in flops])
    assert list(times) == list(cost_model.STEPS)
    launches = cost_model.predict(s, plan, alone._replace(product=never, launch=1.0), itemsize=2)
    assert list(launches.values()) == pytest.approx([3, 5, 3])
    one = Plan("absorbed", "early", "one", "fused", "recompute", "kernel")
    launches = cost_model.predict(s, one, alone._replace(product=never, launch=1.0), itemsize=2)
    assert list(launches.values()) == pytest.approx([1, 2, 2])
    # What is computed and what is moved go on side by side.
    both = cost_model.predict(s, plan, alone._replace(memory=1e3), itemsize=2)
    moved = cost_model.predict(s, plan, alone._replace(product=never, memory=1e3), itemsize=2)
    assert both == pytest.approx(moved)
    assert all(both[step] > times[step] for step in times)
    for memory, passes in {"save": (3, 3, 3), "recompute_ff": (3, 3, 4), "recompute": (4, 4, 4)}.items():
        kept = cost_model.predict(s, Plan("absorbed", "early", memory=memory), alone, itemsize=2, training=True)
        assert list(kept.values()) == pytest.approx([n * t for n, t in zip(passes, times.values(), strict=True)])


def test_few_latents_do_not_pay_launches_for_fewer_flops():
    """Late values are the fewest FLOP of 16 latents: taken where no kernel mixes, or where they save more than half."""
    layers, tokens = Sizes(64, 24, 896, 16, 8, 64, 896), Sizes(8, 512, 4096, 16, 8, 64, 4096)
    options = {"training": False, "cached": True, "itemsize": 2, "memory_bytes": 1 << 37}
    assert cost_model.value_flops(layers, "late") < cost_model.value_flops(layers, "early")
    assert choose(layers, triton=True, **options).values == "early"
    assert choose(layers, triton=False, **options).values == "late"
    assert choose(tokens, triton=True, **options).values == "late"


def test_one_launch_takes_no_padding_mask():
    s, options = Sizes(4, 32, 896, 64, 8, 64, 896), {"training": False, "cached": True, "triton": True, "itemsize": 2}
    assert choose(s, memory_bytes=1 << 37, **options).launches == "one"
    assert choose(s, memory_bytes=1 << 37, masked=True, **options).launches == "two"


def test_plan_overrides():
    assert Plan().override({"keys": "plain"}) == Plan(keys="plain")
    with pytest.raises(ValueError, match=r"unknown plan entry 'key'; known: keys, values"):
        Plan().override({"key": "plain"})
    with pytest.raises(ValueError, match=r"plan entry 'keys' must be one of .*'absorbed', 'plain'.* got 'late'"):
        Plan().override({"keys": "late"})
